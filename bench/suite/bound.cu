// The lower bound of the host time to get a batch to the device. Each part is timed here: reading
// the ids and writing them as int32 into pinned memory, with this project's own gather; memory for
// the output, cut from blocks of torch's allocator; and the driver's launch of an empty kernel.
// Also timed are the steps of other methods: a memcpy, an event, and requests to Python objects for
// their buffers. bound.py builds this file.
#include <c10/core/Allocator.h>
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "../../csrc/gather.h"

namespace {

__global__ void empty_kernel() {}

struct {
  char* pinned;  // one slot, which the device has read before the next batch
  cudaEvent_t event;
  cudaFunction_t kernel;
  decltype(&cuLaunchKernel) launch;
  size_t bytes = 0;
  c10::DataPtr block;
  size_t left = 0;
} g;

double now_us() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double, std::micro>(Clock::now().time_since_epoch()).count();
}

// Like csrc/output_memory.cpp: small outputs are cut from a block, others are allocated alone.
void* output(size_t bytes) {
  constexpr size_t kLargestCut = size_t{128} << 10, kSmallestBlock = size_t{64} << 10;
  bytes = (bytes + 511) / 512 * 512;
  c10::Allocator* torch = c10::GetAllocator(c10::DeviceType::CUDA);
  if (bytes > kLargestCut) return torch->allocate(bytes).get();
  if (bytes > g.left) {
    g.left = std::max(8 * bytes, kSmallestBlock);
    g.block = torch->allocate(g.left);
  }
  g.left -= bytes;
  return static_cast<char*>(g.block.get()) + g.left;
}

}  // namespace

extern "C" int bound_open(size_t bytes) {
  if (cudaHostAlloc(reinterpret_cast<void**>(&g.pinned), bytes, cudaHostAllocDefault) ||
      cudaEventCreateWithFlags(&g.event, cudaEventDisableTiming))
    return 0;
  std::memset(g.pinned, 1, bytes);
  g.bytes = bytes;
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  g.launch =
      driver ? reinterpret_cast<decltype(g.launch)>(dlsym(driver, "cuLaunchKernel")) : nullptr;
  return g.launch && !cudaGetFuncBySymbol(&g.kernel, reinterpret_cast<void*>(empty_kernel));
}

extern "C" void bound_close() {
  cudaFreeHost(g.pinned);
  cudaEventDestroy(g.event);
  g.block.clear();
  g.left = 0;
}

// Writes `count` arrays of int64 as int32 into the slot, one after another.
extern "C" int bound_write(const void* const* arrays, const size_t* ids, size_t count, double* us) {
  static std::vector<pystage::Part> parts;
  parts.assign(count, {});
  size_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    parts[i].data = arrays[i];
    parts[i].count = ids[i];
    parts[i].stride = 8;
    total += ids[i];
  }
  if (8 * total > g.bytes) return 0;
  void* to = g.pinned;
  const double start = now_us();
  pystage::gather(parts.data(), count, to, pystage::IntType::kInt32, nullptr);
  *us = now_us() - start;
  return 1;
}

// Copies the arrays as they are.
extern "C" int bound_memcpy(const void* const* arrays, const size_t* ids, size_t count,
                            double* us) {
  size_t total = 0;
  for (size_t i = 0; i < count; ++i) total += ids[i];
  if (8 * total > g.bytes) return 0;
  char* to = g.pinned;
  const double start = now_us();
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(to, arrays[i], 8 * ids[i]);
    to += 8 * ids[i];
  }
  *us = now_us() - start;
  return 1;
}

// Requests the buffers of `count` Python objects and releases them at the end, with the functions
// `get` and `release` of Python's API. The caller holds the GIL.
extern "C" int bound_buffers(void* const* objects, size_t count, int (*get)(void*, void*, int),
                             void (*release)(void*), double* us) {
  constexpr int kStridesAndFormat = 0x1c;
  struct View {
    alignas(16) char bytes[80];  // Py_buffer
  };
  static std::vector<View> views;
  const double start = now_us();
  views.resize(count);
  size_t got = 0;
  while (got < count && get(objects[got], &views[got], kStridesAndFormat) == 0) ++got;
  for (size_t i = 0; i < got; ++i) release(&views[i]);
  *us = now_us() - start;
  return got == count;
}

// us: the times for allocating `bytes` on the device, for the launch and for the event.
extern "C" int bound_issue(size_t bytes, cudaStream_t stream, double us[3]) {
  const double start = now_us();
  void* volatile out = output(bytes);
  (void)out;
  const double allocated = now_us();
  const CUresult launch = g.launch(reinterpret_cast<CUfunction>(g.kernel), 1, 1, 1, 32, 1, 1, 0,
                                   reinterpret_cast<CUstream>(stream), nullptr, nullptr);
  const double launched = now_us();
  const cudaError_t error = cudaEventRecord(g.event, stream);
  const double recorded = now_us();
  us[0] = allocated - start;
  us[1] = launched - allocated;
  us[2] = recorded - launched;
  return launch == CUDA_SUCCESS && error == cudaSuccess && cudaGetLastError() == cudaSuccess;
}

// What no way from host ids to a device tensor can do without, each timed in here: a copy of the
// ids into pinned memory, memory for the output, a launch, and an event that tells when the pinned
// memory may be written again. Built by floor.py.
#include <c10/core/Allocator.h>
#include <cuda_runtime.h>

#include <chrono>
#include <cstring>
#include <vector>

namespace {

__global__ void empty_kernel() {}

constexpr int kSlots = 4;  // in turn, as a pool's
struct {
  char* pinned[kSlots];
  cudaEvent_t event[kSlots];
  size_t bytes = 0;
  int turn = 0;
} g;

double now_us() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double, std::micro>(Clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" int floor_open(size_t bytes) {
  for (int i = 0; i < kSlots; ++i) {
    if (cudaHostAlloc(reinterpret_cast<void**>(&g.pinned[i]), bytes, cudaHostAllocDefault) ||
        cudaEventCreateWithFlags(&g.event[i], cudaEventDisableTiming))
      return 0;
    std::memset(g.pinned[i], 1, bytes);
  }
  g.bytes = bytes;
  return 1;
}

extern "C" void floor_close() {
  for (int i = 0; i < kSlots; ++i) {
    cudaFreeHost(g.pinned[i]);
    cudaEventDestroy(g.event[i]);
  }
}

// Copies `count` arrays into the next slot, one behind the other.
extern "C" int floor_copy(const void* const* arrays, const size_t* bytes, size_t count,
                          double* us) {
  size_t total = 0;
  for (size_t i = 0; i < count; ++i) total += bytes[i];
  if (total > g.bytes) return 0;
  char* to = g.pinned[++g.turn % kSlots];
  const double start = now_us();
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(to, arrays[i], bytes[i]);
    to += bytes[i];
  }
  *us = now_us() - start;
  return 1;
}

// Asks `count` Python objects for their buffers, and gives them back at the end; by the calls `get`
// and `release` of Python's API, with its lock held.
extern "C" int floor_buffers(void* const* objects, size_t count, int (*get)(void*, void*, int),
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

// us: allocation of `bytes` on the device, launch, event.
extern "C" int floor_issue(size_t bytes, cudaStream_t stream, double us[3]) {
  const double start = now_us();
  const c10::DataPtr out = c10::GetAllocator(c10::DeviceType::CUDA)->allocate(bytes);
  const double allocated = now_us();
  empty_kernel<<<1, 32, 0, stream>>>();
  const double launched = now_us();
  const cudaError_t error = cudaEventRecord(g.event[g.turn % kSlots], stream);
  const double recorded = now_us();
  us[0] = allocated - start;
  us[1] = launched - allocated;
  us[2] = recorded - launched;
  return error == cudaSuccess && cudaGetLastError() == cudaSuccess;
}

// The device layer on CUDA: mapped pinned memory, events, and the kernels that read a slot over
// the bus. It includes CUDA's headers and not torch's, so it builds in seconds.
// This file is longer than 500 lines on purpose: it is the one file that the build gives to nvcc.
//
// Why a kernel instead of cudaMemcpyAsync: a copy of more than a few KiB goes to a copy engine. It
// queues there behind all KV-cache traffic that was issued before it, on any stream, and handing
// the stream over to the engine and back costs about 8 us. A kernel that loads from mapped memory
// has neither cost, and it can widen int32 to int64 on the way, which halves the bytes on the bus.
//
// Note [Which context]
// ~~~~~~~~~~~~~~~~~~~~
// The pool calls this layer from any thread that stages, resolves, reads the statistics or drops
// the last tokens. In a thread without a context, the runtime makes device 0 current, and a context
// there costs each rank about 500 MiB of GPU 0. So the calls here go to the driver, with a context
// of this device current, and leave the thread's current context as it was. They use the device's
// primary context, which the runtime and torch use as well, unless another context of the same
// device is already current: a green context has default streams of its own, and the caller means
// those.
// Only two things come from the runtime, because only it has them: the driver's entry points and
// the kernels of this file. cuda.h is included for its types, so that the compiler checks every
// call against the driver's own declarations. Nothing is linked to libcuda, so the module also
// loads on machines without it.
#include <cuda.h>
#include <cuda_runtime.h>

#undef NDEBUG  // indices are checked in every build, as torch's are
#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_device.h"
#include "errors.h"

namespace pystage {
namespace {

// --- kernels -----------------------------------------------------------------------------------

constexpr int kThreads = 128;

template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Vec {
  T v[N];
};

// In a kernel that was launched early (see run()), waits for the earlier kernels of the stream and
// makes their writes visible. Called at most once, after reading the slot and before writing,
// because the earlier kernels may still use the memory of the output.
__device__ __forceinline__ void wait_for_stream() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The host rewrites slots, so the load must not use a cached copy (ld.cv). The compiler also does
// not move such a load past wait_for_stream().
__device__ __forceinline__ int32_t read_slot(const int32_t* at) { return __ldcv(at); }
__device__ __forceinline__ int64_t read_slot(const int64_t* at) {
  return __ldcv(reinterpret_cast<const long long*>(at));
}

// One 16-byte load per thread, coalesced within a warp. The loads from host memory take most of the
// time: about 1 us each way over PCIe.
template <typename In, typename Out>
__device__ __forceinline__ void move_vectors(unsigned block, const In* src, Out* __restrict__ dst,
                                             size_t count) {
  constexpr int kIds = sizeof(int4) / sizeof(In);
  constexpr int kPerStore = 16 / sizeof(Out) < kIds ? 16 / sizeof(Out) : kIds;
  using Store = Vec<Out, kPerStore>;
  const size_t vectors = count / kIds;
  const size_t i = static_cast<size_t>(block) * kThreads + threadIdx.x;
  // The last ids do not fill a vector.
  const size_t tail = vectors * kIds + threadIdx.x;
  const bool has_tail = block == 0 && tail < count;
  int4 bits;
  In last;
  if (i < vectors) bits = __ldcv(reinterpret_cast<const int4*>(src) + i);
  if (has_tail) last = read_slot(src + tail);
  wait_for_stream();
  if (i < vectors) {
    In in[kIds];
    memcpy(in, &bits, sizeof bits);
#pragma unroll
    for (int s = 0; s < kIds / kPerStore; ++s) {
      Store out;
#pragma unroll
      for (int k = 0; k < kPerStore; ++k) out.v[k] = static_cast<Out>(in[s * kPerStore + k]);
      reinterpret_cast<Store*>(dst)[i * (kIds / kPerStore) + s] = out;
    }
  }
  if (has_tail) dst[tail] = static_cast<Out>(last);
}

// For slices that are not aligned to 16 bytes.
template <typename In, typename Out>
__device__ __forceinline__ void move_single(unsigned block, const In* src, Out* __restrict__ dst,
                                            size_t count) {
  const size_t i = static_cast<size_t>(block) * kThreads + threadIdx.x;
  In in;
  if (i < count) in = read_slot(src + i);
  wait_for_stream();
  if (i < count) dst[i] = static_cast<Out>(in);
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    transfer_vectors(const In* src, Out* __restrict__ dst, size_t count) {
  move_vectors(blockIdx.x, src, dst, count);
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    transfer_single(const In* src, Out* __restrict__ dst, size_t count) {
  move_single(blockIdx.x, src, dst, count);
}

struct Tail {
  const void* relay;
  const void* indices;
  int64_t relay_size;
  size_t count;
  bool wide_relay;
  bool wide_indices;
};

__device__ __forceinline__ int64_t read_int(const void* data, bool wide, size_t at) {
  return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
}

// The first blocks move the ids of the slot, the other blocks gather the tail.
template <typename In, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    transfer_mixed(const In* src, int64_t* __restrict__ dst, size_t count, unsigned slot_blocks,
                   Tail tail) {
  if (blockIdx.x < slot_blocks) {
    if constexpr (kVectors)
      move_vectors(blockIdx.x, src, dst, count);
    else
      move_single(blockIdx.x, src, dst, count);
    return;
  }
  wait_for_stream();
  const size_t i = static_cast<size_t>(blockIdx.x - slot_blocks) * kThreads + threadIdx.x;
  if (i >= tail.count) return;
  int64_t index = read_int(tail.indices, tail.wide_indices, i);
  assert(-tail.relay_size <= index && index < tail.relay_size && "index out of bounds");
  if (index < 0) index += tail.relay_size;
  dst[count + i] = read_int(tail.relay, tail.wide_relay, static_cast<size_t>(index));
}

// Values that are passed as the kernel's parameters. There are several size classes because a
// launch copies the whole parameter. Parameters above 4 KiB need a driver for CUDA 12.1.
constexpr size_t kValueBytes[] = {1008, 4064, 32736};
constexpr size_t kRowCounts[] = {40, 168, 1360};
constexpr size_t kClasses = std::size(kValueBytes);
constexpr int kLargeParameterDriver = 12010;

template <size_t kBytes>
struct alignas(16) Values {  // the pieces, followed by the values
  int4 v[kBytes / sizeof(int4)];
};
static_assert(sizeof(ValuesPiece) == sizeof(int4));
template <size_t kCount>
struct Rows {
  RowWrite v[kCount];
};

// Each blockIdx.x handles one piece, shared by the blocks along y.
template <size_t kBytes>
__global__ void __launch_bounds__(kThreads)
    write_values(const __grid_constant__ Values<kBytes> values) {
  ValuesPiece piece;
  memcpy(&piece, &values.v[blockIdx.x], sizeof piece);
  auto* const dst = static_cast<int4*>(piece.dst);
  for (unsigned i = blockIdx.y * kThreads + threadIdx.x; i < piece.count; i += gridDim.y * kThreads)
    dst[i] = values.v[gridDim.x + piece.first + i];
}

// Each blockIdx.x handles one row, shared by the blocks along y.
template <size_t kCount>
__global__ void __launch_bounds__(kThreads)
    write_rows(const __grid_constant__ Rows<kCount> rows, int32_t* __restrict__ table,
               size_t row_stride, const int64_t* __restrict__ rest) {
  const RowWrite& w = rows.v[blockIdx.x];
  int32_t* const out = table + static_cast<size_t>(w.row) * row_stride;
  const int entries = w.prefix_count + w.count;
  for (int i = blockIdx.y * kThreads + threadIdx.x; i < entries; i += gridDim.y * kThreads)
    out[i] = static_cast<int32_t>(i < w.prefix_count ? w.prefix[i]
                                                     : rest[w.rest_at + i - w.prefix_count]);
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

unsigned blocks_for(size_t work, size_t per_block) {
  return static_cast<unsigned>(std::max<size_t>(1, (work + per_block - 1) / per_block));
}

struct Grid {
  bool vectors;
  unsigned blocks;
};

Grid grid_for(const Transfer& t) {
  if (!t.count) return {false, 0};
  if (!aligned16(t.src_device) || !aligned16(t.dst)) return {false, blocks_for(t.count, kThreads)};
  return {true, blocks_for(t.count / (16 / size_of(t.wire)), kThreads)};
}

// The kernels by wire type and output type, then by Grid::vectors.
using Addresses = std::array<const void*, 2>;
template <typename Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}
template <typename In, typename Out>
Addresses transfer_kernels() {
  return {address(transfer_single<In, Out>), address(transfer_vectors<In, Out>)};
}
template <typename In>
Addresses mixed_kernels() {
  return {address(transfer_mixed<In, false>), address(transfer_mixed<In, true>)};
}

// The kernels by size class.
std::array<const void*, kClasses> values_kernels() {
  return {address(write_values<kValueBytes[0]>), address(write_values<kValueBytes[1]>),
          address(write_values<kValueBytes[2]>)};
}
std::array<const void*, kClasses> rows_kernels() {
  return {address(write_rows<kRowCounts[0]>), address(write_rows<kRowCounts[1]>),
          address(write_rows<kRowCounts[2]>)};
}

// The output of the probe for stale mapped memory, see CudaDevice::kernels_see_writes().
constexpr size_t kProbeIds = 512;
__device__ int4 probe_ids[kProbeIds * sizeof(int64_t) / sizeof(int4)];

// --- driver ------------------------------------------------------------------------------------

#define PYSTAGE_DRIVER_CALLS(X)        \
  X(cuInit)                            \
  X(cuDriverGetVersion)                \
  X(cuDeviceGet)                       \
  X(cuDeviceGetAttribute)              \
  X(cuDevicePrimaryCtxRetain)          \
  X(cuDevicePrimaryCtxRelease)         \
  X(cuCtxGetCurrent)                   \
  X(cuCtxGetDevice)                    \
  X(cuCtxPushCurrent)                  \
  X(cuCtxPopCurrent)                   \
  X(cuThreadExchangeStreamCaptureMode) \
  X(cuFuncGetAttribute)                \
  X(cuLaunchKernelEx)                  \
  X(cuLaunchHostFunc)                  \
  X(cuMemHostAlloc)                    \
  X(cuMemHostGetDevicePointer)         \
  X(cuMemFreeHost)                     \
  X(cuMemGetInfo)                      \
  X(cuMemcpyHtoDAsync)                 \
  X(cuMemcpyDtoHAsync)                 \
  X(cuEventCreate)                     \
  X(cuEventDestroy)                    \
  X(cuEventRecord)                     \
  X(cuEventQuery)                      \
  X(cuEventSynchronize)                \
  X(cuStreamCreate)                    \
  X(cuStreamDestroy)                   \
  X(cuStreamSynchronize)               \
  X(cuStreamWaitEvent)                 \
  X(cuStreamGetId)                     \
  X(cuStreamIsCapturing)

struct DriverError : DeviceError {
  DriverError(const std::string& message, CUresult code) : DeviceError(message), code(code) {}
  CUresult code;
};

// The process is ending or the device is lost, so the resources to be freed are already gone.
bool is_gone(CUresult code) {
  constexpr int kContained = 226, kTensorMemoryLeak = 721;  // older toolkits do not name them
  if (int{code} == kContained || int{code} == kTensorMemoryLeak) return true;
  switch (code) {
    case CUDA_ERROR_DEINITIALIZED:
    case CUDA_ERROR_NOT_INITIALIZED:
    case CUDA_ERROR_DEVICE_UNAVAILABLE:
    case CUDA_ERROR_INVALID_CONTEXT:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_EXTERNAL_DEVICE:
    case CUDA_ERROR_MPS_CLIENT_TERMINATED:
      return true;
    default:
      return false;
  }
}

// The platform refuses pinned or mapped memory, for example because of a memlock limit, WSL or the
// rules of a container.
bool is_refusal(CUresult code) {
  return code == CUDA_ERROR_OUT_OF_MEMORY || code == CUDA_ERROR_NOT_SUPPORTED ||
         code == CUDA_ERROR_NOT_PERMITTED || code == CUDA_ERROR_OPERATING_SYSTEM;
}

// The driver's functions, and the device's primary context.
struct Driver {
#define PYSTAGE_MEMBER(name) decltype(&::name) name = nullptr;
  PYSTAGE_DRIVER_CALLS(PYSTAGE_MEMBER)
#undef PYSTAGE_MEMBER

  explicit Driver(std::string device_name) : device_name(std::move(device_name)) {
#define PYSTAGE_FIND(name) find(name, #name);
    PYSTAGE_DRIVER_CALLS(PYSTAGE_FIND)
#undef PYSTAGE_FIND
  }
  // Runs only if the constructor of the device fails: a finished device is never destroyed.
  ~Driver() {
    if (primary) cuDevicePrimaryCtxRelease(device);
  }
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // The driver and the runtime use the same error codes.
  void check(CUresult code, const char* call) const {
    if (code != CUDA_SUCCESS) raise(code, call);
  }
  void check(cudaError_t code, const char* call) const {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // reported here, so do not leave it for another check
    raise(static_cast<CUresult>(code), call);
  }
  [[noreturn]] void raise(CUresult code, const char* call) const {
    const auto error = static_cast<cudaError_t>(code);
    std::string message = std::string(call) + " failed: " + cudaGetErrorName(error) + " (" +
                          std::to_string(static_cast<int>(code)) +
                          "): " + cudaGetErrorString(error) + " [" + device_name + "]";
    if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice)
      message += "; install a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
                 " or use device=\"cpu\"";
    throw DriverError(message, code);
  }

  const std::string device_name;
  CUdevice device = -1;
  CUcontext primary = nullptr;

 private:
  template <typename Function>
  void find(Function& function, const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || !entry)
      throw DeviceError(std::string("the driver has no ") + name + "; install a driver for CUDA " +
                        std::to_string(CUDART_VERSION / 1000) + " [" + device_name + "]");
    function = reinterpret_cast<Function>(entry);
  }
};

#define PYSTAGE_CHECK(driver, call, ...) (driver).check((driver).call(__VA_ARGS__), #call)

// Makes a context of the device current for a scope. See Note [Which context].
class InContext {
 public:
  explicit InContext(const Driver& driver) : driver_(driver) {
    CUcontext current = nullptr;
    CUdevice device;
    if (driver_.cuCtxGetCurrent(&current) == CUDA_SUCCESS && current &&
        (current == driver_.primary ||
         (driver_.cuCtxGetDevice(&device) == CUDA_SUCCESS && device == driver_.device)))
      return;
    PYSTAGE_CHECK(driver_, cuCtxPushCurrent, driver_.primary);
    pushed_ = true;
  }
  ~InContext() {
    CUcontext popped;
    if (pushed_) driver_.cuCtxPopCurrent(&popped);
  }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// Lets a thread query events and pin memory while some other thread captures a graph.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    PYSTAGE_CHECK(driver_, cuThreadExchangeStreamCaptureMode, &mode_);
  }
  ~RelaxedCapture() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

// --- device ------------------------------------------------------------------------------------

struct Hold {
  std::mutex mutex;
  std::condition_variable changed;
  bool released = false;
  std::atomic<int> owners{2};  // the test and the stream's callback
};
void drop(Hold* hold) {
  if (hold->owners.fetch_sub(1) == 1) delete hold;
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : name_("cuda:" + std::to_string(index)), driver_(name_) {
    PYSTAGE_CHECK(driver_, cuInit, 0);
    const RelaxedCapture relaxed(driver_);
    PYSTAGE_CHECK(driver_, cuDeviceGet, &driver_.device, index);
    PYSTAGE_CHECK(driver_, cuDevicePrimaryCtxRetain, &driver_.primary, driver_.device);
    const InContext context(driver_);
    can_map_ = attribute(CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY);
    const char* disabled = std::getenv("PYSTAGE_DISABLE_PINNED");
    if (disabled && *disabled && *disabled != '0')
      why_pageable_ = "PYSTAGE_DISABLE_PINNED is set";
    else if (!attribute(CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED))
      // Under Confidential Computing the device cannot read host memory. Memory that is called
      // pinned there is copied through a bounce buffer, synchronously.
      why_pageable_ =
          name_ + " does not support registering host memory (as under Confidential Computing)";
    // Load the kernels now: with lazy loading, the first launch would wait for a busy device.
    transfers_[0][0] = load(transfer_kernels<int32_t, int32_t>());
    transfers_[0][1] = load(transfer_kernels<int32_t, int64_t>());
    transfers_[1][0] = load(transfer_kernels<int64_t, int32_t>());
    transfers_[1][1] = load(transfer_kernels<int64_t, int64_t>());
    mixed_[0] = load(mixed_kernels<int32_t>());
    mixed_[1] = load(mixed_kernels<int64_t>());
    int driver_version = 0;
    PYSTAGE_CHECK(driver_, cuDriverGetVersion, &driver_version);
    classes_ = driver_version < kLargeParameterDriver ? kClasses - 1 : kClasses;
    for (size_t i = 0; i < classes_; ++i) {
      values_[i] = load(values_kernels()[i]);
      rows_[i] = load(rows_kernels()[i]);
    }
    driver_.check(cudaGetSymbolAddress(&probe_out_, probe_ids), "cudaGetSymbolAddress");
    // Kernels compiled for an older architecture do not contain the wait, on any device.
    int compiled_for = 0;
    PYSTAGE_CHECK(driver_, cuFuncGetAttribute, &compiled_for, CU_FUNC_ATTRIBUTE_PTX_VERSION,
                  mixed_[0][0]);
    can_launch_early_ =
        attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) >= 9 && compiled_for >= 90;
  }

  const std::string& name() const override { return name_; }

  HostMemory allocate(size_t bytes, std::string* why_pageable) override {
    std::string why = why_not_pinned();
    if (why.empty()) {
      const InContext context(driver_);
      const RelaxedCapture relaxed(driver_);
      void* host = nullptr;
      CUresult code = driver_.cuMemHostAlloc(&host, bytes,
                                             CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
      if (code == CUDA_SUCCESS) {
        auto unpin = [this](void* memory) { free({static_cast<char*>(memory), nullptr, 0, true}); };
        std::unique_ptr<void, decltype(unpin)> pinned(host, unpin);
        CUdeviceptr device = 0;
        if (can_map_) code = driver_.cuMemHostGetDevicePointer(&device, host, 0);
        // A kernel cannot read memory that is not mapped, so the copy engine is used.
        if (code != CUDA_SUCCESS && !is_refusal(code))
          driver_.raise(code, "cuMemHostGetDevicePointer");
        const char* mapped = code == CUDA_SUCCESS ? reinterpret_cast<const char*>(device) : nullptr;
        if (!mapped || kernels_see_writes(static_cast<int64_t*>(host), mapped, bytes))
          return {static_cast<char*>(pinned.release()), mapped, bytes, true};
        why = why_not_pinned();
      } else if (is_refusal(code)) {
        why = "cuMemHostAlloc of " + std::to_string(bytes) +
              " bytes failed: " + cudaGetErrorName(static_cast<cudaError_t>(code)) + " (" +
              cudaGetErrorString(static_cast<cudaError_t>(code)) + ")";
      } else {
        driver_.raise(code, "cuMemHostAlloc");
      }
    }
    void* host = std::aligned_alloc(4096, bytes);
    if (!host)
      throw DeviceError("aligned_alloc of " + std::to_string(bytes) + " bytes failed [" + name_ +
                        "], after " + why);
    *why_pageable = why;
    return {static_cast<char*>(host), nullptr, bytes, false, true};
  }

  void free(const HostMemory& memory) noexcept override {
    if (!memory.pinned) return std::free(memory.host);
    settle([&] { return driver_.cuMemFreeHost(memory.host); }, "cuMemFreeHost");
  }

  bool kernels_read_pinned() override {
    if (!can_map_ || !why_not_pinned().empty()) return false;
    if (probed_) return true;
    std::string why;
    const HostMemory memory = allocate(kProbeIds * sizeof(int64_t), &why);  // probes the memory
    free(memory);
    return memory.device != nullptr;
  }

  void launch(const Transfer& t, StreamHandle stream) override {
    if (!t.count && !t.tail) return;
    auto* s = static_cast<CUstream>(stream);
    const InContext context(driver_);
    if (t.kind == TransferKind::kCopyEngine) {
      if (t.tail || t.wire != t.out)
        throw DeviceError(
            "a copy engine can neither gather ids nor convert between int32 and int64 [" + name_ +
            "]");
      PYSTAGE_CHECK(driver_, cuMemcpyHtoDAsync, reinterpret_cast<CUdeviceptr>(t.dst), t.src,
                    t.count * size_of(t.wire), s);
      return;
    }
    Grid grid = grid_for(t);
    const bool wide_in = t.wire == IntType::kInt64, wide_out = t.out == IntType::kInt64;
    const void* src = t.src_device;
    void* dst = t.dst;
    size_t count = t.count;
    if (!t.tail) {
      void* args[] = {&src, &dst, &count};
      return run(transfers_[wide_in][wide_out][grid.vectors], "cuLaunchKernelEx(transfer)",
                 grid.blocks, s, t.src_is_complete, args);
    }
    if (!wide_out) throw DeviceError("a tail is written as int64 [" + name_ + "]");
    Tail tail{t.tail->relay,
              t.tail->indices,
              static_cast<int64_t>(t.tail->relay_size),
              t.tail->count,
              t.tail->relay_type == IntType::kInt64,
              t.tail->index_type == IntType::kInt64};
    void* args[] = {&src, &dst, &count, &grid.blocks, &tail};
    run(mixed_[wide_in][grid.vectors], "cuLaunchKernelEx(transfer_mixed)",
        grid.blocks + blocks_for(tail.count, kThreads), s, t.src_is_complete, args);
  }

  size_t most_values() override { return kValueBytes[classes_ - 1]; }
  size_t most_rows() override { return kRowCounts[classes_ - 1]; }

  void launch_values(const void* values, size_t bytes, const ValuesPiece* pieces, size_t count,
                     StreamHandle stream) override {
    if (!count) return;
    const size_t head = count * sizeof *pieces;
    if (head + bytes > most_values() || bytes % kValuesAlignment)
      throw DeviceError(std::to_string(bytes) + " bytes of values in " + std::to_string(count) +
                        " pieces cannot be parameters [" + name_ + "]");
    Values<kValueBytes[kClasses - 1]> parameter;  // the driver reads the whole class
    std::memcpy(&parameter, pieces, head);
    std::memcpy(reinterpret_cast<char*>(&parameter) + head, values, bytes);
    unsigned longest = 0;
    for (size_t i = 0; i < count; ++i) longest = std::max(longest, pieces[i].count);
    void* args[] = {&parameter};
    const InContext context(driver_);
    run(values_[class_of(head + bytes, kValueBytes)], "cuLaunchKernelEx(write_values)",
        static_cast<unsigned>(count), static_cast<CUstream>(stream), false, args,
        blocks_for(longest, kThreads));
  }

  void launch_rows(int32_t* table, size_t row_stride, const RowWrite* rows, size_t count,
                   const int64_t* rest, StreamHandle stream) override {
    if (!count) return;
    if (count > most_rows())
      throw DeviceError(std::to_string(count) + " rows cannot be parameters [" + name_ + "]");
    const size_t size_class = class_of(count, kRowCounts);
    Rows<kRowCounts[kClasses - 1]> parameter;
    std::copy(rows, rows + count, parameter.v);
    int32_t longest = 0;
    for (size_t i = 0; i < count; ++i)
      longest = std::max(longest, rows[i].prefix_count + rows[i].count);
    const unsigned shares = std::min(blocks_for(static_cast<size_t>(longest), 4 * kThreads), 64u);
    void* args[] = {&parameter, &table, &row_stride, &rest};
    const InContext context(driver_);
    run(rows_[size_class], "cuLaunchKernelEx(write_rows)", static_cast<unsigned>(count),
        static_cast<CUstream>(stream), false, args, shares);
  }

  FenceHandle create_fence() override {
    const InContext context(driver_);
    const RelaxedCapture relaxed(driver_);
    CUevent event = nullptr;
    PYSTAGE_CHECK(driver_, cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
    return event;
  }
  void destroy_fence(FenceHandle fence) noexcept override {
    settle([&] { return driver_.cuEventDestroy(static_cast<CUevent>(fence)); }, "cuEventDestroy");
  }
  void record(FenceHandle fence, StreamHandle stream) override {
    const InContext context(driver_);
    PYSTAGE_CHECK(driver_, cuEventRecord, static_cast<CUevent>(fence),
                  static_cast<CUstream>(stream));
  }
  bool query(FenceHandle fence) override {
    const InContext context(driver_);
    const RelaxedCapture relaxed(driver_);
    const CUresult code = driver_.cuEventQuery(static_cast<CUevent>(fence));
    if (code == CUDA_ERROR_NOT_READY) return false;
    driver_.check(code, "cuEventQuery");
    return true;
  }
  void synchronize(FenceHandle fence) override {
    const InContext context(driver_);
    const RelaxedCapture relaxed(driver_);
    PYSTAGE_CHECK(driver_, cuEventSynchronize, static_cast<CUevent>(fence));
  }
  void wait(StreamHandle stream, FenceHandle fence) override {
    const InContext context(driver_);
    PYSTAGE_CHECK(driver_, cuStreamWaitEvent, static_cast<CUstream>(stream),
                  static_cast<CUevent>(fence), CU_EVENT_WAIT_DEFAULT);
  }
  uint64_t stream_id(StreamHandle stream) override {
    const InContext context(driver_);
    unsigned long long id = 0;
    PYSTAGE_CHECK(driver_, cuStreamGetId, static_cast<CUstream>(stream), &id);
    return id;
  }
  bool usable() noexcept override {
    // This call fails in a lost context, and has no reason to fail in a working one.
    size_t free_bytes, all_bytes;
    try {
      const InContext context(driver_);
      const RelaxedCapture relaxed(driver_);
      PYSTAGE_CHECK(driver_, cuMemGetInfo, &free_bytes, &all_bytes);
    } catch (const DriverError& error) {
      return !is_gone(error.code);
    }
    return true;
  }
  bool capturing(StreamHandle stream) override {
    const InContext context(driver_);
    CUstreamCaptureStatus status;
    PYSTAGE_CHECK(driver_, cuStreamIsCapturing, static_cast<CUstream>(stream), &status);
    return status != CU_STREAM_CAPTURE_STATUS_NONE;
  }

  void* hold(StreamHandle stream) override {
    const InContext context(driver_);
    auto hold = std::make_unique<Hold>();
    const CUhostFn wait = [](void* p) {
      auto* h = static_cast<Hold*>(p);
      {
        std::unique_lock<std::mutex> lock(h->mutex);
        h->changed.wait_for(lock, std::chrono::seconds(kHoldLimitSeconds),
                            [&] { return h->released; });
      }
      drop(h);
    };
    PYSTAGE_CHECK(driver_, cuLaunchHostFunc, static_cast<CUstream>(stream), wait, hold.get());
    return hold.release();
  }
  void release(void* hold) noexcept override {
    auto* h = static_cast<Hold*>(hold);
    {
      std::lock_guard<std::mutex> guard(h->mutex);
      h->released = true;
    }
    h->changed.notify_all();
    drop(h);
  }

 private:
  using Kernels = std::array<CUfunction, 2>;

  int attribute(CUdevice_attribute attribute) const {
    int value = 0;
    PYSTAGE_CHECK(driver_, cuDeviceGetAttribute, &value, attribute, driver_.device);
    return value;
  }

  CUfunction load(const void* address) {
    CUfunction kernel;
    driver_.check(cudaGetFuncBySymbol(&kernel, address), "cudaGetFuncBySymbol");
    return kernel;
  }
  Kernels load(const Addresses& addresses) { return {load(addresses[0]), load(addresses[1])}; }

  // The smallest class that holds this amount. The caller has checked that there is one.
  static size_t class_of(size_t amount, const size_t (&classes)[kClasses]) {
    return static_cast<size_t>(
        std::find_if(classes, classes + kClasses - 1, [&](size_t most) { return amount <= most; }) -
        classes);
  }

  // Gives a resource back to the driver. Must not throw. If the driver or the device is gone, there
  // is nothing left to do. Any other failure is a leak, which is reported on stderr.
  template <typename Call>
  void settle(Call call, const char* name) noexcept {
    try {
      const InContext context(driver_);
      const RelaxedCapture relaxed(driver_);
      driver_.check(call(), name);
    } catch (const DriverError& error) {
      if (!is_gone(error.code)) std::fprintf(stderr, "pystage: %s; leaked\n", error.what());
    }
  }

  std::string why_not_pinned() {
    std::lock_guard<std::mutex> guard(pin_mutex_);
    return why_pageable_;
  }

  // Whether a kernel sees what the host writes into mapped memory that a kernel has read before.
  // Under Confidential Computing it may keep reading the old bytes although every call succeeds
  // (vllm#57224). Tested once per device, with the first memory that is pinned.
  bool kernels_see_writes(int64_t* host, const char* mapped, size_t bytes) {
    std::lock_guard<std::mutex> guard(pin_mutex_);
    if (!probed_) {
      if (!probe(host, mapped, std::min(kProbeIds, bytes / sizeof(int64_t))))
        why_pageable_ = "a kernel on " + name_ +
                        " read stale bytes from mapped host memory (as under Confidential "
                        "Computing)";
      probed_ = true;
    }
    return why_pageable_.empty();
  }

  // Writes twice, and lets a kernel read each time. Uses a stream of its own, so that it does not
  // queue behind other work. Nothing here waits for the whole device, as freeing device memory
  // would.
  bool probe(int64_t* host, const char* mapped, size_t count) {
    CUstream stream = nullptr;
    PYSTAGE_CHECK(driver_, cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    auto destroy = [this](CUstream stream) {
      settle([&] { return driver_.cuStreamDestroy(stream); }, "cuStreamDestroy");
    };
    const std::unique_ptr<CUstream_st, decltype(destroy)> owner(stream, destroy);
    Transfer transfer;
    transfer.src_device = mapped;
    transfer.wire = transfer.out = IntType::kInt64;
    transfer.dst = probe_out_;
    transfer.count = count;
    std::array<int64_t, kProbeIds> seen{};
    for (const int64_t first : {int64_t{1} << 32, int64_t{1} << 40}) {
      for (size_t i = 0; i < count; ++i) host[i] = first + static_cast<int64_t>(i);
      launch(transfer, stream);
      PYSTAGE_CHECK(driver_, cuMemcpyDtoHAsync, seen.data(),
                    reinterpret_cast<CUdeviceptr>(probe_out_), count * sizeof(int64_t), stream);
      PYSTAGE_CHECK(driver_, cuStreamSynchronize, stream);
      if (!std::equal(host, host + count, seen.begin())) return false;
    }
    return true;
  }

  // early: the kernel may start, and read its slot, while the previous kernel of the stream is
  // still ending (a programmatic dependent launch). It waits for that kernel before it writes. This
  // hides 1 us of the latency to the host. It has no effect if the previous work is not a kernel.
  void run(CUfunction kernel, const char* call, unsigned blocks, CUstream stream, bool early,
           void** args, unsigned blocks_y = 1) {
    static CUlaunchAttribute serialization = [] {
      CUlaunchAttribute attribute{};
      attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
      attribute.value.programmaticStreamSerializationAllowed = 1;
      return attribute;
    }();
    CUlaunchConfig config{};
    config.gridDimX = blocks;
    config.gridDimY = blocks_y;
    config.gridDimZ = 1;
    config.blockDimX = kThreads;
    config.blockDimY = config.blockDimZ = 1;
    config.hStream = stream;
    config.attrs = &serialization;
    config.numAttrs = early && can_launch_early_ ? 1 : 0;
    driver_.check(driver_.cuLaunchKernelEx(&config, kernel, args, nullptr), call);
  }

  const std::string name_;
  Driver driver_;
  int can_map_ = 0;
  bool can_launch_early_ = false;
  Kernels transfers_[2][2];  // by int64 wire, int64 output
  Kernels mixed_[2];         // by int64 wire
  std::array<CUfunction, kClasses> values_{}, rows_{};
  size_t classes_ = 0;  // the number of classes that the driver supports
  void* probe_out_ = nullptr;

  std::mutex pin_mutex_;  // guards why_pageable_, and serialises the probe
  std::string why_pageable_;
  std::atomic<bool> probed_{false};
};

}  // namespace

Device& cuda_device(int index) {
  static std::mutex mutex;
  static auto* devices = new std::vector<Device*>;  // never destroyed: pools outlive statics
  if (index < 0) throw DeviceError("cuda:" + std::to_string(index) + " is no device");
  std::lock_guard<std::mutex> guard(mutex);
  if (static_cast<size_t>(index) >= devices->size()) devices->resize(index + 1, nullptr);
  Device*& device = (*devices)[index];
  if (!device) device = new CudaDevice(index);
  return *device;
}

CudaBuild cuda_build() { return {CUDART_VERSION, PYSTAGE_CUDA_ARCHS}; }

}  // namespace pystage

// The device layer on CUDA: mapped pinned memory, events, and the kernels that read a slot over
// the bus. Includes nothing but the CUDA runtime, so it builds in seconds and knows no torch.
//
// Why a kernel and no cudaMemcpyAsync: a copy of more than a few KiB goes to a copy engine. It
// queues there behind whatever KV-cache traffic was issued before it, on any stream, and handing
// the stream over to the engine and back costs about 8 us. A kernel that loads from mapped memory
// does neither, and can widen int32 to int64 on the way, which halves the bytes on the bus.
#include <cuda_runtime.h>

#undef NDEBUG  // indices are checked in every build, as torch's are
#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "cuda_device.h"
#include "errors.h"

namespace pystage {
namespace {

[[noreturn]] void raise_cuda(cudaError_t error, const char* call, const std::string& device) {
  cudaGetLastError();  // the error is reported here; do not leave it for somebody else's check
  std::string message = std::string(call) + " failed: " + cudaGetErrorName(error) + " (" +
                        std::to_string(static_cast<int>(error)) +
                        "): " + cudaGetErrorString(error) + " [" + device + "]";
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice)
    message += "; install a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
               " or use device=\"cpu\"";
  throw DeviceError(message);
}

#define PYSTAGE_CUDA(call)                                              \
  do {                                                                  \
    const cudaError_t error_ = (call);                                  \
    if (error_ != cudaSuccess) raise_cuda(error_, #call, this->name()); \
  } while (0)

// The driver's codes are the runtime's.
#define PYSTAGE_DRIVER(name, call)                              \
  do {                                                          \
    const auto error_ = static_cast<cudaError_t>(call);         \
    if (error_ != cudaSuccess) raise_cuda(error_, name, name_); \
  } while (0)

// --- kernels -----------------------------------------------------------------------------------

constexpr int kThreads = 128;

template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Vec {
  T v[N];
};

// Where a kernel was launched early (see run()): waits for the kernels before it, and sees what
// they wrote. At most once, after the slot is read: the memory of the output may still be theirs.
__device__ __forceinline__ void wait_for_stream() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The host writes a slot again and again; no cache's copy of it will do (ld.cv). Nor does the
// compiler move such a load behind wait_for_stream().
__device__ __forceinline__ int32_t read_slot(const int32_t* at) { return __ldcv(at); }
__device__ __forceinline__ int64_t read_slot(const int64_t* at) {
  return __ldcv(reinterpret_cast<const long long*>(at));
}

// A 16-byte load a thread, coalesced within a warp. The loads of the host's memory are what takes
// the time: about 1 us each way over PCIe.
template <typename In, typename Out>
__device__ __forceinline__ void move_vectors(unsigned block, const In* src, Out* __restrict__ dst,
                                             size_t count) {
  constexpr int kIds = sizeof(int4) / sizeof(In);
  constexpr int kPerStore = 16 / sizeof(Out) < kIds ? 16 / sizeof(Out) : kIds;
  using Store = Vec<Out, kPerStore>;
  const size_t vectors = count / kIds;
  const size_t i = static_cast<size_t>(block) * kThreads + threadIdx.x;
  // The last few ids fill no vector.
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

// For slices that do not start on 16 bytes.
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

// The first blocks move the ids of the slot, the others gather the tail.
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

// What every resolve() calls, straight from the driver: the runtime in front of it is so much more
// code and data to fetch, and they are in no cache by then.
struct LaunchConfig {  // the driver's CUlaunchConfig
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  cudaStream_t stream;
  const cudaLaunchAttribute* attributes;
  unsigned attribute_count;
};
struct Driver {
  int (*launch_kernel)(const LaunchConfig*, cudaFunction_t, void**, void**);
  int (*event_record)(cudaEvent_t, cudaStream_t);
  int (*stream_get_id)(cudaStream_t, unsigned long long*);
  int (*stream_is_capturing)(cudaStream_t, cudaStreamCaptureStatus*);
};

// --- device ------------------------------------------------------------------------------------

// Makes a device current for a scope; costs one cudaGetDevice where it already is.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) : index_(index) {
    if (cudaGetDevice(&previous_) == cudaSuccess && previous_ != index_) cudaSetDevice(index_);
  }
  ~CurrentDevice() {
    if (previous_ != index_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int index_;
  int previous_ = 0;
};

// Lets a thread query events and pin memory while some other thread captures a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

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
  explicit CudaDevice(int index) : index_(index), name_("cuda:" + std::to_string(index)) {
    CurrentDevice guard(index_);
    RelaxedCapture relaxed;
    PYSTAGE_CUDA(cudaFree(nullptr));  // makes the context
    PYSTAGE_CUDA(cudaDeviceGetAttribute(&can_map_, cudaDevAttrCanMapHostMemory, index_));
    int can_register = 0;
    PYSTAGE_CUDA(cudaDeviceGetAttribute(&can_register, cudaDevAttrHostRegisterSupported, index_));
    const char* disabled = std::getenv("PYSTAGE_DISABLE_PINNED");
    if (disabled && *disabled && *disabled != '0')
      why_pageable_ = "PYSTAGE_DISABLE_PINNED is set";
    else if (!can_register)
      // Under Confidential Computing the device cannot read the host's memory: what is called
      // pinned there is copied through a bounce buffer, synchronously.
      why_pageable_ =
          name_ + " does not support registering host memory (as under Confidential Computing)";
    find(driver_.launch_kernel, "cuLaunchKernelEx");
    find(driver_.event_record, "cuEventRecord");
    find(driver_.stream_get_id, "cuStreamGetId");
    find(driver_.stream_is_capturing, "cuStreamIsCapturing");
    // Loads the kernels now: with lazy loading the first launch would wait for a busy device.
    transfers_[0][0] = load(transfer_kernels<int32_t, int32_t>());
    transfers_[0][1] = load(transfer_kernels<int32_t, int64_t>());
    transfers_[1][0] = load(transfer_kernels<int64_t, int32_t>());
    transfers_[1][1] = load(transfer_kernels<int64_t, int64_t>());
    mixed_[0] = load(mixed_kernels<int32_t>());
    mixed_[1] = load(mixed_kernels<int64_t>());
    // What was compiled for an older device does not wait, whatever it runs on.
    int major = 0;
    PYSTAGE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_));
    cudaFuncAttributes compiled;
    PYSTAGE_CUDA(cudaFuncGetAttributes(&compiled, mixed_kernels<int32_t>()[0]));
    can_launch_early_ = major >= 9 && compiled.ptxVersion >= 90;
  }

  const std::string& name() const override { return name_; }

  HostMemory allocate(size_t bytes, std::string* why_pageable) override {
    CurrentDevice guard(index_);
    RelaxedCapture relaxed;
    std::string why = why_pageable_;
    void* host = nullptr;
    if (why.empty()) {
      const cudaError_t error =
          cudaHostAlloc(&host, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
      if (error == cudaSuccess) {
        void* device = nullptr;
        if (can_map_ && cudaHostGetDevicePointer(&device, host, 0) != cudaSuccess) {
          cudaGetLastError();
          device = nullptr;  // not for a kernel, then: the copy engine takes it
        }
        return {static_cast<char*>(host), static_cast<const char*>(device), bytes, true};
      }
      cudaGetLastError();
      // Out of lockable memory (memlock limit, WSL) or not allowed at all; a lost context is no
      // reason to go on.
      if (error != cudaErrorMemoryAllocation && error != cudaErrorNotSupported &&
          error != cudaErrorNotPermitted && error != cudaErrorOperatingSystem)
        raise_cuda(error, "cudaHostAlloc", name_);
      why = std::string("cudaHostAlloc of ") + std::to_string(bytes) +
            " bytes failed: " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")";
    }
    host = std::aligned_alloc(4096, bytes);
    if (!host)
      throw DeviceError("aligned_alloc of " + std::to_string(bytes) + " bytes failed [" + name_ +
                        "], after " + why);
    *why_pageable = why;
    return {static_cast<char*>(host), nullptr, bytes, false, true};
  }

  void free(const HostMemory& memory) noexcept override {
    if (!memory.pinned) return std::free(memory.host);
    CurrentDevice guard(index_);
    RelaxedCapture relaxed;
    // At exit the driver may be gone, and the memory with it. Nothing is left to do then.
    if (cudaFreeHost(memory.host) != cudaSuccess) cudaGetLastError();
  }

  void launch(const Transfer& t, StreamHandle stream) override {
    if (!t.count && !t.tail) return;
    auto* s = static_cast<cudaStream_t>(stream);
    if (t.kind == TransferKind::kCopyEngine) {
      if (t.tail || t.wire != t.out)
        throw DeviceError("a copy engine cannot gather, nor convert between int32 and int64 [" +
                          name_ + "]");
      PYSTAGE_CUDA(
          cudaMemcpyAsync(t.dst, t.src, t.count * size_of(t.wire), cudaMemcpyHostToDevice, s));
      return;
    }
    Grid grid = grid_for(t);
    const bool wide_in = t.wire == IntType::kInt64, wide_out = t.out == IntType::kInt64;
    const void* src = t.src_device;
    void* dst = t.dst;
    size_t count = t.count;
    if (!t.tail) {
      void* args[] = {&src, &dst, &count};
      return run(transfers_[wide_in][wide_out][grid.vectors], "transfer", grid.blocks, s,
                 t.src_is_complete, args);
    }
    if (!wide_out) throw DeviceError("a tail is written as int64 [" + name_ + "]");
    Tail tail{t.tail->relay,
              t.tail->indices,
              static_cast<int64_t>(t.tail->relay_size),
              t.tail->count,
              t.tail->relay_type == IntType::kInt64,
              t.tail->index_type == IntType::kInt64};
    void* args[] = {&src, &dst, &count, &grid.blocks, &tail};
    run(mixed_[wide_in][grid.vectors], "transfer_mixed",
        grid.blocks + blocks_for(tail.count, kThreads), s, t.src_is_complete, args);
  }

  FenceHandle create_fence() override {
    CurrentDevice guard(index_);
    RelaxedCapture relaxed;
    cudaEvent_t event = nullptr;
    PYSTAGE_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
  }
  void destroy_fence(FenceHandle fence) noexcept override {
    if (cudaEventDestroy(static_cast<cudaEvent_t>(fence)) != cudaSuccess)
      cudaGetLastError();  // as in free()
  }
  void record(FenceHandle fence, StreamHandle stream) override {
    PYSTAGE_DRIVER("cuEventRecord", driver().event_record(static_cast<cudaEvent_t>(fence),
                                                          static_cast<cudaStream_t>(stream)));
  }
  bool query(FenceHandle fence) override {
    RelaxedCapture relaxed;
    const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(fence));
    if (error == cudaErrorNotReady) {
      cudaGetLastError();  // not an error: leave none behind
      return false;
    }
    if (error != cudaSuccess) raise_cuda(error, "cudaEventQuery", name_);
    return true;
  }
  void synchronize(FenceHandle fence) override {
    PYSTAGE_CUDA(cudaEventSynchronize(static_cast<cudaEvent_t>(fence)));
  }
  void wait(StreamHandle stream, FenceHandle fence) override {
    PYSTAGE_CUDA(
        cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(fence), 0));
  }
  uint64_t stream_id(StreamHandle stream) override {
    unsigned long long id = 0;
    PYSTAGE_DRIVER("cuStreamGetId", driver().stream_get_id(static_cast<cudaStream_t>(stream), &id));
    return id;
  }
  bool capturing(StreamHandle stream) override {
    cudaStreamCaptureStatus status;
    PYSTAGE_DRIVER("cuStreamIsCapturing",
                   driver().stream_is_capturing(static_cast<cudaStream_t>(stream), &status));
    return status != cudaStreamCaptureStatusNone;
  }

  void* hold(StreamHandle stream) override {
    CurrentDevice guard(index_);
    auto* hold = new Hold;
    const cudaError_t error = cudaLaunchHostFunc(
        static_cast<cudaStream_t>(stream),
        [](void* p) {
          auto* h = static_cast<Hold*>(p);
          {
            std::unique_lock<std::mutex> lock(h->mutex);
            h->changed.wait_for(lock, std::chrono::seconds(kHoldLimitSeconds),
                                [&] { return h->released; });
          }
          drop(h);
        },
        hold);
    if (error != cudaSuccess) {
      delete hold;
      raise_cuda(error, "cudaLaunchHostFunc", name_);
    }
    return hold;
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
  using Kernels = std::array<cudaFunction_t, 2>;

  template <typename Function>
  void find(Function& function, const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    PYSTAGE_CUDA(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
      throw DeviceError(std::string("the driver has no ") + name + " [" + name_ + "]");
    function = reinterpret_cast<Function>(entry);
  }

  // For calls whose caller has made this device current. In a thread without a CUDA call so far the
  // runtime would make the context current too; the driver does not.
  const Driver& driver() {
    thread_local bool has_context = false;
    if (!has_context) PYSTAGE_CUDA(cudaSetDevice(index_));
    has_context = true;
    return driver_;
  }

  Kernels load(const Addresses& addresses) {
    Kernels kernels;
    for (size_t i = 0; i < kernels.size(); ++i)
      PYSTAGE_CUDA(cudaGetFuncBySymbol(&kernels[i], addresses[i]));
    return kernels;
  }

  // early: the kernel may start, and read its slot, while the kernel before it on the stream still
  // ends (a programmatic dependent launch); it waits for that one before it writes. This hides 1 us
  // of the way to the host. After anything but a kernel it changes nothing.
  void run(cudaFunction_t kernel, const char* name, unsigned blocks, cudaStream_t stream,
           bool early, void** args) {
    static const cudaLaunchAttribute kEarly = [] {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      return attribute;
    }();
    const LaunchConfig config{
        {blocks, 1, 1}, {kThreads, 1, 1}, 0, stream, &kEarly, early && can_launch_early_ ? 1u : 0u};
    PYSTAGE_DRIVER((std::string("cuLaunchKernelEx(") + name + ")").c_str(),
                   driver().launch_kernel(&config, kernel, args, nullptr));
  }

  const int index_;
  const std::string name_;
  std::string why_pageable_;
  int can_map_ = 0;
  Driver driver_;
  bool can_launch_early_ = false;
  Kernels transfers_[2][2];  // by int64 wire, int64 output
  Kernels mixed_[2];         // by int64 wire
};

}  // namespace

Device& cuda_device(int index) {
  static std::mutex mutex;
  static auto* devices = new std::vector<Device*>;  // never destroyed: pools outlive statics
  std::lock_guard<std::mutex> guard(mutex);
  if (static_cast<size_t>(index) >= devices->size()) devices->resize(index + 1, nullptr);
  Device*& device = (*devices)[index];
  if (!device) device = new CudaDevice(index);
  return *device;
}

CudaBuild cuda_build() { return {CUDART_VERSION, PYSTAGE_CUDA_ARCHS}; }

}  // namespace pystage

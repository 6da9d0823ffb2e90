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

// --- kernels -----------------------------------------------------------------------------------

constexpr int kThreads = 256;

template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Vec {
  T v[N];
};

// 16-byte loads from the slot, coalesced within a warp. The loads of the host's memory are what
// takes the time (about 1 us each way over PCIe), so a thread issues kUnroll of them before it
// uses the first.
template <typename In, typename Out, int kUnroll>
__device__ __forceinline__ void move_vectors(unsigned block, const In* __restrict__ src,
                                             Out* __restrict__ dst, size_t count) {
  constexpr int kIds = 16 / sizeof(In);
  using Load = Vec<In, kIds>;
  constexpr int kPerStore = 16 / sizeof(Out) < kIds ? 16 / sizeof(Out) : kIds;
  using Store = Vec<Out, kPerStore>;
  const size_t vectors = count / kIds;
  const size_t first = static_cast<size_t>(block) * (kThreads * kUnroll) + threadIdx.x;
  Load in[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t i = first + static_cast<size_t>(u) * kThreads;
    if (i < vectors) in[u] = reinterpret_cast<const Load*>(src)[i];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t i = first + static_cast<size_t>(u) * kThreads;
    if (i < vectors) {
#pragma unroll
      for (int s = 0; s < kIds / kPerStore; ++s) {
        Store out;
#pragma unroll
        for (int k = 0; k < kPerStore; ++k) out.v[k] = static_cast<Out>(in[u].v[s * kPerStore + k]);
        reinterpret_cast<Store*>(dst)[i * (kIds / kPerStore) + s] = out;
      }
    }
  }
  // The last few ids, which fill no vector.
  const size_t tail = vectors * kIds + threadIdx.x;
  if (block == 0 && tail < count) dst[tail] = static_cast<Out>(src[tail]);
}

// For slices that do not start on 16 bytes.
template <typename In, typename Out>
__device__ __forceinline__ void move_single(unsigned block, const In* __restrict__ src,
                                            Out* __restrict__ dst, size_t count) {
  const size_t i = static_cast<size_t>(block) * kThreads + threadIdx.x;
  if (i < count) dst[i] = static_cast<Out>(src[i]);
}

template <typename In, typename Out, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    transfer_vectors(const In* __restrict__ src, Out* __restrict__ dst, size_t count) {
  move_vectors<In, Out, kUnroll>(blockIdx.x, src, dst, count);
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    transfer_single(const In* __restrict__ src, Out* __restrict__ dst, size_t count) {
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

// The first blocks move the ids of the slot, the others gather the tail. kUnroll 0: one id a
// thread, for slots or outputs that do not start on 16 bytes.
template <typename In, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    transfer_mixed(const In* __restrict__ src, int64_t* __restrict__ dst, size_t count,
                   unsigned slot_blocks, Tail tail) {
  if (blockIdx.x < slot_blocks) {
    if constexpr (kUnroll == 0)
      move_single(blockIdx.x, src, dst, count);
    else
      move_vectors<In, int64_t, kUnroll>(blockIdx.x, src, dst, count);
    return;
  }
  const size_t i = static_cast<size_t>(blockIdx.x - slot_blocks) * kThreads + threadIdx.x;
  if (i >= tail.count) return;
  int64_t index = read_int(tail.indices, tail.wide_indices, i);
  assert(-tail.relay_size <= index && index < tail.relay_size && "index out of bounds");
  if (index < 0) index += tail.relay_size;
  dst[count + i] = read_int(tail.relay, tail.wide_relay, static_cast<size_t>(index));
}

// Up to 256 Ki ids one load a thread, so that the loads spread over more multiprocessors. A guess
// from the sizes where the time is latency; the crossing was not measured.
constexpr size_t kFewVectors = size_t{64} << 10;

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

unsigned blocks_for(size_t work, size_t per_block) {
  return static_cast<unsigned>(std::max<size_t>(1, (work + per_block - 1) / per_block));
}

template <typename In, typename Out>
cudaError_t launch_transfer(const void* src, void* dst, size_t count, cudaStream_t stream) {
  void* args[] = {&src, &dst, &count};
  constexpr size_t kIds = 16 / sizeof(In);
  if (!aligned16(src) || !aligned16(dst))
    return cudaLaunchKernel(reinterpret_cast<const void*>(transfer_single<In, Out>),
                            dim3(blocks_for(count, kThreads)), dim3(kThreads), args, 0, stream);
  const size_t vectors = count / kIds;
  if (vectors <= kFewVectors)
    return cudaLaunchKernel(reinterpret_cast<const void*>(transfer_vectors<In, Out, 1>),
                            dim3(blocks_for(vectors, kThreads)), dim3(kThreads), args, 0, stream);
  return cudaLaunchKernel(reinterpret_cast<const void*>(transfer_vectors<In, Out, 4>),
                          dim3(blocks_for(vectors, size_t{kThreads} * 4)), dim3(kThreads), args, 0,
                          stream);
}

template <typename In>
cudaError_t launch_mixed(const void* src, void* dst, size_t count, const RelayTail& relay_tail,
                         cudaStream_t stream) {
  const size_t vectors = count / (16 / sizeof(In));
  const void* kernel;
  unsigned slot_blocks;
  if (!aligned16(src) || !aligned16(dst)) {
    kernel = reinterpret_cast<const void*>(transfer_mixed<In, 0>);
    slot_blocks = blocks_for(count, kThreads);
  } else if (vectors <= kFewVectors) {
    kernel = reinterpret_cast<const void*>(transfer_mixed<In, 1>);
    slot_blocks = blocks_for(vectors, kThreads);
  } else {
    kernel = reinterpret_cast<const void*>(transfer_mixed<In, 4>);
    slot_blocks = blocks_for(vectors, size_t{kThreads} * 4);
  }
  if (!count) slot_blocks = 0;
  Tail tail{relay_tail.relay,
            relay_tail.indices,
            static_cast<int64_t>(relay_tail.relay_size),
            relay_tail.count,
            relay_tail.relay_type == IntType::kInt64,
            relay_tail.index_type == IntType::kInt64};
  void* args[] = {&src, &dst, &count, &slot_blocks, &tail};
  return cudaLaunchKernel(kernel, dim3(slot_blocks + blocks_for(tail.count, kThreads)),
                          dim3(kThreads), args, 0, stream);
}

template <typename In, typename Out>
void load_kernels(std::vector<const void*>& kernels) {
  kernels.push_back(reinterpret_cast<const void*>(transfer_vectors<In, Out, 1>));
  kernels.push_back(reinterpret_cast<const void*>(transfer_vectors<In, Out, 4>));
  kernels.push_back(reinterpret_cast<const void*>(transfer_single<In, Out>));
}

template <typename In>
void load_mixed_kernels(std::vector<const void*>& kernels) {
  kernels.push_back(reinterpret_cast<const void*>(transfer_mixed<In, 0>));
  kernels.push_back(reinterpret_cast<const void*>(transfer_mixed<In, 1>));
  kernels.push_back(reinterpret_cast<const void*>(transfer_mixed<In, 4>));
}

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
    // Loads the kernels now: with lazy loading the first launch would wait for a busy device.
    std::vector<const void*> kernels;
    load_kernels<int32_t, int32_t>(kernels);
    load_kernels<int32_t, int64_t>(kernels);
    load_kernels<int64_t, int32_t>(kernels);
    load_kernels<int64_t, int64_t>(kernels);
    load_mixed_kernels<int32_t>(kernels);
    load_mixed_kernels<int64_t>(kernels);
    for (const void* kernel : kernels) {
      cudaFuncAttributes attributes;
      PYSTAGE_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    }
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
    CurrentDevice guard(index_);
    auto* s = static_cast<cudaStream_t>(stream);
    if (t.tail) return launch_with_tail(t, s);
    if (t.kind == TransferKind::kCopyEngine) {
      if (t.wire != t.out)
        throw DeviceError("a copy engine cannot convert between int32 and int64 [" + name_ + "]");
      PYSTAGE_CUDA(
          cudaMemcpyAsync(t.dst, t.src, t.count * size_of(t.wire), cudaMemcpyHostToDevice, s));
      return;
    }
    const bool wide_in = t.wire == IntType::kInt64, wide_out = t.out == IntType::kInt64;
    cudaError_t error;
    if (wide_in)
      error = wide_out ? launch_transfer<int64_t, int64_t>(t.src_device, t.dst, t.count, s)
                       : launch_transfer<int64_t, int32_t>(t.src_device, t.dst, t.count, s);
    else
      error = wide_out ? launch_transfer<int32_t, int64_t>(t.src_device, t.dst, t.count, s)
                       : launch_transfer<int32_t, int32_t>(t.src_device, t.dst, t.count, s);
    if (error != cudaSuccess) raise_cuda(error, "cudaLaunchKernel(transfer)", name_);
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
    PYSTAGE_CUDA(
        cudaEventRecord(static_cast<cudaEvent_t>(fence), static_cast<cudaStream_t>(stream)));
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
    PYSTAGE_CUDA(cudaStreamGetId(static_cast<cudaStream_t>(stream), &id));
    return id;
  }
  bool capturing(StreamHandle stream) override {
    cudaStreamCaptureStatus status;
    PYSTAGE_CUDA(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
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
  void launch_with_tail(const Transfer& t, cudaStream_t stream) {
    if (t.kind != TransferKind::kKernel || t.out != IntType::kInt64)
      throw DeviceError("a tail is written by a kernel, as int64 [" + name_ + "]");
    const cudaError_t error =
        t.wire == IntType::kInt64
            ? launch_mixed<int64_t>(t.src_device, t.dst, t.count, *t.tail, stream)
            : launch_mixed<int32_t>(t.src_device, t.dst, t.count, *t.tail, stream);
    if (error != cudaSuccess) raise_cuda(error, "cudaLaunchKernel(transfer_mixed)", name_);
  }

  const int index_;
  const std::string name_;
  std::string why_pageable_;
  int can_map_ = 0;
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

// What the pool needs from a device: host memory, transfers on streams, fences.
//
// Two implementations: cuda_device.cu (mapped pinned memory, CUDA streams and events) and
// host_device.cpp (ordered queues on worker threads). Every call may be made from any thread,
// with any device current there, or none: a call does not depend on the thread's current CUDA
// context, and leaves it as it was. A CUDA default stream has the same handle on all devices; here
// the handle means the default stream of this device.
// A call that fails throws DeviceError, which names the call. The noexcept calls give resources
// back: if the device is lost, or the driver has shut down at exit, the resources count as gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"

namespace pystage {

// Width of an id, in a slot (the "wire") and in the output. The value is its size in bytes.
enum class IntType : uint8_t { kInt32 = 4, kInt64 = 8 };
inline constexpr size_t size_of(IntType type) { return static_cast<size_t>(type); }

using StreamHandle = void*;  // cudaStream_t, or HostStream*
using FenceHandle = void*;   // cudaEvent_t, or HostFence*

enum class TransferKind : uint8_t {
  kKernel,      // a kernel reads the mapped slot and writes the output: no copy engine
  kCopyEngine,  // cudaMemcpyAsync; wire and output must have the same width
};

// Memory the host writes and the device reads.
struct HostMemory {
  char* host = nullptr;
  const char* device = nullptr;  // the address that a kernel reads; null if it cannot
  size_t bytes = 0;
  bool pinned = false;
  bool fallback = false;  // pageable because the memory could not be pinned
};

// Ids that are already on the device. A transfer writes them right after its own ids:
// dst[count + i] = relay[indices[i]]. A negative index counts from the end, as in torch.
struct RelayTail {
  const void* relay = nullptr;
  IntType relay_type = IntType::kInt64;
  size_t relay_size = 0;
  const void* indices = nullptr;
  IntType index_type = IntType::kInt64;
  size_t count = 0;  // indices

  // Owners of the memory that is read. They are kept at least until the launch, and on the host
  // device until the transfer has run.
  std::vector<std::shared_ptr<void>> owners;

  struct BadIndex {
    size_t position;
    int64_t value;
  };
  // The first index outside the relay. The host device sets it when the transfer runs, and writes
  // -1 as the id. On CUDA such an index fails a device-side assertion, as in torch.
  std::optional<BadIndex> bad;
};

struct Transfer {
  const void* src = nullptr;         // host address
  const void* src_device = nullptr;  // the same memory, as a kernel addresses it
  IntType wire = IntType::kInt32;
  void* dst = nullptr;
  IntType out = IntType::kInt64;
  size_t count = 0;  // ids
  // True if no pending work fills src. Then the transfer may read src before earlier work on its
  // stream has finished.
  bool src_is_complete = false;
  TransferKind kind = TransferKind::kKernel;
  // Owners of dst, and of a src that is not a slot. The host device keeps them until the transfer
  // has run. CUDA memory needs no owner, because its allocator frees in stream order.
  std::shared_ptr<void> dst_owner;
  std::shared_ptr<void> src_owner;
  std::shared_ptr<RelayTail> tail;  // or null; only for a kernel with int64 output
};

// One row of an int32 table: the first `prefix_count` entries of `prefix`, then `count` entries of
// the array `rest` that all rows share, beginning at `rest_at`.
struct RowWrite {
  const int64_t* prefix;
  int32_t row;
  int32_t prefix_count;
  int32_t rest_at;
  int32_t count;
};

// The destination of one part of a buffer of values; `first` and `count` are in units of
// kValuesAlignment bytes.
struct ValuesPiece {
  void* dst;
  uint32_t first;
  uint32_t count;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const std::string& name() const = 0;  // "cuda:0", "cpu"

  // Allocates pinned, mapped memory. If that is not possible, allocates pageable memory
  // (pinned == false) and puts the reason in *why_pageable. The memory of the host device is never
  // pinned, and no reason is given.
  virtual HostMemory allocate(size_t bytes, std::string* why_pageable) = 0;
  virtual void free(const HostMemory& memory) noexcept = 0;
  // False if kernels cannot read pinned memory, or may read stale bytes from it, whoever pinned it.
  // The copy engine does the transfers then.
  virtual bool kernels_read_pinned() { return true; }

  virtual void launch(const Transfer& transfer, StreamHandle stream) = 0;

  // Values and rows travel as a kernel's parameters: no host memory has to outlive the call, and
  // no copy engine is involved. most_values() and most_rows() return how many bytes (including 16
  // for each piece) and how many rows fit into one launch.
  virtual size_t most_values() { return 0; }
  virtual size_t most_rows() { return 0; }
  // `bytes` must be a multiple of kValuesAlignment, and so must the destination of each piece.
  virtual void launch_values(const void* values, size_t bytes, const ValuesPiece* pieces,
                             size_t count, StreamHandle stream);
  virtual void launch_rows(int32_t* table, size_t row_stride, const RowWrite* rows, size_t count,
                           const int64_t* rest, StreamHandle stream);
  static constexpr size_t kValuesAlignment = 16;

  // A fence is done when all work that was on its stream at record() is done. Recording it again
  // replaces the earlier point.
  virtual FenceHandle create_fence() = 0;
  virtual void destroy_fence(FenceHandle fence) noexcept = 0;
  virtual void record(FenceHandle fence, StreamHandle stream) = 0;
  virtual bool query(FenceHandle fence) = 0;
  virtual void synchronize(FenceHandle fence) = 0;                // the calling thread waits
  virtual void wait(StreamHandle stream, FenceHandle fence) = 0;  // the stream waits

  // Identifies a stream. A handle does not: it may be reused after its stream was destroyed, and
  // CUDA's per-thread default stream has the same handle in all threads.
  virtual uint64_t stream_id(StreamHandle stream) = 0;

  // False after an error that ended the device's context for this process. Then every call fails,
  // and memory is not freed until the process ends.
  virtual bool usable() noexcept { return true; }

  // True while the stream captures its work into a graph instead of running it.
  virtual bool capturing(StreamHandle stream) = 0;

  // For tests: keeps all work that is put on the stream from now on pending until release(), but no
  // longer than kHoldLimitSeconds, so that a failing test ends.
  virtual void* hold(StreamHandle stream) = 0;
  virtual void release(void* hold) noexcept = 0;
  static constexpr int kHoldLimitSeconds = 60;
};

inline void Device::launch_values(const void*, size_t, const ValuesPiece*, size_t, StreamHandle) {
  throw DeviceError("values cannot travel as parameters [" + name() + "]");
}
inline void Device::launch_rows(int32_t*, size_t, const RowWrite*, size_t, const int64_t*,
                                StreamHandle) {
  throw DeviceError("rows cannot travel as parameters [" + name() + "]");
}

}  // namespace pystage

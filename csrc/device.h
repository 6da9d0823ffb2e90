// What the pool needs of a device: host memory, transfers on streams, fences.
//
// Two implementations: cuda_device.cu (mapped pinned memory, CUDA streams and events) and
// host_device.cpp (ordered queues on worker threads). Every call may be made from any thread,
// whatever device is current there, if any: what CUDA has current in a thread is neither needed nor
// changed. A CUDA default stream has one handle on all devices; here it is the one of this device.
// A call that fails throws DeviceError, which names it. The noexcept ones give something back:
// they take it as gone where the device is lost, or the driver at exit.
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
  const char* device = nullptr;  // the address a kernel reads; null where it cannot
  size_t bytes = 0;
  bool pinned = false;
  bool fallback = false;  // pageable because pinned memory could not be had
};

// Ids that are on the device already, written right behind those of a transfer:
// dst[count + i] = relay[indices[i]]. A negative index counts from the end, as in torch.
struct RelayTail {
  const void* relay = nullptr;
  IntType relay_type = IntType::kInt64;
  size_t relay_size = 0;
  const void* indices = nullptr;
  IntType index_type = IntType::kInt64;
  size_t count = 0;  // indices

  // Owners of what is read: until the launch at least, and on the host device until it ran.
  std::vector<std::shared_ptr<void>> owners;

  struct BadIndex {
    size_t position;
    int64_t value;
  };
  // The first index outside the relay, set by the host device as the transfer runs; its id is then
  // -1. On CUDA such an index is a device-side assertion, as in torch.
  std::optional<BadIndex> bad;
};

struct Transfer {
  const void* src = nullptr;         // host address
  const void* src_device = nullptr;  // the same as a kernel sees it
  IntType wire = IntType::kInt32;
  void* dst = nullptr;
  IntType out = IntType::kInt64;
  size_t count = 0;  // ids
  // No work of a stream still has to fill src: it may be read before the stream comes to this.
  bool src_is_complete = false;
  TransferKind kind = TransferKind::kKernel;
  // Owners of dst, and of a src that is no slot. The host device keeps them until the transfer ran;
  // CUDA memory needs no owner, because its allocator frees in stream order.
  std::shared_ptr<void> dst_owner;
  std::shared_ptr<void> src_owner;
  std::shared_ptr<RelayTail> tail;  // or null; by a kernel only, and to int64 only
};

// One row of an int32 table: `prefix_count` entries of `prefix`, then `count` of those that all
// rows share, from `rest_at` on.
struct RowWrite {
  const int64_t* prefix;
  int32_t row;
  int32_t prefix_count;
  int32_t rest_at;
  int32_t count;
};

// Where a part of some values goes, in units of kValuesAlignment bytes.
struct ValuesPiece {
  void* dst;
  uint32_t first;
  uint32_t count;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const std::string& name() const = 0;  // "cuda:0", "cpu"

  // Pinned, mapped memory; pageable (pinned == false) where that cannot be had, with the reason in
  // *why_pageable. The host device's memory is never pinned and needs no reason.
  virtual HostMemory allocate(size_t bytes, std::string* why_pageable) = 0;
  virtual void free(const HostMemory& memory) noexcept = 0;
  // False where a kernel cannot read pinned memory, or may read stale bytes of it, whoever pinned
  // it: the copy engine takes it then.
  virtual bool kernels_read_pinned() { return true; }

  virtual void launch(const Transfer& transfer, StreamHandle stream) = 0;

  // Values and rows travel as a kernel's parameters: no memory of the host has to outlive the call,
  // and no copy engine is in the way. So many bytes, 16 for each piece included, and so many rows
  // fit into one launch.
  virtual size_t most_values() { return 0; }
  virtual size_t most_rows() { return 0; }
  // `bytes` is a multiple of kValuesAlignment, and so is the address that a piece goes to.
  virtual void launch_values(const void* values, size_t bytes, const ValuesPiece* pieces,
                             size_t count, StreamHandle stream);
  virtual void launch_rows(int32_t* table, size_t row_stride, const RowWrite* rows, size_t count,
                           const int64_t* rest, StreamHandle stream);
  static constexpr size_t kValuesAlignment = 16;

  // A fence is done once all work that its stream held at record() is done. Recording again
  // forgets the earlier point.
  virtual FenceHandle create_fence() = 0;
  virtual void destroy_fence(FenceHandle fence) noexcept = 0;
  virtual void record(FenceHandle fence, StreamHandle stream) = 0;
  virtual bool query(FenceHandle fence) = 0;
  virtual void synchronize(FenceHandle fence) = 0;                // the calling thread waits
  virtual void wait(StreamHandle stream, FenceHandle fence) = 0;  // the stream waits

  // Tells streams apart, in a way that a handle cannot: a handle may be used again after its stream
  // was destroyed, and CUDA's per-thread default stream has one for all threads.
  virtual uint64_t stream_id(StreamHandle stream) = 0;

  // False once an error has ended the device's context for this process: every call fails then, and
  // memory stays as it is until the process ends.
  virtual bool usable() noexcept { return true; }

  // True while the stream records a graph instead of running.
  virtual bool capturing(StreamHandle stream) = 0;

  // For tests: keep everything put on the stream from now on pending until release(). Nothing
  // stays held longer than kHoldLimitSeconds, so that a failing test ends.
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

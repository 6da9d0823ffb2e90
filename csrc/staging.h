// The pool for torch's devices, streams and tensors. Does not depend on Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "device.h"
#include "gather.h"
#include "output_memory.h"
#include "pool.h"

namespace pystage {

struct StagingOptions {
  PoolOptions pool;
  bool eager = false;        // launch in stage(), on the pool's own stream
  bool copy_engine = false;  // cudaMemcpyAsync instead of the kernel
  bool narrow_wire = true;   // int32 on the wire if the ids fit
};

// Makes a device current for a scope, in CUDA and not only in torch, which may defer the change of
// device until it needs one. If the device is already current, this costs one query; c10's guards
// make three.
class DeviceScope {
 public:
  explicit DeviceScope(c10::Device device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  std::optional<c10::Device> previous_;
};

// Throws a TypeError unless the tensor has memory that can be read or written at its data pointer.
void check_memory(const at::Tensor& tensor, const std::string& name);

// The Device that implements a torch device. Throws DeviceError if there is none.
Device& backend_of(c10::Device device);
StreamHandle current_stream_of(c10::Device device);

// A new fence that does not belong to a slot.
std::shared_ptr<void> make_fence(Device& device);

class StagedTokens;

class StagingPool {
 public:
  StagingPool(c10::Device device, const StagingOptions& options);
  ~StagingPool();
  StagingPool(const StagingPool&) = delete;
  StagingPool& operator=(const StagingPool&) = delete;

  Pool& core() const { return *core_; }
  c10::Device device() const { return device_; }
  const StagingOptions& options() const { return options_; }

  StreamHandle current_stream() const;
  StreamHandle eager_stream() const;
  // A new tensor [count] for work on `stream`, which must be current. Small tensors are cut from
  // blocks.
  at::Tensor output(at::ScalarType dtype, size_t count, StreamHandle stream) {
    return outputs_.allocate(dtype, count, stream);
  }
  // Ends the pool. Staged tokens and tensors stay valid. `poll` is as for Pool::close().
  void close(const Poll& poll = {});
  // Whether torch's allocators can free memory of the device. In a forked child, and after an error
  // that ended the context, they throw instead, and would do so in destructors.
  bool can_free() const noexcept;

  // The GIL guards all of these.
  bool warned_pageable = false;
  bool may_have_news = false;  // it may have grown or fallen back, which must be logged
  uint64_t logged_allocations = 0, logged_fallbacks = 0;
  bool closing = false;  // close() was called, so the end of a lease may free pinned memory

 private:
  friend class StagedTokens;
  c10::Device device_;
  StagingOptions options_;
  Device* backend_;
  std::shared_ptr<Pool> core_;
  OutputMemory outputs_;
  std::optional<c10::Stream> eager_stream_;
  const uint64_t fork_generation_ = fork_generation();
};

// A tensor, and the fence after the work that fills it (null: nothing to wait for).
struct Resolved {
  Resolved() = default;
  Resolved(at::Tensor ids, FenceHandle fence = nullptr) : ids(std::move(ids)), fence(fence) {}

  at::Tensor ids;
  FenceHandle fence = nullptr;
  std::shared_ptr<void> fence_owner;  // if the fence does not belong to a slot
  // The tail that was gathered after the ids. Its `bad` may be read once the fence is done.
  std::shared_ptr<RelayTail> tail;
};

// Gathers relay[indices] as int64 on the current stream, into `out` if given.
Resolved gather_relay(const at::Tensor& relay, const at::Tensor& indices,
                      const std::optional<at::Tensor>& out);

// Owns a tensor. If torch's allocators would throw, its destructor leaks the tensor and does not
// call them.
class OwnedIds {
 public:
  OwnedIds(std::shared_ptr<StagingPool> pool, at::Tensor ids)
      : pool_(std::move(pool)), ids_(std::move(ids)) {}
  ~OwnedIds();
  OwnedIds(const OwnedIds&) = delete;
  OwnedIds& operator=(const OwnedIds&) = delete;

  bool defined() const { return ids_.defined(); }
  const at::Tensor& operator*() const { return ids_; }
  const at::Tensor* operator->() const { return &ids_; }
  at::Tensor take() { return std::exchange(ids_, at::Tensor()); }

 private:
  std::shared_ptr<StagingPool> pool_;
  at::Tensor ids_;
};

// The device memory that an eager transfer fills. resolve() hands it out, once.
struct EagerIds {
  EagerIds(std::shared_ptr<StagingPool> pool, at::Tensor ids, FenceHandle fence)
      : ids(std::move(pool), std::move(ids)), fence(fence) {}
  std::mutex mutex;  // resolve() runs without the GIL
  OwnedIds ids;
  const FenceHandle fence;  // belongs to the slot
};

// Ids in a slot or in a part of a slot. Copies share the lease.
class StagedTokens {
 public:
  StagedTokens(std::shared_ptr<StagingPool> pool, std::shared_ptr<Lease> lease, IntType wire,
               size_t count, bool fits_int32)
      : pool_(std::move(pool)),
        lease_(std::move(lease)),
        wire_(wire),
        count_(count),
        fits_int32_(fits_int32) {}
  // For ids that got no slot: they are in memory from torch's allocator.
  StagedTokens(std::shared_ptr<StagingPool> pool, at::Tensor fallback, bool fits_int32);

  size_t count() const { return count_; }
  IntType wire() const { return wire_; }
  bool is_pinned() const;
  StagingPool& pool() const { return *pool_; }
  // Whether the destructor may call the device, because it frees torch's memory or the memory of a
  // pool that is closing.
  bool end_calls_device() const { return pool_->closing || fallback_ || eager_; }

  StagedTokens slice(size_t start, size_t stop) const;
  // A copy of the ids, as an int64 CPU tensor.
  at::Tensor cpu() const;
  // Launches the transfer on the pool's stream. It fills device memory that resolve() hands out.
  void start_eager();
  // Returns the ids on the device, ordered on the current stream: in `out` if given, else in a new
  // tensor of `dtype`. Does not wait, except for ids that got no slot, if `blocking`: these have no
  // fence.
  Resolved resolve(const std::optional<at::Tensor>& out, at::ScalarType dtype, bool blocking);
  // Like resolve(), but appends relay[indices] to the ids. The output is int64.
  Resolved resolve_mixed(const at::Tensor& relay, const at::Tensor& indices,
                         const std::optional<at::Tensor>& out);

 private:
  // The current stream. Throws CaptureError if it captures a graph.
  StreamHandle resolving_stream() const;
  // Whether a kernel (or the host device) reads the slot.
  bool by_kernel() const;
  FenceHandle transfer_to(const at::Tensor& out, StreamHandle stream,
                          const std::shared_ptr<RelayTail>& tail = nullptr);
  at::Tensor fallback_ids() const;
  Resolved resolve_fallback(const at::Tensor& ids, StreamHandle stream, bool blocking);
  // The eager ids, ordered on `stream`. Undefined if there are none, or if they were handed out.
  at::Tensor take_eager(StreamHandle stream);

  std::shared_ptr<StagingPool> pool_;
  std::shared_ptr<Lease> lease_;
  IntType wire_;
  size_t offset_ = 0;
  size_t count_;
  bool fits_int32_;
  std::shared_ptr<OwnedIds> fallback_;  // used instead of the lease
  std::shared_ptr<EagerIds> eager_;
};

// Memory for ids that got no slot: pinned by torch if possible, else pageable.
at::Tensor fallback_memory(c10::Device device, size_t count);

// The op: copies the ids of a CPU or device tensor to `out`, which is int64 or int32.
void transfer_tensor(const at::Tensor& wire, const at::Tensor& out);

}  // namespace pystage

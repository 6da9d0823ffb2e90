#include "staging.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>

#include "host_device.h"
#ifdef PYSTAGE_WITH_CUDA
#include "cuda_device.h"
#endif

namespace pystage {

Device& backend_of(c10::Device device) {
  if (device.is_cpu()) return host_device();
#ifdef PYSTAGE_WITH_CUDA
  if (device.is_cuda()) return cuda_device(device.index());
#endif
  throw DeviceError("no pystage device for " + device.str() +
                    (device.is_cuda() ? ": this build has no CUDA code; rebuild with "
                                        "PYSTAGE_CUDA=1, or use device=\"cpu\""
                                      : ": use \"cuda:N\" or \"cpu\""));
}

StreamHandle current_stream_of(c10::Device device) {
  if (device.is_cpu()) return host_current_stream();
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

namespace {

at::ScalarType scalar_type(IntType type) { return type == IntType::kInt32 ? at::kInt : at::kLong; }

// Messages are built from strings, not with a stream: if the extension is linked with its own C++
// library, a stream formats numbers with the locale facets of torch's library, and crashes.
std::string shape_of(const at::Tensor& tensor) {
  std::string text = "[";
  for (const int64_t size : tensor.sizes())
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

IntType int_type(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kLong || dtype == at::kInt,
                   std::string("token ids must be int64 or int32, not ") + c10::toString(dtype));
  return dtype == at::kInt ? IntType::kInt32 : IntType::kInt64;
}

void check_out(const at::Tensor& out, c10::Device device, size_t count) {
  int_type(out.scalar_type());
  TORCH_CHECK_VALUE(out.dim() == 1 && out.size(0) == static_cast<int64_t>(count),
                    "out must have shape [" + std::to_string(count) + "], not " + shape_of(out));
  TORCH_CHECK_VALUE(out.device() == device, "out is on " + out.device().str() +
                                                ", the ids are staged for " + device.str() +
                                                ": use a pool of that device");
  check_memory(out, "out");
  TORCH_CHECK_VALUE(out.is_contiguous(), "out must be contiguous");
  TORCH_CHECK_VALUE(!out.is_neg(),
                    "out is a lazily negated view, which would negate the ids that "
                    "are written to it: pass the tensor that it is a view of");
}

// The tensor's values in memory, with a lazy negation applied.
at::Tensor plain(const at::Tensor& tensor, const char* name) {
  check_memory(tensor, name);
  return tensor.resolve_neg();
}

// Owns the storage, not the tensor, because a worker thread drops the owner. Destroying a tensor
// may need the GIL, which a thread cannot get while the interpreter shuts down.
std::shared_ptr<void> owner_of(const at::Tensor& tensor) {
  return std::make_shared<c10::Storage>(tensor.storage());
}

// Keeps another stream's memory allocated until the current stream has finished with it.
void record_on_current_stream(const at::Tensor& tensor) {
  const c10::Device device = tensor.device();
  if (!device.is_cuda()) return;
  // GCOV_EXCL_START: streams of CUDA
  const c10::impl::VirtualGuardImpl impl(device.type());
  impl.recordDataPtrOnStream(tensor.storage().data_ptr(), impl.getStream(device));
  // GCOV_EXCL_STOP
}

// The RelayTail that gathers relay[indices] on the current stream of `device`.
std::shared_ptr<RelayTail> make_tail(const at::Tensor& relay, const at::Tensor& indices,
                                     c10::Device device) {
  auto tail = std::make_shared<RelayTail>();
  auto check = [&](const char* name, const at::Tensor& tensor) {
    const at::ScalarType dtype = tensor.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kLong || dtype == at::kInt,
                     std::string(name) + " is int64 or int32, not " + c10::toString(dtype));
    TORCH_CHECK_VALUE(tensor.dim() == 1,
                      std::string(name) + " must be 1-D, not " + shape_of(tensor));
    TORCH_CHECK_VALUE(
        tensor.device() == device,
        std::string(name) + " is on " + tensor.device().str() + ", the ids go to " + device.str());
  };
  check("relay", relay);
  check("indices", indices);
  TORCH_CHECK_VALUE(relay.is_contiguous(), "relay must be contiguous");
  const at::Tensor source = plain(relay, "relay");
  const at::Tensor packed = plain(indices, "indices").contiguous();
  tail->relay = source.const_data_ptr();
  tail->relay_type = int_type(source.scalar_type());
  tail->relay_size = static_cast<size_t>(source.numel());
  tail->indices = packed.const_data_ptr();
  tail->index_type = int_type(packed.scalar_type());
  tail->count = static_cast<size_t>(packed.numel());
  // Until the launch, nothing else may get the memory of these two tensors, above all the output.
  tail->owners.push_back(owner_of(packed));
  tail->owners.push_back(owner_of(source));
  record_on_current_stream(relay);
  record_on_current_stream(indices);
  return tail;
}

// Autograd compares the version, to find a tensor that was changed after the forward used it.
void count_write(const at::Tensor& out) {
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
}

void check_int64(const at::Tensor& out) {
  TORCH_CHECK_TYPE(out.scalar_type() == at::kLong,
                   std::string("out must be int64, not ") + c10::toString(out.scalar_type()));
}

void check_apart(const at::Tensor& out, const at::Tensor& relay, const at::Tensor& indices) {
  if (!indices.numel()) return;  // nothing is read
  auto check = [&out](const at::Tensor& read, const char* name) {
    const at::MemOverlapStatus status = at::get_overlap_status(out, read);
    TORCH_CHECK_VALUE(
        status != at::MemOverlapStatus::Full && status != at::MemOverlapStatus::Partial,
        std::string("out shares memory with ") + name + ", which is read while out is written");
  };
  check(relay, "relay");
  check(indices, "indices");
}

// Launches a transfer that does not read a slot. On the host device it also records a fence, so
// that readers can wait.
Resolved launch_unleased(Device& backend, StreamHandle stream, Transfer t, const at::Tensor& out) {
  t.dst = out.mutable_data_ptr();
  Resolved resolved(out);
  resolved.tail = t.tail;
  if (!out.is_cpu()) {
    backend.launch(t, stream);
    return resolved;
  }
  resolved.fence_owner = make_fence(backend);
  resolved.fence = resolved.fence_owner.get();
  t.dst_owner = owner_of(out);
  backend.launch(t, stream);
  backend.record(resolved.fence, stream);
  return resolved;
}

Resolved launch_gather(Device& backend, StreamHandle stream, const std::shared_ptr<RelayTail>& tail,
                       const at::Tensor& out) {
  if (!tail->count) return {out};
  Transfer t;
  t.tail = tail;
  return launch_unleased(backend, stream, std::move(t), out);
}

}  // namespace

void check_memory(const at::Tensor& tensor, const std::string& name) {
  const bool has_memory = tensor.layout() == at::kStrided && tensor.has_storage() &&
                          (tensor.numel() == 0 || tensor.storage().data() != nullptr);
  TORCH_CHECK_TYPE(has_memory, name +
                                   " has no memory of its own (a FakeTensor, a sparse tensor, or "
                                   "a subclass that wraps other tensors): pass a plain tensor");
}

std::shared_ptr<void> make_fence(Device& device) {
  return {device.create_fence(), [&device](FenceHandle fence) { device.destroy_fence(fence); }};
}

DeviceScope::DeviceScope(c10::Device device) {
  if (!device.is_cuda()) return;
  const c10::Device current = c10::impl::VirtualGuardImpl(device.type()).exchangeDevice(device);
  if (current != device) previous_ = current;
}

DeviceScope::~DeviceScope() {
  if (previous_) c10::impl::VirtualGuardImpl(previous_->type()).uncheckedSetDevice(*previous_);
}

// --- StagingPool -------------------------------------------------------------------------------

StagingPool::StagingPool(c10::Device device, const StagingOptions& options)
    : device_(device),
      options_(options),
      backend_(&backend_of(device)),
      core_(Pool::create(*backend_, options.pool)),
      outputs_(device) {
  if (options_.eager && device_.is_cuda())
    eager_stream_ = c10::impl::VirtualGuardImpl(device_.type())
                        .getStreamFromGlobalPool(device_, /*isHighPriority=*/true);
}

StagingPool::~StagingPool() {
  if (!can_free()) outputs_.leak();
  Pool::drop(std::move(core_));
}

void StagingPool::close(const Poll& poll) {
  struct Clear {
    ~Clear() {  // also where the poll throws
      if (pool.can_free()) pool.outputs_.close();
    }
    StagingPool& pool;
  } clear{*this};
  core_->close(poll);
}

bool StagingPool::can_free() const noexcept {
  return fork_generation_ == fork_generation() && backend_->usable();
}

StreamHandle StagingPool::current_stream() const { return current_stream_of(device_); }

StreamHandle StagingPool::eager_stream() const {
  if (device_.is_cpu()) return host_stream(kHostEagerStream);
  return eager_stream_ ? eager_stream_->native_handle() : nullptr;
}

// --- StagedTokens ------------------------------------------------------------------------------

StagedTokens::StagedTokens(std::shared_ptr<StagingPool> pool, at::Tensor fallback, bool fits_int32)
    : pool_(std::move(pool)),
      wire_(IntType::kInt64),
      count_(static_cast<size_t>(fallback.numel())),
      fits_int32_(fits_int32),
      fallback_(std::make_shared<OwnedIds>(pool_, std::move(fallback))) {}

bool StagedTokens::is_pinned() const {
  if (fallback_) return (*fallback_)->is_pinned();
  return lease_ && lease_->pinned();
}

StagedTokens StagedTokens::slice(size_t start, size_t stop) const {
  StagedTokens part = *this;
  part.offset_ += start;
  part.count_ = stop - start;
  part.eager_ = nullptr;  // eager ids are for whole batches; a slice reads the slot
  return part;
}

at::Tensor StagedTokens::fallback_ids() const {
  return (*fallback_)
      ->slice(0, static_cast<int64_t>(offset_), static_cast<int64_t>(offset_ + count_));
}

at::Tensor StagedTokens::cpu() const {
  pool_->core().check_process();  // a child cannot read its parent's pinned memory
  if (fallback_) return fallback_ids().clone();
  at::Tensor ids = at::empty({static_cast<int64_t>(count_)}, at::kLong);
  if (count_)
    convert(lease_->data() + offset_ * size_of(wire_), wire_, ids.mutable_data_ptr(),
            IntType::kInt64, count_);
  return ids;
}

bool StagedTokens::by_kernel() const {
  return pool_->device_.is_cpu() || (lease_->device_data() && !pool_->options_.copy_engine);
}

OwnedIds::~OwnedIds() {
  if (ids_.defined() && !pool_->can_free()) new at::Tensor(std::move(ids_));
}

// Fills `out` from the slot on `stream`, which must be current. A tail requires by_kernel().
FenceHandle StagedTokens::transfer_to(const at::Tensor& out, StreamHandle stream,
                                      const std::shared_ptr<RelayTail>& tail) {
  Transfer t;
  t.tail = tail;
  t.src = lease_->data() + offset_ * size_of(wire_);
  if (const char* device_data = lease_->device_data())
    t.src_device = device_data + offset_ * size_of(wire_);
  t.wire = wire_;
  t.out = int_type(out.scalar_type());
  t.count = count_;
  t.src_is_complete = true;  // the host has filled the slot
  const bool mapped = t.src_device != nullptr;
  t.kind =
      mapped && !pool_->options_.copy_engine ? TransferKind::kKernel : TransferKind::kCopyEngine;
  if (pool_->device_.is_cpu()) {
    t.dst = out.mutable_data_ptr();
    t.dst_owner = owner_of(out);
    return lease_->launch_transfer(t, stream);
  }
  // GCOV_EXCL_START: transfers to CUDA
  if (t.kind == TransferKind::kKernel || t.wire == t.out) {
    t.dst = out.mutable_data_ptr();
    return lease_->launch_transfer(t, stream);
  }
  // A copy engine cannot convert, so copy the ids as they are and convert on the device.
  const at::Tensor raw = empty_ids(out.device(), scalar_type(wire_), count_);
  t.dst = raw.mutable_data_ptr();
  t.out = wire_;
  const FenceHandle fence = lease_->launch_transfer(t, stream);
  out.copy_(raw);
  pool_->backend_->record(fence, stream);  // so that the fence also covers `out`
  return fence;
  // GCOV_EXCL_STOP
}

void StagedTokens::start_eager() {
  if (!lease_) return;
  const DeviceScope scope(pool_->device_);
  // Allocate on the stream that writes the memory. Memory of the consumer's stream could be written
  // only after all work that is still pending on that stream.
  const c10::OptionalStreamGuard stream_guard(pool_->eager_stream_);
  const StreamHandle stream = pool_->eager_stream();
  // Torch hands out its streams in turn, so another user may capture on this one.
  if (pool_->backend_->capturing(stream)) return;
  at::Tensor ids = pool_->outputs_.allocate(at::kLong, count_, stream);
  const FenceHandle fence = transfer_to(ids, stream);
  eager_ = std::make_shared<EagerIds>(pool_, std::move(ids), fence);
  ++pool_->core().counters().eager_transfers;
}

StreamHandle StagedTokens::resolving_stream() const {
  const StreamHandle stream = pool_->current_stream();
  if (pool_->backend_->capturing(stream))  // GCOV_EXCL_START: the host captures nothing
    throw CaptureError(
        "resolve() on a stream that captures a CUDA graph: every replay would read a slot that "
        "other ids may hold by then; resolve before the capture, with out= into the graph's static "
        "input");
  // GCOV_EXCL_STOP
  return stream;
}

at::Tensor StagedTokens::take_eager(StreamHandle stream) {
  if (!eager_) return {};
  std::lock_guard<std::mutex> guard(eager_->mutex);
  if (!eager_->ids.defined()) return {};
  pool_->backend_->wait(stream, eager_->fence);
  // The memory belongs to the pool's stream. Keep it until the reader's stream has finished too.
  record_on_current_stream(*eager_->ids);
  return eager_->ids.take();
}

Resolved StagedTokens::resolve(const std::optional<at::Tensor>& out, at::ScalarType dtype,
                               bool blocking) {
  Pool& core = pool_->core();
  core.check_process();
  const c10::Device device = pool_->device_;
  if (out) {
    check_out(*out, device, count_);
    dtype = out->scalar_type();
  }
  TORCH_CHECK_VALUE(int_type(dtype) == IntType::kInt64 || fits_int32_,
                    "these ids do not all fit int32: resolve to int64");
  const DeviceScope scope(device);
  const StreamHandle stream = resolving_stream();
  if (out) count_write(*out);

  if (fallback_) {
    at::Tensor ids = out ? *out : pool_->outputs_.allocate(dtype, count_, stream);
    ++core.counters().fallback_transfers;
    return resolve_fallback(ids, stream, blocking);
  }
  if (!out && dtype == at::kLong) {
    if (at::Tensor ids = take_eager(stream); ids.defined()) return {ids, eager_->fence};
  }
  at::Tensor ids = out ? *out : pool_->outputs_.allocate(dtype, count_, stream);
  if (!count_) return {ids};
  return {ids, transfer_to(ids, stream)};
}

Resolved StagedTokens::resolve_fallback(const at::Tensor& ids, StreamHandle stream, bool blocking) {
  const at::Tensor from = fallback_ids();
  if (!ids.is_cpu()) {
    // Torch's host allocator keeps the block until the stream has passed the copy.
    at::Tensor(ids).copy_(from, /*non_blocking=*/!blocking);
    return {ids};
  }
  Transfer t;  // in order on the host device's stream, like any other transfer
  t.src = from.const_data_ptr();
  t.wire = IntType::kInt64;
  t.out = int_type(ids.scalar_type());
  t.count = count_;
  t.src_owner = owner_of(from);
  return launch_unleased(*pool_->backend_, stream, std::move(t), ids);
}

Resolved StagedTokens::resolve_mixed(const at::Tensor& relay, const at::Tensor& indices,
                                     const std::optional<at::Tensor>& out) {
  pool_->core().check_process();
  const c10::Device device = pool_->device_;
  const DeviceScope scope(device);
  const auto prefill = static_cast<int64_t>(count_);
  if (out) {
    check_out(*out, device, count_ + static_cast<size_t>(indices.numel()));
    check_int64(*out);
    check_apart(*out, relay, indices);
  }
  const StreamHandle stream = resolving_stream();
  const auto tail = make_tail(relay, indices, device);
  if (out) count_write(*out);
  const at::Tensor ids =
      out ? *out : pool_->outputs_.allocate(at::kLong, count_ + tail->count, stream);
  if (!tail->count) return resolve(ids, at::kLong, false);
  if (const at::Tensor eager = take_eager(stream); eager.defined()) {
    Transfer t;
    t.src = t.src_device = eager.const_data_ptr();
    t.wire = IntType::kInt64;
    t.count = count_;
    t.tail = tail;
    if (device.is_cpu()) t.src_owner = owner_of(eager);
    return launch_unleased(*pool_->backend_, stream, std::move(t), ids);
  }
  if (lease_ && count_ && by_kernel()) {
    Resolved resolved(ids, transfer_to(ids, stream, tail));
    resolved.tail = tail;
    return resolved;
  }
  resolve(ids.slice(0, 0, prefill), at::kLong, false);
  Resolved resolved =
      launch_gather(*pool_->backend_, stream, tail, ids.slice(0, prefill, ids.size(0)));
  resolved.ids = ids;
  return resolved;
}

Resolved gather_relay(const at::Tensor& relay, const at::Tensor& indices,
                      const std::optional<at::Tensor>& out) {
  const c10::Device device = relay.device();
  Device& backend = backend_of(device);
  const DeviceScope scope(device);
  if (out) {
    check_out(*out, device, static_cast<size_t>(indices.numel()));
    check_int64(*out);
    check_apart(*out, relay, indices);
  }
  const auto tail = make_tail(relay, indices, device);
  if (out) count_write(*out);
  return launch_gather(backend, current_stream_of(device), tail,
                       out ? *out : empty_ids(device, at::kLong, tail->count));
}

at::Tensor fallback_memory(c10::Device device, size_t count) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(at::kCPU);
  const std::array<int64_t, 1> size{static_cast<int64_t>(count)};
  if (!device.is_cuda()) return at::empty(size, options);
  // GCOV_EXCL_START: torch pins memory only with CUDA
  try {
    return at::empty(size, options.pinned_memory(true));
  } catch (const c10::Error&) {
    // Torch cannot pin for the same reason as the pool. Pageable memory is slower, but correct.
    return at::empty(size, options);
  }
  // GCOV_EXCL_STOP
}

// --- the op ------------------------------------------------------------------------------------

void transfer_tensor(const at::Tensor& wire, const at::Tensor& out) {
  const IntType from = int_type(wire.scalar_type());
  TORCH_CHECK_VALUE(wire.dim() == 1, "wire must be 1-D, not " + shape_of(wire));
  const c10::Device device = out.device();
  check_out(out, device, static_cast<size_t>(wire.numel()));
  TORCH_CHECK_VALUE(wire.is_cpu() || wire.device() == device,
                    "wire is on " + wire.device().str() + ", out on " + device.str());
  const at::Tensor src = plain(wire, "wire").contiguous();
  TORCH_CHECK_VALUE(at::get_overlap_status(out, src) != at::MemOverlapStatus::Partial,
                    "out shares memory with wire, which is read while out is written");
  Device& backend = backend_of(device);
  count_write(out);
  if (!wire.numel()) return;
  if (device.is_cpu()) {
    convert(src.const_data_ptr(), from, out.mutable_data_ptr(), int_type(out.scalar_type()),
            static_cast<size_t>(src.numel()));
    return;
  }
  // GCOV_EXCL_START: the op to CUDA
  const DeviceScope scope(device);
  const c10::impl::VirtualGuardImpl impl(device.type());
  const c10::Stream stream = impl.getStream(device);
  Transfer t;
  t.src = t.src_device = src.const_data_ptr();
  t.wire = from;
  t.dst = out.mutable_data_ptr();
  t.out = int_type(out.scalar_type());
  t.count = static_cast<size_t>(src.numel());
  if (wire.is_cpu()) {
    // If torch pinned the memory, its allocator can record an event, and then keeps the block until
    // the stream has passed this point. All other memory is copied by torch.
    const c10::DataPtr& data = src.storage().data_ptr();
    at::HostAllocator* allocator = at::getHostAllocator(device.type());
    const bool pinned = src.is_pinned() && backend.kernels_read_pinned();
    if (pinned) backend.launch(t, stream.native_handle());
    if (!pinned || !allocator->record_event(data.get(), data.get_context(), stream))
      out.copy_(src, /*non_blocking=*/false);
    return;
  }
  backend.launch(t, stream.native_handle());
  // GCOV_EXCL_STOP
}

}  // namespace pystage

#include "small_tensors.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>
#include <utility>

#include "host_device.h"

namespace pystage {
namespace {

// The host device fills memory with this, so that a tensor that was not delivered looks wrong.
constexpr int kNotDelivered = 0x5a;

// The part of a byte tensor that begins at its byte `at`.
at::Tensor part(const at::Tensor& memory, size_t at, at::ScalarType dtype, at::IntArrayRef sizes) {
  return cut(memory.storage(), static_cast<size_t>(memory.storage_offset()) + at, dtype, sizes);
}

StreamHandle small_tensors_stream(c10::Device device) {
  const StreamHandle stream = current_stream_of(device);
  if (backend_of(device).capturing(stream))  // GCOV_EXCL_START: the host captures nothing
    throw CaptureError(
        "small tensors on a stream that captures a CUDA graph: every replay would use the values "
        "of the capture; make them before the capture, in tensors that the graph reads");
  // GCOV_EXCL_STOP
  return stream;
}

}  // namespace

Parcel::Parcel(std::shared_ptr<StagingPool> pool, size_t capacity)
    : device_(pool->device()),
      pool_(std::move(pool)),
      backend_(pool_->core().device()),
      values_(room(capacity)) {
  pool_->core().check_usable();
  const DeviceScope scope(device_);
  stream_ = small_tensors_stream(device_);
  memory_ = pool_->output(at::kByte, values_.size(), stream_);
  if (device_.is_cpu() && !values_.empty())
    std::memset(memory_.mutable_data_ptr(), kNotDelivered, values_.size());
}

Parcel::Place Parcel::add(at::ScalarType dtype, at::IntArrayRef sizes) {
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  if (!has_room(bytes))
    throw Error("a parcel of " + std::to_string(values_.size()) + " bytes has no room for " +
                std::to_string(bytes) + " behind " + std::to_string(used_));
  Place place{part(memory_, used_, dtype, sizes), values_.data() + used_};
  used_ += room(bytes);
  return place;
}

bool Parcel::deliver(const Poll& poll) {
  if (delivered_ == used_) return false;
  const size_t from = delivered_, bytes = used_ - from;
  const DeviceScope scope(device_);
  if (current_stream_of(device_) != stream_)
    throw Error("small tensors are delivered on the stream that they were made for");
  if (sizeof(ValuesPiece) + bytes <= backend_.most_values()) {
    const ValuesPiece piece{static_cast<char*>(memory_.mutable_data_ptr()) + from, 0,
                            static_cast<uint32_t>(bytes / Device::kValuesAlignment)};
    backend_.launch_values(values_.data() + from, bytes, &piece, 1, stream_);
    delivered_ = used_;
    return false;
  }
  const size_t count = bytes / sizeof(int64_t);
  const at::Tensor target = part(memory_, from, at::kLong, {static_cast<int64_t>(count)});
  std::shared_ptr<Lease> lease = pool_->core().acquire(bytes, poll);
  at::Tensor host;
  if (!lease) {
    ++pool_->core().counters().fallbacks;
    host = fallback_memory(device_, count);
  }
  std::memcpy(lease ? lease->data() : host.mutable_data_ptr(), values_.data() + from, bytes);
  StagedTokens staged = lease ? StagedTokens(pool_, lease, IntType::kInt64, count, false)
                              : StagedTokens(pool_, host, false);
  lease.reset();
  const Resolved resolved = staged.resolve(target, at::kLong, false);
  // A reader on the CPU has no stream that could order it after the transfer.
  if (device_.is_cpu() && resolved.fence && !host_stream_held(stream_))
    backend_.synchronize(resolved.fence);
  delivered_ = used_;
  return true;
}

std::vector<at::Tensor> small_tensors(at::TensorList values, c10::Device device) {
  if (device.is_cuda() && !device.has_index() && c10::impl::hasDeviceGuardImpl(device.type()))
    device = c10::impl::VirtualGuardImpl(device.type()).getDevice();  // GCOV_EXCL_LINE: CUDA
  Device& backend = backend_of(device);
  size_t bytes = 0;
  for (const at::Tensor& tensor : values) {
    TORCH_CHECK_VALUE(tensor.is_cpu(), "small tensors are made from CPU tensors, not of one on " +
                                           tensor.device().str());
    check_memory(tensor, "a small tensor");
    bytes += Parcel::room(tensor.nbytes());
  }
  const DeviceScope scope(device);
  const StreamHandle stream = small_tensors_stream(device);
  std::vector<ValuesPiece> pieces;
  std::vector<at::Tensor> made;
  const bool fits =
      device.is_cuda() && values.size() * sizeof(ValuesPiece) + bytes <= backend.most_values();
  std::vector<char> parameters(fits ? bytes : 0);
  size_t used = 0;
  for (const at::Tensor& tensor : values) {
    const at::Tensor from = tensor.resolve_neg().resolve_conj().contiguous();
    const size_t size = from.nbytes();
    if (device.is_cpu()) {
      made.push_back(from.is_same(tensor) || from.is_alias_of(tensor) ? from.clone() : from);
      continue;
    }
    // GCOV_EXCL_START: small tensors on CUDA
    // Each tensor has its own memory: the outputs of an op must not share a storage.
    const at::Tensor memory = empty_ids(device, at::kByte, Parcel::room(size));
    made.push_back(part(memory, 0, from.scalar_type(), from.sizes()));
    if (!size) continue;
    if (fits) {
      std::memcpy(parameters.data() + used, from.const_data_ptr(), size);
      pieces.push_back({memory.mutable_data_ptr(),
                        static_cast<uint32_t>(used / Device::kValuesAlignment),
                        static_cast<uint32_t>(Parcel::room(size) / Device::kValuesAlignment)});
      used += Parcel::room(size);
    } else {
      made.back().copy_(from.pin_memory(), /*non_blocking=*/true);  // torch keeps its block
    }
    // GCOV_EXCL_STOP
  }
  // GCOV_EXCL_START: small tensors on CUDA
  if (!pieces.empty())
    backend.launch_values(parameters.data(), used, pieces.data(), pieces.size(), stream);
  // GCOV_EXCL_STOP
  return made;
}

}  // namespace pystage

// Small tensors: a few bytes of values each, sent to the device as the parameters of one kernel.
//
// Note [Small tensors]
// ~~~~~~~~~~~~~~~~~~~~
// A batch has about ten lists with one value per request: lengths, indices, temperatures. If each
// becomes a tensor of its own, each costs an allocation of pinned memory, an event, and a copy that
// queues behind other copies. A launch copies the parameters of its kernel itself. So no host
// memory has to outlive the launch, there is no slot and no fence, and no copy engine is involved.
//
// A Parcel is one piece of device memory from which tensors are cut one after another. The caller
// writes a tensor's values on the host; deliver() launches a kernel that writes all tensors that
// were added since the last delivery. Until then the bytes of a tensor are arbitrary, so the caller
// must deliver before it hands the tensors out.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "staging.h"

namespace pystage {

class Parcel {
 public:
  // The parcel keeps the device of `pool`, and the stream that is current there now.
  Parcel(std::shared_ptr<StagingPool> pool, size_t capacity);
  Parcel(const Parcel&) = delete;
  Parcel& operator=(const Parcel&) = delete;

  // The bytes of the capacity that a tensor takes.
  static size_t room(size_t bytes) {
    return (bytes + Device::kValuesAlignment - 1) / Device::kValuesAlignment *
           Device::kValuesAlignment;
  }
  bool has_room(size_t bytes) const { return values_.size() - used_ >= room(bytes); }
  StagingPool& pool() const { return *pool_; }

  struct Place {
    at::Tensor tensor;  // on the device
    void* values;       // the caller writes them before the delivery
  };
  Place add(at::ScalarType dtype, at::IntArrayRef sizes);
  // Runs on the parcel's stream; call it without the GIL. It waits only if the values do not fit
  // into one launch: then it needs a slot, and may wait for one. Returns whether it asked the pool.
  bool deliver(const Poll& poll);

 private:
  const c10::Device device_;
  const std::shared_ptr<StagingPool> pool_;
  Device& backend_;
  StreamHandle stream_;
  at::Tensor memory_;
  std::vector<char> values_;
  size_t used_ = 0, delivered_ = 0;
};

// The op: sends CPU tensors of any dtype and shape to `device` with one launch. It has no pool, so
// tensors that do not fit into the launch are copied from memory that torch pins.
std::vector<at::Tensor> small_tensors(at::TensorList values, c10::Device device);

}  // namespace pystage

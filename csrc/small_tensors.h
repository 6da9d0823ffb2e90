// Small tensors: values of few bytes that go to the device as the parameters of one kernel.
//
// Note [Small tensors]
// ~~~~~~~~~~~~~~~~~~~~
// A batch has ten or so lists of one value a request: lengths, indices, temperatures. As tensors of
// their own each costs an allocation of pinned memory, an event, and a copy that queues behind
// others. A kernel's parameters are copied by the launch itself: nothing on the host has to outlive
// it, so there is no slot and no fence, and no copy engine is in the way.
//
// A Parcel is one piece of the device's memory that tensors are cut from one after another. The
// caller writes a tensor's values on the host; deliver() launches a kernel that writes all that
// were added since the last delivery. Until then the bytes of a tensor are arbitrary. So whoever
// hands the tensors out delivers first.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "staging.h"

namespace pystage {

class Parcel {
 public:
  // For the stream that is current on the device of `pool`; both stay those of the parcel.
  Parcel(std::shared_ptr<StagingPool> pool, size_t capacity);
  Parcel(const Parcel&) = delete;
  Parcel& operator=(const Parcel&) = delete;

  // What a tensor takes of the capacity.
  static size_t room(size_t bytes) {
    return (bytes + Device::kValuesAlignment - 1) / Device::kValuesAlignment *
           Device::kValuesAlignment;
  }
  bool has_room(size_t bytes) const { return values_.size() - used_ >= room(bytes); }

  struct Place {
    at::Tensor tensor;  // on the device
    void* values;       // to be written by the caller before the delivery
  };
  Place add(at::ScalarType dtype, at::IntArrayRef sizes);
  // On the parcel's stream, and without the GIL. Waits only for a slot, and only beyond what a
  // launch takes.
  void deliver(const Poll& poll = {});

 private:
  const c10::Device device_;
  const std::shared_ptr<StagingPool> pool_;
  Device& backend_;
  StreamHandle stream_;
  at::Tensor memory_;
  std::vector<char> values_;
  size_t used_ = 0, delivered_ = 0;
};

// The op: CPU tensors of any dtype and shape, on `device`, by one launch. Without a pool: what is
// too long for it is copied out of memory that torch pins.
std::vector<at::Tensor> small_tensors(at::TensorList values, c10::Device device);

}  // namespace pystage

// Small tensors for Python: lists read into a Parcel, and SGLang's torch.tensor through one.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "staging.h"

namespace pystage {

// The pool in the capsule that StagingPool.handle() made; throws where it is none.
const std::shared_ptr<StagingPool>& pool_of(PyObject* handle);

// Adds small_tensors(), write_rows() and the type Parcel to the module.
void add_small_tensors(pybind11::module_& module);

}  // namespace pystage

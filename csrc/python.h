// What the files of the Python extension share. Each file adds its part to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "staging.h"

namespace pystage {

namespace py = pybind11;

// The pool in a capsule made by StagingPool.handle(). Throws if the object is not such a capsule.
const std::shared_ptr<StagingPool>& pool_of(PyObject* handle);

// Logs (logger "pystage") if a pool has grown, or has fallen back to torch's memory, since the last
// call of this function. Warns once if the pool's memory is pageable. Runs Python code.
void tell_news(StagingPool& pool);

// Makes a new pystage.StagedTokens; `pool` is the Python pool.
PyObject* make_staged_tokens(PyObject* pool, StagedTokens tokens);
// Whether an object is a pystage.StagedTokens.
bool is_staged_tokens(PyObject* object);

// Writes `count` items of a list or tuple to `out`, as `dtype`. Errors name the list by `index`.
// Reading an item may run Python code, which may change the list.
void read_list(PyObject* list, Py_ssize_t count, at::ScalarType dtype, void* out, size_t index);

void add_stage(py::module_& module);          // stage()
void add_staged_tokens(py::module_& module);  // StagedTokens, set_staged_tokens_type(), gather()
void add_small_tensors(py::module_& module);  // small_tensors()
void add_rows(py::module_& module);           // write_rows()
void add_parcel(py::module_& module);         // Parcel, parcel()

}  // namespace pystage

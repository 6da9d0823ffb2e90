// The requests of one stage() call as Python passes them: lists, tuples, buffers and tensors. They
// are not copied.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "gather.h"

namespace pystage {

namespace py = pybind11;

// The names that errors use for a request and for a type.
std::string where(size_t request);
std::string type_name(PyObject* object);

// Whether the type of an object really is torch.Tensor or a subclass. isinstance() also accepts
// what the object's __class__ says, and runs Python code to find out.
bool is_tensor(PyObject* object);

// The parts of one call, and the owners that keep their memory in place until the gather is over.
class Parts {
 public:
  explicit Parts(size_t count) {
    parts_.reserve(count);
    views_.reserve(count);
  }
  ~Parts() {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
  }
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;

  // Adds a whole request. narrow() then restricts it to the positions [start, stop).
  void add(PyObject* object);
  void narrow(size_t request, size_t start, size_t stop);

  const Part* data() const { return parts_.data(); }
  size_t size() const { return parts_.size(); }
  const Part& operator[](size_t i) const { return parts_[i]; }
  bool has_lists() const { return has_lists_; }

 private:
  void add_tensor(Part& part, PyObject* object);
  void add_buffer(Part& part, PyObject* object);

  c10::SmallVector<Part, 4> parts_;
  c10::SmallVector<Py_buffer, 4> views_;
  c10::SmallVector<py::object, 4> owners_;
  c10::SmallVector<at::Tensor, 1> tensors_;
  bool has_lists_ = false;
};

// Returns any sequence as a list or tuple. Rejects strings and mappings: they can be iterated too,
// but never over requests.
py::object as_fast_sequence(py::handle object, const char* name);

// Reads a sequence of `count` positions, one for each request.
std::vector<size_t> read_ends(py::handle object, const char* name, size_t count);

}  // namespace pystage

// Helpers for functions that use the CPython API directly, because a call through pybind11 would
// cost as much as their work.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <exception>
#include <string>

#include "gil.h"

namespace pystage {

namespace py = pybind11;

// Sets the Python error for one of pystage's exceptions; rethrows any other exception.
void translate(std::exception_ptr pointer);

// Runs `body`, which returns a new reference. Turns every exception into a Python error.
template <typename Body>
PyObject* guarded(Body body) noexcept {
  std::exception_ptr error;
  try {
    return body();
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  } catch (const Interrupted&) {
    return nullptr;  // the Python error is set already
  } catch (...) {
    error = std::current_exception();
  }
  // Not in the handler: there a forced unwind terminates the process before call_python() sees it.
  try {
    translate(error);  // rethrows what is not pystage's
    return nullptr;
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  } catch (const py::builtin_exception& e) {
    e.set_error();
    return nullptr;
  } catch (...) {
    error = std::current_exception();
  }
  torch::translate_exception_to_python(error);
  return nullptr;
}

// The new reference that `call` returns, see call_python(). Throws the Python error if it is null.
template <typename Call>
py::object called(Call call) {
  PyObject* object = call_python(call);
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

inline void check_count(const char* name, Py_ssize_t given, Py_ssize_t taken) {
  if (given != taken)
    throw py::type_error(std::string(name) + " takes " + std::to_string(taken) +
                         " arguments, not " + std::to_string(given));
}

inline size_t size_argument(PyObject* object) {
  const size_t value = PyLong_AsSize_t(object);
  if (value == static_cast<size_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyMethodDef fast_method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction)),
          METH_FASTCALL, doc};
}

}  // namespace pystage

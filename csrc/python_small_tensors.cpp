// small_tensors(): reads lists and small arrays from Python and delivers them in one parcel.
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "errors.h"
#include "fast_calls.h"
#include "gil.h"
#include "python.h"
#include "requests.h"
#include "small_tensors.h"

namespace pystage {
namespace {

std::string where(size_t index, Py_ssize_t position) {
  return "values[" + std::to_string(index) + "][" + std::to_string(position) + "]";
}

// The name that torch.dtype has for it.
std::string name_of(at::ScalarType dtype) {
  return py::str(py::handle(reinterpret_cast<PyObject*>(torch::getTHPDtype(dtype))))
      .cast<std::string>();
}

[[noreturn]] void does_not_fit(PyObject* value, size_t index, Py_ssize_t position,
                               at::ScalarType dtype) {
  const py::object text = called([value] { return PyObject_Repr(value); });
  throw py::value_error(where(index, position) + " is " + text.cast<std::string>() + ", which " +
                        name_of(dtype) + " cannot hold");
}

py::object as_int(PyObject* value, size_t index, Py_ssize_t position) {
  auto number =
      py::reinterpret_steal<py::object>(call_python([value] { return PyNumber_Index(value); }));
  if (number) return number;
  if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
  PyErr_Clear();
  throw py::type_error(where(index, position) + " is a " + type_name(value) + ", not an int");
}

template <typename Int>
Int read_int(PyObject* value, size_t index, Py_ssize_t position, at::ScalarType dtype) {
  int overflow = 0;
  int64_t number;
  if (PyLong_CheckExact(value)) {
    number = PyLong_AsLongLongAndOverflow(value, &overflow);
  } else {
    const py::object held = as_int(value, index, position);
    number = PyLong_AsLongLongAndOverflow(held.ptr(), &overflow);
  }
  if (overflow || number < std::numeric_limits<Int>::min() ||
      number > std::numeric_limits<Int>::max())
    does_not_fit(value, index, position, dtype);
  return static_cast<Int>(number);
}

uint64_t read_uint64(PyObject* value, size_t index, Py_ssize_t position) {
  const py::object number = as_int(value, index, position);
  const uint64_t read = PyLong_AsUnsignedLongLong(number.ptr());
  if (read == static_cast<uint64_t>(-1) && PyErr_Occurred()) {
    PyErr_Clear();
    does_not_fit(value, index, position, at::kUInt64);
  }
  return read;
}

float read_float(PyObject* value, size_t index, Py_ssize_t position) {
  double number;
  if (PyFloat_CheckExact(value)) {
    number = PyFloat_AS_DOUBLE(value);
  } else {
    number = call_python([value] { return PyFloat_AsDouble(value); });
    if (number == -1.0 && PyErr_Occurred()) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
      PyErr_Clear();
      throw py::type_error(where(index, position) + " is a " + type_name(value) + ", not a number");
    }
  }
  if (std::isfinite(number) && std::fabs(number) > FLT_MAX)
    does_not_fit(value, index, position, at::kFloat);
  return static_cast<float>(number);
}

bool read_bool(PyObject* value, size_t index, Py_ssize_t position) {
  if (PyBool_Check(value)) return value == Py_True;
  const auto number = read_int<int64_t>(value, index, position, at::kBool);
  if (number != 0 && number != 1) does_not_fit(value, index, position, at::kBool);
  return number != 0;
}

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      dtype == at::kInt || dtype == at::kLong || dtype == at::kUInt64 || dtype == at::kFloat ||
          dtype == at::kBool,
      "small tensors must be int32, int64, uint64, float32 or bool, not " + name_of(dtype));
}

}  // namespace

void read_list(PyObject* list, Py_ssize_t count, at::ScalarType dtype, void* out, size_t index) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i >= PySequence_Fast_GET_SIZE(list))
      throw Error("values[" + std::to_string(index) + "] shrank while it was read");
    const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(list, i));
    switch (dtype) {
      case at::kInt:
        static_cast<int32_t*>(out)[i] = read_int<int32_t>(item.ptr(), index, i, dtype);
        break;
      case at::kLong:
        static_cast<int64_t*>(out)[i] = read_int<int64_t>(item.ptr(), index, i, dtype);
        break;
      case at::kUInt64:
        static_cast<uint64_t*>(out)[i] = read_uint64(item.ptr(), index, i);
        break;
      case at::kFloat:
        static_cast<float*>(out)[i] = read_float(item.ptr(), index, i);
        break;
      default:
        static_cast<bool*>(out)[i] = read_bool(item.ptr(), index, i);
    }
  }
}

namespace {

at::ScalarType dtype_of(PyObject* dtype) {
  if (!THPDtype_Check(dtype))
    throw py::type_error("dtype must be a torch.dtype, not a " + type_name(dtype));
  const at::ScalarType scalar_type = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
  check_dtype(scalar_type);
  return scalar_type;
}

// Whether `to` holds the values of `from`, which it was converted from. As in read_list(), floats
// are rounded and integers are not.
bool holds(const at::Tensor& to, const at::Tensor& from) {
  const at::ScalarType target = to.scalar_type(), source = from.scalar_type();
  if (target == source) return true;
  if (at::isComplexType(source)) return false;
  if (target == at::kFloat)
    return source != at::kDouble ||
           !from.isfinite().logical_and(from.abs().gt(FLT_MAX)).any().item().toBool();
  // There and back is no proof where a sign bit is read as a value, or a float is clamped.
  if (at::isFloatingType(source)) {
    const at::Tensor exact = from.to(at::kDouble);  // a half holds no int that a clamp gives
    if (!to.to(at::kDouble).equal(exact)) return false;
    const int bits = target == at::kInt ? 31 : target == at::kLong ? 63 : 64;
    return target == at::kBool || exact.lt(std::ldexp(1.0, bits)).all().item().toBool();
  }
  if (!to.to(source).equal(from)) return false;
  if (target == at::kUInt64) return !c10::isSignedType(source) || !from.lt(0).any().item().toBool();
  return target == at::kBool || c10::isSignedType(source) || !to.lt(0).any().item().toBool();
}

// small_tensors(handle, values, dtypes): values is a list of lists, tuples and CPU tensors. dtypes
// is a list, with None for a tensor that keeps its own dtype.
PyObject* small_tensors_fast(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded([&] {
    check_count("small_tensors", given, 3);
    const std::shared_ptr<StagingPool> pool = pool_of(args[0]);
    const py::object values = as_fast_sequence(args[1], "values");
    const py::object dtypes = as_fast_sequence(args[2], "dtypes");
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(values.ptr());
    if (PySequence_Fast_GET_SIZE(dtypes.ptr()) != count)
      throw py::value_error("there are " + std::to_string(count) + " lists of values, but " +
                            std::to_string(PySequence_Fast_GET_SIZE(dtypes.ptr())) + " dtypes");
    struct Given {
      py::object list;  // or:
      at::Tensor tensor;
      at::ScalarType dtype;
      int64_t size = 0;
    };
    std::vector<Given> all;
    all.reserve(static_cast<size_t>(count));
    size_t bytes = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      // A tensor's subclass runs Python code when it is converted.
      if (i >= PySequence_Fast_GET_SIZE(values.ptr()) ||
          i >= PySequence_Fast_GET_SIZE(dtypes.ptr()))
        throw Error("values or dtypes shrank while they were read");
      const auto held =
          py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(values.ptr(), i));
      PyObject* value = held.ptr();
      PyObject* dtype = PySequence_Fast_GET_ITEM(dtypes.ptr(), i);
      const std::string name = "values[" + std::to_string(i) + "]";
      Given one;
      if (is_tensor(value)) {
        const at::Tensor tensor = THPVariable_Unpack(value);
        TORCH_CHECK_VALUE(tensor.is_cpu(), name + " is on " + tensor.device().str() +
                                               ": small tensors are made from CPU tensors");
        check_memory(tensor, name);
        one.dtype = dtype == Py_None ? tensor.scalar_type() : dtype_of(dtype);
        check_dtype(one.dtype);
        one.tensor = tensor.to(one.dtype).resolve_neg().contiguous();
        TORCH_CHECK_VALUE(holds(one.tensor, tensor),
                          name + " has values that " + name_of(one.dtype) + " cannot hold");
        bytes += Parcel::room(one.tensor.nbytes());
      } else if (PyList_Check(value) || PyTuple_Check(value)) {
        if (dtype == Py_None) throw py::type_error(name + " is a list, so it needs a dtype");
        one.dtype = dtype_of(dtype);
        one.list = py::reinterpret_borrow<py::object>(value);
        one.size = PySequence_Fast_GET_SIZE(value);
        bytes += Parcel::room(static_cast<size_t>(one.size) * c10::elementSize(one.dtype));
      } else {
        throw py::type_error(name + " is a " + type_name(value) +
                             ", not a list, tuple, array or tensor");
      }
      all.push_back(std::move(one));
    }
    std::optional<Parcel> parcel;
    {
      const ReleaseGil release;
      parcel.emplace(pool, bytes);
    }
    std::vector<at::Tensor> made;
    for (size_t i = 0; i < all.size(); ++i) {
      const Given& one = all[i];
      if (one.list) {
        Parcel::Place place = parcel->add(one.dtype, {one.size});
        read_list(one.list.ptr(), one.size, one.dtype, place.values, i);
        made.push_back(std::move(place.tensor));
      } else {
        Parcel::Place place = parcel->add(one.dtype, one.tensor.sizes());
        if (one.tensor.nbytes())
          std::memcpy(place.values, one.tensor.const_data_ptr(), one.tensor.nbytes());
        made.push_back(std::move(place.tensor));
      }
    }
    bool asked_pool;
    {
      ReleaseGil release;
      asked_pool = parcel->deliver([&] { release.check_signals(); });
    }
    if (asked_pool) tell_news(*pool);
    py::tuple result(made.size());
    for (size_t i = 0; i < made.size(); ++i) {
      PyObject* tensor = THPVariable_Wrap(std::move(made[i]));
      if (!tensor) throw py::error_already_set();
      PyTuple_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), tensor);
    }
    return result.release().ptr();
  });
}

}  // namespace

void add_small_tensors(py::module_& module) {
  static PyMethodDef functions[] = {
      fast_method<small_tensors_fast>("small_tensors", "handle, values, dtypes"), {}};
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace pystage

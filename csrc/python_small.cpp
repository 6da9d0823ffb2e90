#include "python_small.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cfloat>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "errors.h"
#include "fast_calls.h"
#include "gil.h"
#include "requests.h"
#include "small_tensors.h"

namespace pystage {
namespace {

// --- values ------------------------------------------------------------------------------------

std::string where(size_t index, Py_ssize_t position) {
  return "values[" + std::to_string(index) + "][" + std::to_string(position) + "]";
}

// As torch.dtype calls it.
std::string name_of(at::ScalarType dtype) {
  return py::str(py::handle(reinterpret_cast<PyObject*>(torch::getTHPDtype(dtype))))
      .cast<std::string>();
}

[[noreturn]] void does_not_fit(PyObject* value, size_t index, Py_ssize_t position,
                               at::ScalarType dtype) {
  throw py::value_error(where(index, position) + " is " +
                        py::repr(py::handle(value)).cast<std::string>() + ", which " +
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
      "small tensors are int32, int64, uint64, float32 or bool, not " + name_of(dtype));
}

// `count` items of a list or tuple, to `out`. Reading one may run Python code, which may change the
// list.
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

at::ScalarType dtype_of(PyObject* dtype) {
  if (!THPDtype_Check(dtype))
    throw py::type_error("a dtype is a torch.dtype, not a " + type_name(dtype));
  const at::ScalarType scalar_type = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
  check_dtype(scalar_type);
  return scalar_type;
}

PyObject* wrap(at::Tensor tensor) { return THPVariable_Wrap(std::move(tensor)); }

// small_tensors(handle, values, dtypes): values is a list of lists, tuples and CPU tensors; dtypes
// a list, with None where a tensor keeps its own.
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
      PyObject* value = PySequence_Fast_GET_ITEM(values.ptr(), i);
      PyObject* dtype = PySequence_Fast_GET_ITEM(dtypes.ptr(), i);
      const std::string name = "values[" + std::to_string(i) + "]";
      Given one;
      if (is_tensor(value)) {
        const at::Tensor tensor = THPVariable_Unpack(value);
        TORCH_CHECK_VALUE(tensor.is_cpu(), name + " is on " + tensor.device().str() +
                                               ": small tensors are made of CPU tensors");
        check_memory(tensor, name);
        one.dtype = dtype == Py_None ? tensor.scalar_type() : dtype_of(dtype);
        check_dtype(one.dtype);
        one.tensor = tensor.to(one.dtype).resolve_neg().contiguous();
        TORCH_CHECK_VALUE(
            one.dtype == tensor.scalar_type() || one.tensor.to(tensor.scalar_type()).equal(tensor),
            name + " has values that " + name_of(one.dtype) + " cannot hold");
        bytes += Parcel::room(one.tensor.nbytes());
      } else if (PyList_Check(value) || PyTuple_Check(value)) {
        if (dtype == Py_None) throw py::type_error(name + " is a list: it takes a dtype");
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
    {
      ReleaseGil release;
      parcel->deliver([&] { release.check_signals(); });
    }
    py::tuple result(made.size());
    for (size_t i = 0; i < made.size(); ++i) {
      PyObject* tensor = wrap(std::move(made[i]));
      if (!tensor) throw py::error_already_set();
      PyTuple_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), tensor);
    }
    return result.release().ptr();
  });
}

// --- rows --------------------------------------------------------------------------------------

struct Ints {
  Ints(PyObject* object, const char* name) {
    if (!is_tensor(object))
      throw py::type_error(std::string(name) + " is a " + type_name(object) + ", not a tensor");
    tensor = THPVariable_Unpack(object);
    TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.scalar_type() == at::kLong && tensor.dim() == 1,
                      std::string(name) + " must be a 1-D int64 CPU tensor");
    check_memory(tensor, name);
    tensor = tensor.contiguous();
    data = tensor.const_data_ptr<int64_t>();
  }
  int64_t operator[](size_t i) const { return data[i]; }
  at::Tensor tensor;
  const int64_t* data;
};

// write_rows(handle, table, rest, prefixes, rows, prefix_lens, lens): row rows[i] of the table
// begins with prefixes[i], prefix_lens[i] of it, and goes on with the next lens[i] of rest. False,
// and nothing is done, where there are more rows than fit into a launch, or memory that it cannot
// read.
PyObject* write_rows_fast(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded([&]() -> PyObject* {
    check_count("write_rows", given, 7);
    const std::shared_ptr<StagingPool> pool = pool_of(args[0]);
    const c10::Device device = pool->device();
    for (const int i : {1, 2})
      if (!is_tensor(args[i])) throw py::type_error("table and rest are tensors");
    const at::Tensor table = THPVariable_Unpack(args[1]), rest = THPVariable_Unpack(args[2]);
    const py::object prefixes = as_fast_sequence(args[3], "prefixes");
    const Ints rows(args[4], "rows"), prefix_lens(args[5], "prefix_lens"), lens(args[6], "lens");
    const auto count = static_cast<size_t>(rows.tensor.numel());
    if (prefix_lens.tensor.numel() != rows.tensor.numel() ||
        lens.tensor.numel() != rows.tensor.numel() ||
        static_cast<size_t>(PySequence_Fast_GET_SIZE(prefixes.ptr())) != count)
      throw py::value_error("there are " + std::to_string(count) +
                            " rows, but not as many prefixes, prefix_lens and lens");
    Device& backend = pool->core().device();
    const auto readable = [&](const at::Tensor& tensor, at::ScalarType dtype) {
      return tensor.device() == device && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
             !tensor.is_neg();
    };
    if (count > backend.most_rows() || table.dim() != 2 || !readable(table, at::kInt) ||
        !readable(rest, at::kLong) || table.numel() > std::numeric_limits<int32_t>::max() ||
        rest.numel() > std::numeric_limits<int32_t>::max())
      return PyBool_FromLong(0);
    check_memory(table, "table");
    check_memory(rest, "rest");
    std::vector<RowWrite> writes(count);
    int64_t rest_at = 0;
    for (size_t i = 0; i < count; ++i) {
      PyObject* object = PySequence_Fast_GET_ITEM(prefixes.ptr(), static_cast<Py_ssize_t>(i));
      if (!is_tensor(object)) throw py::type_error("prefixes are tensors");
      const at::Tensor& prefix = THPVariable_Unpack(object);
      const int64_t row = rows[i], prefix_count = prefix_lens[i], length = lens[i];
      const bool fits = 0 <= row && row < table.size(0) && 0 <= prefix_count && 0 <= length &&
                        prefix_count <= prefix.numel() && prefix_count + length <= table.size(1) &&
                        rest_at + length <= rest.numel();
      if (!fits)
        throw py::index_error("row " + std::to_string(row) + " with " +
                              std::to_string(prefix_count) + " and " + std::to_string(length) +
                              " entries does not fit a table of " + std::to_string(table.size(0)) +
                              " x " + std::to_string(table.size(1)) + ", a prefix of " +
                              std::to_string(prefix.numel()) + " and " +
                              std::to_string(rest.numel() - rest_at) + " new entries");
      if (prefix_count && !readable(prefix, at::kLong)) return PyBool_FromLong(0);
      writes[i].prefix = prefix_count ? prefix.const_data_ptr<int64_t>() : nullptr;
      writes[i].row = static_cast<int32_t>(row);
      writes[i].prefix_count = static_cast<int32_t>(prefix_count);
      writes[i].rest_at = static_cast<int32_t>(rest_at);
      writes[i].count = static_cast<int32_t>(length);
      rest_at += length;
    }
    {
      const ReleaseGil release;
      const DeviceScope scope(device);
      backend.launch_rows(table.mutable_data_ptr<int32_t>(), static_cast<size_t>(table.size(1)),
                          writes.data(), count, rest.const_data_ptr<int64_t>(),
                          pool->current_stream());
    }
    return PyBool_FromLong(1);
  });
}

// --- torch.tensor, through a parcel --------------------------------------------------------------

// Stands in for torch.tensor while known code runs in one thread. That code makes a CPU tensor of a
// list and calls its .to(device, non_blocking=True): here the tensor is not pinned, and what .to()
// gives is part of a parcel. Any other call goes to torch.
struct ParcelObject {
  PyObject_HEAD std::unique_ptr<Parcel> parcel;
  PyObject* device;                // as the known code calls it
  PyObject* original;              // torch.tensor
  PyObject* codes;                 // a tuple: the known functions' code
  PyObject* minus_one;             // what torch.tensor([-1], device=device) is to be, or None
  std::vector<size_t> deliver_at;  // after so many tensors
  size_t made;
  std::vector<PyObject*> hosts;  // that have a .to of ours
  std::thread::id thread;
  bool ended;
};

ParcelObject* parcel_of(PyObject* self) { return reinterpret_cast<ParcelObject*>(self); }

PyObject* g_to = nullptr;           // "to"
PyObject* g_original_to = nullptr;  // torch.Tensor.to

void deliver(ParcelObject* self) {
  const ReleaseGil release;
  self->parcel->deliver();
}

// The known code does what it was not known to do: what it has is delivered, and no more is taken.
void give_up(ParcelObject* self) {
  self->ended = true;
  deliver(self);
}

// One tensor more; some are a round that is delivered together.
void count_one(ParcelObject* self) {
  ++self->made;
  for (const size_t at : self->deliver_at)
    if (at == self->made) deliver(self);
  if (self->made >= self->deliver_at.back()) self->ended = true;
}

bool is_called_by(PyObject* codes) {
  PyFrameObject* frame = PyEval_GetFrame();
  if (!frame) return false;
  PyCodeObject* code = PyFrame_GetCode(frame);
  bool known = false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(codes); ++i)
    known |= PyTuple_GET_ITEM(codes, i) == reinterpret_cast<PyObject*>(code);
  Py_DECREF(code);
  return known;
}

bool same(PyObject* a, PyObject* b) {
  if (a == b) return true;
  const int equal = call_python([&] { return PyObject_RichCompareBool(a, b, Py_EQ); });
  if (equal < 0) throw py::error_already_set();
  return equal != 0;
}

PyObject* device_copy(ParcelObject* self, const at::Tensor& host) {
  Parcel::Place place = self->parcel->add(host.scalar_type(), host.sizes());
  if (host.nbytes()) std::memcpy(place.values, host.const_data_ptr(), host.nbytes());
  count_one(self);
  return wrap(std::move(place.tensor));
}

bool is_ours(const ParcelObject* self) {
  return !self->ended && self->thread == std::this_thread::get_id();
}

// The .to of a CPU tensor that parcel_tensor() made; `pair` is (parcel, tensor).
PyObject* parcel_to(PyObject* pair, PyObject* const* args, Py_ssize_t given, PyObject* names) {
  return guarded([&]() -> PyObject* {
    ParcelObject* self = parcel_of(PyTuple_GET_ITEM(pair, 0));
    PyObject* host = PyTuple_GET_ITEM(pair, 1);
    if (is_ours(self) && given == 1 && names && PyTuple_GET_SIZE(names) == 1 &&
        PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "non_blocking") == 0 &&
        args[1] == Py_True && same(args[0], self->device)) {
      const at::Tensor& tensor = THPVariable_Unpack(host);
      if (self->parcel->has_room(tensor.nbytes())) return device_copy(self, tensor);
    }
    if (is_ours(self)) give_up(self);
    std::vector<PyObject*> all{host};
    all.insert(all.end(), args, args + given + (names ? PyTuple_GET_SIZE(names) : 0));
    return call_python([&] {
      return PyObject_Vectorcall(g_original_to, all.data(), static_cast<size_t>(given + 1), names);
    });
  });
}

// The arguments that known code gives torch.tensor behind the list.
struct TensorArguments {
  PyObject* dtype = nullptr;
  PyObject* device = nullptr;
  bool others = false;

  TensorArguments(PyObject* const* values, PyObject* names) {
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
      PyObject* name = PyTuple_GET_ITEM(names, i);
      if (PyUnicode_CompareWithASCIIString(name, "dtype") == 0)
        dtype = values[i];
      else if (PyUnicode_CompareWithASCIIString(name, "device") == 0)
        device = values[i];
      else if (PyUnicode_CompareWithASCIIString(name, "pin_memory") != 0)
        others = true;
    }
  }
};

std::optional<at::ScalarType> known_dtype(PyObject* dtype) {
  if (!dtype || !THPDtype_Check(dtype)) return std::nullopt;
  const at::ScalarType type = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
  if (type == at::kInt || type == at::kLong || type == at::kFloat) return type;
  return std::nullopt;
}

// A list as a CPU tensor; undefined where torch might read it otherwise, or refuse it.
at::Tensor read(PyObject* list, Py_ssize_t count, at::ScalarType dtype) {
  at::Tensor host = at::empty({count}, at::TensorOptions().dtype(dtype));
  try {
    read_list(list, count, dtype, host.mutable_data_ptr(), 0);
  } catch (py::error_already_set&) {
    return {};
  } catch (const py::builtin_exception&) {
    return {};
  } catch (const Error&) {
    return {};
  }
  return host;
}

PyObject* parcel_tensor(PyObject* object, PyObject* const* args, Py_ssize_t given,
                        PyObject* names) {
  return guarded([&]() -> PyObject* {
    ParcelObject* self = parcel_of(object);
    const auto original = [&] {
      return call_python([&] {
        return PyObject_Vectorcall(self->original, args, static_cast<size_t>(given), names);
      });
    };
    if (self->thread != std::this_thread::get_id() || given != 1 || !PyList_CheckExact(args[0]) ||
        !is_called_by(self->codes))
      return original();
    const TensorArguments arguments(args + 1, names);
    if (arguments.others) return original();
    PyObject* list = args[0];
    const Py_ssize_t count = PyList_GET_SIZE(list);
    if (!arguments.dtype && arguments.device && self->minus_one != Py_None && count == 1 &&
        PyLong_CheckExact(PyList_GET_ITEM(list, 0)) &&
        PyLong_AsLong(PyList_GET_ITEM(list, 0)) == -1 && same(arguments.device, self->device)) {
      Py_INCREF(self->minus_one);
      return self->minus_one;
    }
    PyErr_Clear();  // of an int that is no long
    if (self->ended || !arguments.dtype) return original();
    const auto dtype = known_dtype(arguments.dtype);
    at::Tensor host;
    if (dtype) host = read(list, count, *dtype);
    const bool taken =
        host.defined() && (!arguments.device || (same(arguments.device, self->device) &&
                                                 self->parcel->has_room(host.nbytes())));
    if (!taken) {
      give_up(self);
      return original();
    }
    if (arguments.device) return device_copy(self, host);
    auto wrapped = py::reinterpret_steal<py::object>(wrap(host));
    if (!wrapped) throw py::error_already_set();
    static PyMethodDef to = {"to",
                             reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(parcel_to)),
                             METH_FASTCALL | METH_KEYWORDS, nullptr};
    const auto pair = py::reinterpret_steal<py::object>(PyTuple_Pack(2, object, wrapped.ptr()));
    if (!pair) throw py::error_already_set();
    const auto method = py::reinterpret_steal<py::object>(PyCFunction_New(&to, pair.ptr()));
    if (!method || PyObject_SetAttr(wrapped.ptr(), g_to, method.ptr()) != 0)
      throw py::error_already_set();
    self->hosts.push_back(wrapped.inc_ref().ptr());
    return wrapped.release().ptr();
  });
}

// The CPU tensors are torch's own again.
void let_go(ParcelObject* self) {
  for (PyObject* host : std::exchange(self->hosts, {})) {
    if (PyObject_SetAttr(host, g_to, nullptr) != 0) PyErr_Clear();  // somebody took it away
    Py_DECREF(host);
  }
}

// Delivers what is left. Afterwards every call goes to torch.
PyObject* parcel_end(PyObject* object, PyObject*) {
  return guarded([&] {
    ParcelObject* self = parcel_of(object);
    self->ended = true;
    let_go(self);
    deliver(self);
    return PyLong_FromSize_t(self->made);
  });
}

void free_parcel(PyObject* object) {
  ParcelObject* self = parcel_of(object);
  PyTypeObject* type = Py_TYPE(object);
  let_go(self);
  {
    const ReleaseGil release;
    self->parcel.~unique_ptr();
  }
  self->deliver_at.~vector();
  self->hosts.~vector();
  for (PyObject* held : {self->device, self->original, self->codes, self->minus_one})
    Py_XDECREF(held);
  type->tp_free(object);
  Py_DECREF(type);
}

PyTypeObject* g_parcel_type = nullptr;

// parcel(handle, capacity, device, original, codes, deliver_at, minus_one)
PyObject* parcel_fast(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded([&] {
    check_count("parcel", given, 7);
    const std::shared_ptr<StagingPool> pool = pool_of(args[0]);
    const size_t capacity = size_argument(args[1]);
    if (!PyTuple_Check(args[4]) || !PyTuple_Check(args[5]) || !PyTuple_GET_SIZE(args[5]))
      throw py::type_error("codes and deliver_at are tuples");
    std::vector<size_t> deliver_at;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[5]); ++i)
      deliver_at.push_back(size_argument(PyTuple_GET_ITEM(args[5], i)));
    std::unique_ptr<Parcel> parcel;
    {
      const ReleaseGil release;
      parcel = std::make_unique<Parcel>(pool, capacity);
    }
    PyObject* object = g_parcel_type->tp_alloc(g_parcel_type, 0);
    if (!object) throw py::error_already_set();
    ParcelObject* self = parcel_of(object);
    new (&self->parcel) std::unique_ptr<Parcel>(std::move(parcel));
    new (&self->deliver_at) std::vector<size_t>(std::move(deliver_at));
    new (&self->hosts) std::vector<PyObject*>();
    new (&self->thread) std::thread::id(std::this_thread::get_id());
    self->device = py::reinterpret_borrow<py::object>(args[2]).release().ptr();
    self->original = py::reinterpret_borrow<py::object>(args[3]).release().ptr();
    self->codes = py::reinterpret_borrow<py::object>(args[4]).release().ptr();
    self->minus_one = py::reinterpret_borrow<py::object>(args[6]).release().ptr();
    return object;
  });
}

}  // namespace

void add_small_tensors(py::module_& module) {
  static PyMethodDef methods[] = {
      {"tensor", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(parcel_tensor)),
       METH_FASTCALL | METH_KEYWORDS, nullptr},
      {"end", parcel_end, METH_NOARGS, nullptr},
      {},
  };
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(free_parcel)},
      {Py_tp_methods, methods},
      {0, nullptr},
  };
  static PyType_Spec spec = {"pystage._C.Parcel", sizeof(ParcelObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  const auto type = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!type) throw py::error_already_set();
  module.attr("Parcel") = type;
  Py_INCREF(type.ptr());
  g_parcel_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  g_to = PyUnicode_InternFromString("to");
  g_original_to = PyObject_GetAttr(THPVariableClass, g_to);
  if (!g_original_to) throw py::error_already_set();
  static PyMethodDef functions[] = {
      fast_method<small_tensors_fast>("small_tensors", "handle, values, dtypes"),
      fast_method<write_rows_fast>("write_rows",
                                   "handle, table, rest, prefixes, rows, prefix_lens, lens"),
      fast_method<parcel_fast>("parcel",
                               "handle, capacity, device, original, codes, deliver_at, minus_one"),
      {}};
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace pystage

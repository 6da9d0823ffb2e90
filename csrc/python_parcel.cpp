// The type Parcel, which replaces torch.tensor in SGLang's code with a parcel of small tensors.
#include <ATen/ops/empty.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "errors.h"
#include "fast_calls.h"
#include "gil.h"
#include "python.h"
#include "requests.h"
#include "small_tensors.h"

namespace pystage {
namespace {

PyObject* wrap(at::Tensor tensor) { return THPVariable_Wrap(std::move(tensor)); }

// Replaces torch.tensor while known code runs in one thread. That code makes a CPU tensor from a
// list and calls its .to(device, non_blocking=True). With the replacement, the CPU tensor is not
// pinned, and the result of .to() is part of a parcel. Any other call goes to torch.
struct ParcelObject {
  PyObject_HEAD std::unique_ptr<Parcel> parcel;
  PyObject* device;                // the device, as the known code names it
  PyObject* original;              // torch.tensor
  PyObject* groups;                // for each number in deliver_at, a tuple of code objects
  PyObject* minus_one;             // the result of torch.tensor([-1], device=device), or None
  std::vector<size_t> deliver_at;  // deliver after these numbers of tensors
  size_t made;
  size_t group;                  // the one whose tensors are made now
  std::vector<PyObject*> hosts;  // CPU tensors whose .to was replaced
  std::thread::id thread;
  bool ended;
};

ParcelObject* parcel_of(PyObject* self) { return reinterpret_cast<ParcelObject*>(self); }

PyObject* g_to = nullptr;           // "to"
PyObject* g_original_to = nullptr;  // torch.Tensor.to

void deliver(ParcelObject* self) {
  bool asked_pool;
  {
    ReleaseGil release;
    asked_pool = self->parcel->deliver([&] { release.check_signals(); });
  }
  if (asked_pool) self->parcel->pool().may_have_news = true;  // the next stage() logs it
}

// The known code makes an unexpected call: delivers its tensors so far, and takes no more.
void give_up(ParcelObject* self) {
  self->ended = true;
  deliver(self);
}

// Counts one more tensor. Delivers if a round of tensors, which go together, is complete.
void count_one(ParcelObject* self) {
  ++self->made;
  if (self->made != self->deliver_at[self->group]) return;
  deliver(self);
  self->ended = ++self->group == self->deliver_at.size();
}

enum class Caller { kUnknown, kOtherGroup, kThisGroup };

Caller caller_of(const ParcelObject* self) {
  PyFrameObject* frame = PyEval_GetFrame();
  if (!frame) return Caller::kUnknown;
  PyCodeObject* code = PyFrame_GetCode(frame);
  Caller caller = Caller::kUnknown;
  for (size_t group = 0; group < self->deliver_at.size(); ++group) {
    PyObject* codes = PyTuple_GET_ITEM(self->groups, static_cast<Py_ssize_t>(group));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(codes); ++i) {
      if (PyTuple_GET_ITEM(codes, i) != reinterpret_cast<PyObject*>(code)) continue;
      if (group == self->group) caller = Caller::kThisGroup;
      if (caller == Caller::kUnknown) caller = Caller::kOtherGroup;
    }
  }
  Py_DECREF(code);
  return caller;
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

// The arguments that known code passes to torch.tensor after the list.
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

bool is_minus_one(PyObject* value) {
  int overflow = 0;
  return PyLong_CheckExact(value) && PyLong_AsLongAndOverflow(value, &overflow) == -1 && !overflow;
}

std::optional<at::ScalarType> known_dtype(PyObject* dtype) {
  if (!dtype || !THPDtype_Check(dtype)) return std::nullopt;
  const at::ScalarType type = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
  if (type == at::kInt || type == at::kLong || type == at::kFloat) return type;
  return std::nullopt;
}

// Reads a list as a CPU tensor. Undefined if torch might read the list differently or refuse it.
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
    if (self->thread != std::this_thread::get_id() || given != 1 || !PyList_CheckExact(args[0]))
      return original();
    const Caller caller = caller_of(self);
    if (caller == Caller::kUnknown) return original();
    const TensorArguments arguments(args + 1, names);
    if (arguments.others) return original();
    PyObject* list = args[0];
    const Py_ssize_t count = PyList_GET_SIZE(list);
    if (!arguments.dtype && arguments.device && self->minus_one != Py_None && count == 1 &&
        is_minus_one(PyList_GET_ITEM(list, 0)) && same(arguments.device, self->device)) {
      Py_INCREF(self->minus_one);
      return self->minus_one;
    }
    // What another group's code makes may be read at once, so torch makes it.
    if (self->ended || !arguments.dtype || caller != Caller::kThisGroup) return original();
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

// Gives the CPU tensors torch's own .to back.
void let_go(ParcelObject* self) {
  for (PyObject* host : std::exchange(self->hosts, {})) {
    if (PyObject_SetAttr(host, g_to, nullptr) != 0) PyErr_Clear();  // it was already removed
    Py_DECREF(host);
  }
}

// Delivers the remaining tensors. Afterwards every call goes to torch.
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
  for (PyObject* held : {self->device, self->original, self->groups, self->minus_one})
    Py_XDECREF(held);
  type->tp_free(object);
  Py_DECREF(type);
}

PyTypeObject* g_parcel_type = nullptr;

// parcel(handle, capacity, device, original, groups, deliver_at, minus_one)
PyObject* parcel_fast(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded([&] {
    check_count("parcel", given, 7);
    const std::shared_ptr<StagingPool> pool = pool_of(args[0]);
    const size_t capacity = size_argument(args[1]);
    if (!PyTuple_Check(args[4]) || !PyTuple_Check(args[5]) || !PyTuple_GET_SIZE(args[5]) ||
        PyTuple_GET_SIZE(args[4]) != PyTuple_GET_SIZE(args[5]))
      throw py::type_error("groups and deliver_at must be tuples of one length");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[4]); ++i)
      if (!PyTuple_Check(PyTuple_GET_ITEM(args[4], i)))
        throw py::type_error("each group must be a tuple of code objects");
    std::vector<size_t> deliver_at;
    deliver_at.reserve(static_cast<size_t>(PyTuple_GET_SIZE(args[5])));
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
    self->groups = py::reinterpret_borrow<py::object>(args[4]).release().ptr();
    self->minus_one = py::reinterpret_borrow<py::object>(args[6]).release().ptr();
    return object;
  });
}

}  // namespace

void add_parcel(py::module_& module) {
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
      fast_method<parcel_fast>("parcel",
                               "handle, capacity, device, original, codes, deliver_at, minus_one"),
      {}};
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace pystage

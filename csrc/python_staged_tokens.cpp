// The Python type of staged tokens: resolves, slices and reads them.
#include <pybind11/pybind11.h>
#include <structmember.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstddef>
#include <new>
#include <optional>

#include "fast_calls.h"
#include "gil.h"
#include "host_device.h"
#include "python.h"
#include "requests.h"

namespace pystage {
namespace {

at::Tensor tensor_of(py::handle object, const char* name) {
  if (!is_tensor(object.ptr()))
    throw py::type_error(std::string(name) + " is a " + type_name(object.ptr()) + ", not a tensor");
  return THPVariable_Unpack(object.ptr());
}

std::optional<at::Tensor> optional_tensor(py::handle object, const char* name) {
  if (object.is_none()) return std::nullopt;
  return tensor_of(object, name);
}

// Waits for work that no stream orders before its readers. A reader on the CPU has no stream, so
// this waits for ids on the host device, except while a test holds the stream.
py::object finish(Resolved resolved, Device& device, bool blocking) {
  const bool host = resolved.ids.is_cpu();
  if (resolved.fence && (host ? !host_stream_held(host_current_stream()) : blocking)) {
    {
      const ReleaseGil release;
      device.synchronize(resolved.fence);
    }
    if (resolved.tail && resolved.tail->bad) {
      const auto& bad = *resolved.tail->bad;
      throw py::index_error("indices[" + std::to_string(bad.position) + "] is " +
                            std::to_string(bad.value) + ", outside a relay of " +
                            std::to_string(resolved.tail->relay_size) + " ids");
    }
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(resolved.ids)));
}

py::object resolve(StagedTokens& self, py::handle out, py::handle dtype, bool blocking) {
  const std::optional<at::Tensor> out_tensor = optional_tensor(out, "out");
  at::ScalarType scalar_type = at::kLong;
  if (!dtype.is_none()) {
    if (!THPDtype_Check(dtype.ptr()))
      throw py::type_error("dtype is a " + type_name(dtype.ptr()) + ", not a torch.dtype");
    scalar_type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  }
  Resolved resolved;
  {
    const ReleaseGil release;
    resolved = self.resolve(out_tensor, scalar_type, blocking);
  }
  return finish(std::move(resolved), self.pool().core().device(), blocking);
}

py::object resolve_mixed(StagedTokens& self, py::handle relay, py::handle indices, py::handle out) {
  const at::Tensor relay_tensor = tensor_of(relay, "relay");
  const at::Tensor index_tensor = tensor_of(indices, "indices");
  const std::optional<at::Tensor> out_tensor = optional_tensor(out, "out");
  Resolved resolved;
  {
    const ReleaseGil release;
    resolved = self.resolve_mixed(relay_tensor, index_tensor, out_tensor);
  }
  return finish(std::move(resolved), self.pool().core().device(), false);
}

py::object gather_from_relay(const py::object& relay, const py::object& indices,
                             const py::object& out) {
  const at::Tensor relay_tensor = tensor_of(relay, "relay");
  const at::Tensor index_tensor = tensor_of(indices, "indices");
  const std::optional<at::Tensor> out_tensor = optional_tensor(out, "out");
  Resolved resolved;
  {
    const ReleaseGil release;
    resolved = gather_relay(relay_tensor, index_tensor, out_tensor);
  }
  return finish(std::move(resolved), host_device(), false);
}

// stage() and resolve() run once per batch, when the caches hold other data. A call through
// pybind11 then costs 0.6 us, and so does an instance: a tenth of the time of these calls.
// So these two functions, and the type that connects them, use the CPython API directly; pybind11
// binds everything else.

struct StagedTokensObject {
  PyObject_HEAD PyObject* pool;  // the Python pool
  PyObject* weak_references;
  StagedTokens tokens;
};

// The type that stage() creates: pystage.StagedTokens, which derives from the type below. Never
// freed.
PyTypeObject* g_staged_tokens_type = nullptr;

}  // namespace

bool is_staged_tokens(PyObject* object) {
  return g_staged_tokens_type && PyObject_TypeCheck(object, g_staged_tokens_type);
}

namespace {

StagedTokens& tokens_of(PyObject* self) {
  return reinterpret_cast<StagedTokensObject*>(self)->tokens;
}

}  // namespace

PyObject* make_staged_tokens(PyObject* pool, StagedTokens tokens) {
  // This may collect garbage, and so run Python code.
  PyObject* object = called([] { return g_staged_tokens_type->tp_alloc(g_staged_tokens_type, 0); })
                         .release()
                         .ptr();
  auto* self = reinterpret_cast<StagedTokensObject*>(object);
  Py_XINCREF(pool);  // null in a slice of tokens that the garbage collector has cleared
  self->pool = pool;
  new (&self->tokens) StagedTokens(std::move(tokens));
  return object;
}

namespace {

void end_staged_tokens(PyObject* object) {
  PyObject_GC_UnTrack(object);
  auto* self = reinterpret_cast<StagedTokensObject*>(object);
  if (self->weak_references) PyObject_ClearWeakRefs(object);
  PyTypeObject* type = Py_TYPE(object);
  {
    const ReleaseGil release(self->tokens.end_calls_device());
    self->tokens.~StagedTokens();
  }
  Py_XDECREF(self->pool);
  type->tp_free(object);
  Py_DECREF(type);
}

// For the garbage collector: a pool may hold tokens that were staged in it, as an attribute.
int traverse_staged_tokens(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(reinterpret_cast<StagedTokensObject*>(object)->pool);
  return 0;
}
int clear_staged_tokens(PyObject* object) {
  Py_CLEAR(reinterpret_cast<StagedTokensObject*>(object)->pool);
  return 0;
}

PyObject* resolve_fast(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    check_count("_resolve", count, 3);
    const int blocking = PyObject_IsTrue(args[2]);
    if (blocking < 0) throw py::error_already_set();
    return resolve(tokens_of(self), args[0], args[1], blocking).release().ptr();
  });
}

PyObject* resolve_mixed_fast(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    check_count("_resolve_mixed", count, 3);
    return resolve_mixed(tokens_of(self), args[0], args[1], args[2]).release().ptr();
  });
}

PyObject* slice_fast(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    check_count("_slice", count, 2);
    const size_t start = size_argument(args[0]), stop = size_argument(args[1]);
    if (start > stop || stop > tokens_of(self).count())
      throw py::value_error("the slice is out of range for " +
                            std::to_string(tokens_of(self).count()) + " ids");
    return make_staged_tokens(reinterpret_cast<StagedTokensObject*>(self)->pool,
                              tokens_of(self).slice(start, stop));
  });
}

PyObject* copy_fast(PyObject* self, PyObject*) {
  return guarded([&] { return THPVariable_Wrap(tokens_of(self).cpu()); });
}

Py_ssize_t staged_tokens_length(PyObject* self) {
  return static_cast<Py_ssize_t>(tokens_of(self).count());
}

py::object make_staged_tokens_base() {
  static PyMethodDef methods[] = {
      fast_method<resolve_fast>("_resolve", "out, dtype, blocking"),
      fast_method<resolve_mixed_fast>("_resolve_mixed", "relay, indices, out"),
      fast_method<slice_fast>("_slice", "start, stop"),
      {"_copy", copy_fast, METH_NOARGS, nullptr},
      {},
  };
  static PyMemberDef members[] = {
      {"_pool", T_OBJECT_EX, offsetof(StagedTokensObject, pool), READONLY, nullptr},
      {"__weaklistoffset__", T_PYSSIZET, offsetof(StagedTokensObject, weak_references), READONLY,
       nullptr},
      {},
  };
  static PyGetSetDef properties[] = {
      {"_is_pinned",
       [](PyObject* self, void*) { return PyBool_FromLong(tokens_of(self).is_pinned()); }, nullptr,
       nullptr, nullptr},
      {"_wire_bits",
       [](PyObject* self, void*) { return PyLong_FromSize_t(8 * size_of(tokens_of(self).wire())); },
       nullptr, nullptr, nullptr},
      {},
  };
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(end_staged_tokens)},
      {Py_tp_traverse, reinterpret_cast<void*>(traverse_staged_tokens)},
      {Py_tp_clear, reinterpret_cast<void*>(clear_staged_tokens)},
      {Py_tp_methods, methods},
      {Py_tp_members, members},
      {Py_tp_getset, properties},
      {Py_sq_length, reinterpret_cast<void*>(staged_tokens_length)},
      {0, nullptr},
  };
  static PyType_Spec spec = {"pystage._C.StagedTokens", sizeof(StagedTokensObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC |
                                 Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             slots};
  return py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
}

void set_staged_tokens_type(const py::object& type) {
  Py_INCREF(type.ptr());
  g_staged_tokens_type = reinterpret_cast<PyTypeObject*>(type.ptr());
}

}  // namespace

void add_staged_tokens(py::module_& module) {
  module.attr("StagedTokens") = make_staged_tokens_base();
  module.def("set_staged_tokens_type", &set_staged_tokens_type, py::arg("type"));
  module.def("gather", &gather_from_relay, py::arg("relay"), py::arg("indices"), py::arg("out"));
}

}  // namespace pystage

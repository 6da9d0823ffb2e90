#include "ids_view.h"

#include <new>

namespace pystage {
namespace {

// Holds the array and not its buffer, so that the array can grow. A reader of the view exports the
// buffer only while it reads.
struct IdsView {
  PyObject_HEAD PyObject* ids;
  Py_ssize_t start, stop;
};

PyTypeObject* g_type = nullptr;  // never freed

IdsView& view_of(PyObject* object) { return *reinterpret_cast<IdsView*>(object); }

PyObject* make_view(PyObject* ids, Py_ssize_t start, Py_ssize_t stop) {
  PyObject* object = g_type->tp_alloc(g_type, 0);
  if (!object) return nullptr;
  Py_INCREF(ids);
  view_of(object).ids = ids;
  view_of(object).start = start;
  view_of(object).stop = stop;
  return object;
}

// ids_view(ids, start, stop) is like ids[start:stop]: bounds outside the array are clipped.
PyObject* ids_view(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) {
    PyErr_Format(PyExc_TypeError, "ids_view takes 3 arguments, not %zd", count);
    return nullptr;
  }
  Py_ssize_t bounds[2];
  for (int i = 0; i < 2; ++i) {
    bounds[i] = PyNumber_AsSsize_t(args[i + 1], nullptr);  // clipped, as in a slice
    if (bounds[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const Py_ssize_t length = PyObject_Length(args[0]);
  if (length < 0) return nullptr;
  const Py_ssize_t size = PySlice_AdjustIndices(length, &bounds[0], &bounds[1], 1);
  if (Py_TYPE(args[0]) != g_type) return make_view(args[0], bounds[0], bounds[0] + size);
  const IdsView& view = view_of(args[0]);  // no chain of views, whose end would be recursive
  return make_view(view.ids, view.start + bounds[0], view.start + bounds[0] + size);
}

void end_view(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  Py_DECREF(view_of(object).ids);
  type->tp_free(object);
  Py_DECREF(type);
}

Py_ssize_t length_of(PyObject* object) { return view_of(object).stop - view_of(object).start; }

PyObject* copy_of(PyObject* object, PyObject*) {
  const IdsView& view = view_of(object);
  return PySequence_GetSlice(view.ids, view.start, view.stop);
}

PyObject* iterate(PyObject* object) {
  PyObject* copy = copy_of(object, nullptr);
  if (!copy) return nullptr;
  PyObject* iterator = PyObject_GetIter(copy);
  Py_DECREF(copy);
  return iterator;
}

// A slice of step 1 gives another view. Any other key is passed to a copy of the ids as an array.
PyObject* get_item(PyObject* object, PyObject* key) {
  const IdsView& view = view_of(object);
  if (PySlice_Check(key)) {
    Py_ssize_t start, stop, step;
    if (PySlice_Unpack(key, &start, &stop, &step) < 0) return nullptr;
    if (step == 1) {
      const Py_ssize_t size = PySlice_AdjustIndices(length_of(object), &start, &stop, 1);
      return make_view(view.ids, view.start + start, view.start + start + size);
    }
  }
  PyObject* copy = copy_of(object, nullptr);
  if (!copy) return nullptr;
  PyObject* item = PyObject_GetItem(copy, key);
  Py_DECREF(copy);
  return item;
}

struct Export {
  Py_buffer whole;
  Py_ssize_t count, stride;
};

// Whether a reader assumes that the items are contiguous. PyBUF_STRIDES includes PyBUF_ND's bit.
bool wants_contiguous(int flags) {
  constexpr int kContiguous =
      // NOLINTNEXTLINE(misc-redundant-expression): the macros have bits in common
      (PyBUF_C_CONTIGUOUS | PyBUF_F_CONTIGUOUS | PyBUF_ANY_CONTIGUOUS) & ~PyBUF_STRIDES;
  return (flags & PyBUF_STRIDES) != PyBUF_STRIDES || (flags & kContiguous);
}

int get_buffer(PyObject* object, Py_buffer* out, int flags) {
  const IdsView& view = view_of(object);
  out->obj = nullptr;
  if (flags & PyBUF_WRITABLE) {
    PyErr_SetString(PyExc_BufferError, "a view of ids is read-only");
    return -1;
  }
  auto* made = new (std::nothrow) Export;
  if (!made) {
    PyErr_NoMemory();
    return -1;
  }
  Py_buffer& whole = made->whole;
  if (PyObject_GetBuffer(view.ids, &whole, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    delete made;
    return -1;
  }
  made->count = length_of(object);
  made->stride = whole.strides ? whole.strides[0] : whole.itemsize;
  const char* problem = nullptr;
  if (whole.ndim != 1)
    problem = "a view of ids needs an array of one dimension";
  else if (view.stop > whole.shape[0])
    problem = "the array has fewer ids than when the view was made";
  else if (made->stride != whole.itemsize && made->count > 1 && wants_contiguous(flags))
    problem = "these ids are not contiguous, and this reader takes no strides";
  if (problem) {
    PyErr_SetString(PyExc_BufferError, problem);
    PyBuffer_Release(&whole);
    delete made;
    return -1;
  }
  out->buf = static_cast<char*>(whole.buf) + view.start * made->stride;
  Py_INCREF(object);
  out->obj = object;
  out->len = made->count * whole.itemsize;
  out->itemsize = whole.itemsize;
  out->readonly = 1;
  out->ndim = 1;
  out->format = flags & PyBUF_FORMAT ? whole.format : nullptr;
  out->shape = flags & PyBUF_ND ? &made->count : nullptr;
  out->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? &made->stride : nullptr;
  out->suboffsets = nullptr;
  out->internal = made;
  return 0;
}

void release_buffer(PyObject*, Py_buffer* out) {
  auto* made = static_cast<Export*>(out->internal);
  PyBuffer_Release(&made->whole);
  delete made;
}

PyObject* make_type() {
  static PyMethodDef methods[] = {{"copy", copy_of, METH_NOARGS, "As an array of its own."}, {}};
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(end_view)},
      {Py_tp_iter, reinterpret_cast<void*>(iterate)},
      {Py_tp_methods, methods},
      {Py_mp_length, reinterpret_cast<void*>(length_of)},
      {Py_mp_subscript, reinterpret_cast<void*>(get_item)},
      {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)},
      {Py_bf_releasebuffer, reinterpret_cast<void*>(release_buffer)},
      {0, nullptr},
  };
  // Arrays hold no references, so no cycle goes through a view, and it needs no garbage collection.
  static PyType_Spec spec = {"pystage._C.IdsView", sizeof(IdsView), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace

int add_ids_view(PyObject* module) {
  static PyMethodDef functions[] = {
      {"ids_view", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(ids_view)),
       METH_FASTCALL, "ids, start, stop"},
      {}};
  PyObject* type = make_type();
  if (!type) return -1;
  g_type = reinterpret_cast<PyTypeObject*>(type);
  Py_INCREF(type);
  if (PyModule_AddObject(module, "IdsView", type) != 0) return -1;
  return PyModule_AddFunctions(module, functions);
}

}  // namespace pystage

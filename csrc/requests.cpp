#include "requests.h"

#include <torch/csrc/autograd/python_variable.h>

#include <limits>
#include <optional>
#include <string_view>

#include "errors.h"
#include "gil.h"
#include "python.h"
#include "staging.h"

namespace pystage {

std::string where(size_t request) { return "token_ids[" + std::to_string(request) + "]"; }

std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

bool is_tensor(PyObject* object) {
  return THPVariableClass &&
         PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

static std::string where(size_t request, size_t position) {
  return where(request) + "[" + std::to_string(position) + "]";
}

namespace {

// --- lists of ints -----------------------------------------------------------------------------

// Ints of one digit (below 2^30, which includes all token ids) are read in place.
inline bool compact_int(PyObject* object, int64_t* value) {
  if (!PyLong_CheckExact(object)) return false;
#if PY_VERSION_HEX >= 0x030C0000
  auto* as_long = reinterpret_cast<PyLongObject*>(object);
  if (!PyUnstable_Long_IsCompact(as_long)) return false;
  *value = PyUnstable_Long_CompactValue(as_long);
#elif PY_VERSION_HEX >= 0x030B0000
  const Py_ssize_t digits = Py_SIZE(object);
  if (digits < -1 || digits > 1) return false;
  *value = digits * static_cast<int64_t>(reinterpret_cast<PyLongObject*>(object)->ob_digit[0]);
#else
  return false;
#endif
  return true;
}

// Any int, or object with __index__ (a NumPy integer). May run Python code.
int64_t any_int(PyObject* object, size_t request, size_t position) {
  const auto index =
      py::reinterpret_steal<py::object>(call_python([object] { return PyNumber_Index(object); }));
  if (!index) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(where(request, position) + " is a " + type_name(object) + ", not an int" +
                         (PySequence_Check(object) ? ": token_ids is one level too deep" : ""));
  }
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow) throw py::value_error(where(request, position) + " does not fit int64");
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// part.data is a list or tuple to which the caller holds a reference. Reading an id may run Python
// code, which may change the list, so each item is looked up when it is read.
PyObject* item(const Part& part, size_t index) {
  auto* sequence = static_cast<PyObject*>(const_cast<void*>(part.data));
  const size_t at = part.first + index;
  if (at >= static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence)))
    throw Error(where(part.request) + " shrank while it was staged");
  return PySequence_Fast_GET_ITEM(sequence, static_cast<Py_ssize_t>(at));
}

int64_t read_id(const Part& part, size_t index) {
  PyObject* object = item(part, index);
  int64_t value;
  if (compact_int(object, &value)) return value;
  const auto keep = py::reinterpret_borrow<py::object>(object);
  return any_int(object, part.request, part.first + index);
}

// Reads ints of one digit. Returns whether all lie within the bounds, or null if there is an int of
// another kind. The int objects of a list are scattered over many pages. Reading at four positions
// at once, with prefetching, hides the memory latency.
template <typename Out>
std::optional<bool> read_compact(PyObject* const* items, size_t count, Out* dst, Bounds bounds) {
  constexpr size_t kRuns = 4, kAhead = 32;
  bool ok = true;
  int64_t value;
  const size_t run = count / kRuns;
  for (size_t i = 0; i < run; ++i) {
    for (size_t at = i; at < run * kRuns; at += run) {
      if (i + kAhead < run) __builtin_prefetch(items[at + kAhead]);
      if (!compact_int(items[at], &value)) return std::nullopt;
      ok &= value >= bounds.lo && value <= bounds.hi;
      dst[at] = static_cast<Out>(value);
    }
  }
  for (size_t at = run * kRuns; at < count; ++at) {
    if (!compact_int(items[at], &value)) return std::nullopt;
    ok &= value >= bounds.lo && value <= bounds.hi;
    dst[at] = static_cast<Out>(value);
  }
  return ok;
}

template <typename Out>
bool read_list(const Part& part, Out* dst, const Bounds& bounds) {
  auto* sequence = static_cast<PyObject*>(const_cast<void*>(part.data));
  if (static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence)) >= part.first + part.count) {
    // No Python code runs in here, so the items stay where they are.
    PyObject* const* items = PySequence_Fast_ITEMS(sequence) + part.first;
    if (const auto ok = read_compact(items, part.count, dst, bounds)) return *ok;
  }
  bool ok = true;
  for (size_t i = 0; i < part.count; ++i) {
    const int64_t value = read_id(part, i);
    ok &= value >= bounds.lo && value <= bounds.hi;
    dst[i] = static_cast<Out>(value);
  }
  return ok;
}

bool read_part(const Part& part, void* dst, IntType wire, const Bounds* bounds) {
  constexpr Bounds any{std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};
  const Bounds& b = bounds ? *bounds : any;
  return wire == IntType::kInt32 ? read_list(part, static_cast<int32_t*>(dst), b)
                                 : read_list(part, static_cast<int64_t*>(dst), b);
}

// --- buffers and tensors -----------------------------------------------------------------------

// Accepts signed native integers of 4 or 8 bytes, with any format letter that this platform uses.
bool int_format(const Py_buffer& view, IntType* type) {
  const char* f = view.format ? view.format : "B";
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  constexpr std::string_view kNative = "@=<";
#else
  constexpr std::string_view kNative = "@=";
#endif
  if (*f && kNative.find(*f) != kNative.npos) ++f;
  if ((*f != 'i' && *f != 'l' && *f != 'q' && *f != 'n') || f[1] != '\0') return false;
  if (view.itemsize == 4)
    *type = IntType::kInt32;
  else if (view.itemsize == 8)
    *type = IntType::kInt64;
  else
    return false;
  return true;
}

}  // namespace

void Parts::add(PyObject* object) {
  Part part;
  part.request = parts_.size();
  if (PyList_Check(object) || PyTuple_Check(object)) {
    part.data = object;
    part.count = static_cast<size_t>(PySequence_Fast_GET_SIZE(object));
    part.read = read_part;
    part.read_id = read_id;
    owners_.push_back(py::reinterpret_borrow<py::object>(object));
    has_lists_ = true;
  } else if (PyObject_CheckBuffer(object)) {
    add_buffer(part, object);
  } else if (is_tensor(object)) {
    add_tensor(part, object);
  } else if (is_staged_tokens(object)) {
    throw py::type_error(where(part.request) +
                         " is staged already: resolve it, or stage a copy, [staged.cpu()]");
  } else if (PyIndex_Check(object)) {
    throw py::type_error(where(part.request) +
                         " is an int: token_ids is a sequence of sequences, so wrap a single "
                         "request as [ids]");
  } else {
    throw py::type_error(where(part.request) + " is a " + type_name(object) +
                         "; a request is a list or tuple of ints, an array('i' or 'q'), or an "
                         "int32 or int64 NumPy array, CPU tensor or buffer");
  }
  parts_.push_back(part);
}

void Parts::narrow(size_t request, size_t start, size_t stop) {
  Part& part = parts_[request];
  part.count = stop - start;
  part.first = start;
  if (!part.read)
    part.data = static_cast<const char*>(part.data) + static_cast<ptrdiff_t>(start) * part.stride;
}

void Parts::add_tensor(Part& part, PyObject* object) {
  at::Tensor tensor = THPVariable_Unpack(object);
  const std::string name = where(part.request);
  if (!tensor.is_cpu())
    throw py::value_error(name + " is on " + tensor.device().str() +
                          ": ids are gathered on the host, so pass a CPU tensor");
  if (tensor.scalar_type() != at::kLong && tensor.scalar_type() != at::kInt)
    throw py::type_error(name + " has dtype " + c10::toString(tensor.scalar_type()) +
                         ": ids are int32 or int64");
  if (tensor.dim() != 1)
    throw py::value_error(name + " has " + std::to_string(tensor.dim()) +
                          " dimensions: a request is 1-D");
  check_memory(tensor, name);
  tensor = tensor.resolve_neg();
  part.type = tensor.scalar_type() == at::kInt ? IntType::kInt32 : IntType::kInt64;
  part.count = static_cast<size_t>(tensor.size(0));
  part.stride =
      static_cast<ptrdiff_t>(tensor.stride(0)) * static_cast<ptrdiff_t>(size_of(part.type));
  part.data = tensor.const_data_ptr();
  tensors_.push_back(std::move(tensor));
}

void Parts::add_buffer(Part& part, PyObject* object) {
  Py_buffer& view = views_.emplace_back();
  if (call_python(
          [&] { return PyObject_GetBuffer(object, &view, PyBUF_STRIDES | PyBUF_FORMAT); })) {
    views_.pop_back();  // the destructor releases only the others
    throw py::error_already_set();
  }
  if (view.ndim != 1)
    throw py::value_error(where(part.request) + " has " + std::to_string(view.ndim) +
                          " dimensions: a request is 1-D");
  if (!int_format(view, &part.type))
    throw py::type_error(where(part.request) + " (" + type_name(object) +
                         ") holds items of format '" + (view.format ? view.format : "B") +
                         "' and " + std::to_string(view.itemsize) +
                         " bytes: ids are native int32 or int64, so convert them first");
  part.count = static_cast<size_t>(view.shape[0]);
  part.stride = view.strides ? view.strides[0] : view.itemsize;
  part.data = view.buf;
}

// --- arguments ---------------------------------------------------------------------------------

py::object as_fast_sequence(py::handle object, const char* name) {
  if (PyUnicode_Check(object.ptr()) || PyDict_Check(object.ptr()))
    throw py::type_error(std::string(name) + " is a " + type_name(object.ptr()) +
                         ", not a sequence");
  if (is_staged_tokens(object.ptr()))
    throw py::type_error(std::string(name) +
                         " are staged already: resolve them, or stage a copy, [staged.cpu()]");
  PyObject* fast = call_python([&] { return PySequence_Fast(object.ptr(), "not a sequence"); });
  if (!fast) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(std::string(name) + " is a " + type_name(object.ptr()) +
                         ", not a sequence");
  }
  return py::reinterpret_steal<py::object>(fast);
}

std::vector<size_t> read_ends(py::handle object, const char* name, size_t count) {
  const py::object fast = as_fast_sequence(object, name);
  const size_t size = static_cast<size_t>(PySequence_Fast_GET_SIZE(fast.ptr()));
  if (size != count)
    throw py::value_error(std::string(name) + " has " + std::to_string(size) + " entries for " +
                          std::to_string(count) + " requests");
  std::vector<size_t> ends;
  ends.reserve(size);
  for (size_t i = 0; i < count; ++i) {
    if (i >= static_cast<size_t>(PySequence_Fast_GET_SIZE(fast.ptr())))
      throw Error(std::string(name) + " shrank while it was read");
    const auto end = py::reinterpret_borrow<py::object>(
        PySequence_Fast_GET_ITEM(fast.ptr(), static_cast<Py_ssize_t>(i)));
    const Py_ssize_t value =
        call_python([&] { return PyNumber_AsSsize_t(end.ptr(), PyExc_OverflowError); });
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (value < 0)
      throw py::value_error(std::string(name) + "[" + std::to_string(i) + "] is " +
                            std::to_string(value) + ": positions count from 0");
    ends.push_back(static_cast<size_t>(value));
  }
  return ends;
}

}  // namespace pystage

// pystage._C: Python objects in, staged tokens and tensors out. pystage/_C.pyi describes it.
#include <ATen/core/Tensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <structmember.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstddef>
#include <limits>
#include <new>
#include <optional>
#include <vector>

#include "fast_calls.h"
#include "gil.h"
#include "host_device.h"
#include "ids_view.h"
#include "python_small.h"
#include "requests.h"
#include "staging.h"
#ifdef PYSTAGE_WITH_CUDA
#include "cuda_device.h"
#endif

namespace pystage {
namespace {

constexpr Bounds kInt32Bounds{std::numeric_limits<int32_t>::min(),
                              std::numeric_limits<int32_t>::max()};
// Gathers at least this large (some 20 us) let other Python threads run meanwhile.
constexpr size_t kReleaseGil = size_t{64} << 10;
// No memory holds more ids; a view of stride 0 may count more, and its bytes would wrap.
constexpr size_t kMaxIds = std::numeric_limits<size_t>::max() / 16;

// --- stage -------------------------------------------------------------------------------------

// Says once, for a pool, that and why its memory is pageable.
void warn_if_pageable(StagingPool& pool) {
  const std::string why = pool.core().why_pageable();
  if (why.empty() || pool.warned_pageable) return;
  pool.warned_pageable = true;
  const std::string text = "pystage stages in pageable memory: " + why +
                           ". Ids stay correct; transfers are slower and may block the host";
  const py::object category = py::module_::import("pystage.errors").attr("PageableMemoryWarning");
  if (call_python([&] { return PyErr_WarnEx(category.ptr(), text.c_str(), 1); }) != 0)
    throw py::error_already_set();
}

std::shared_ptr<Lease> acquire(StagingPool& pool, size_t bytes) {
  if (auto lease = pool.core().try_acquire(bytes, /*ask_device=*/false)) return lease;
  std::shared_ptr<Lease> lease;
  {
    ReleaseGil release;  // this asks the device, pins memory, or waits
    lease = pool.core().acquire(bytes, [&] { release.check_signals(); });
  }
  warn_if_pageable(pool);
  return lease;
}

StagedTokens stage(const std::shared_ptr<StagingPool>& self, py::handle token_ids,
                   py::handle starts, py::handle stops, std::optional<int64_t> vocab_size) {
  Pool& pool = self->core();
  if (vocab_size && *vocab_size < 1)
    throw py::value_error("vocab_size is " + std::to_string(*vocab_size) + ", not positive");
  const py::object requests = as_fast_sequence(token_ids, "token_ids");
  const size_t count = static_cast<size_t>(PySequence_Fast_GET_SIZE(requests.ptr()));
  // Read before any buffer is exported: reading them may run Python code.
  std::vector<size_t> first, last;
  if (!starts.is_none()) first = read_ends(starts, "starts", count);
  if (!stops.is_none()) last = read_ends(stops, "stops", count);
  Parts parts(count);
  size_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    if (i >= static_cast<size_t>(PySequence_Fast_GET_SIZE(requests.ptr())))
      throw Error("token_ids shrank while it was read");
    // A reference of our own: asking a request for its buffer may run code that changes the list.
    const auto request = py::reinterpret_borrow<py::object>(
        PySequence_Fast_GET_ITEM(requests.ptr(), static_cast<Py_ssize_t>(i)));
    parts.add(request.ptr());
    const size_t length = parts[i].count;
    const size_t start = first.empty() ? 0 : first[i];
    const size_t stop = last.empty() ? length : last[i];
    if (start > stop || stop > length)
      throw py::value_error(where(i) + " has " + std::to_string(length) + " ids, but [" +
                            std::to_string(start) + ", " + std::to_string(stop) +
                            ") was asked for");
    if (start != 0 || stop != length) parts.narrow(i, start, stop);
    total += parts[i].count;
    if (total > kMaxIds)
      throw RequestTooLargeError("a batch of " + std::to_string(total) + " ids can never fit");
  }

  const bool release_gil = !parts.has_lists() && total >= kReleaseGil;
  auto run = [&](void* dst, IntType wire, const Bounds* bounds) {
    const ReleaseGil release(release_gil);
    return gather(parts.data(), parts.size(), dst, wire, bounds);
  };
  auto out_of_vocab = [&](const Violation& v) {
    return vocab_size && (v.value < 0 || v.value >= *vocab_size);
  };
  auto raise_out_of_vocab = [&](const Violation& v) {
    ++pool.counters().range_errors;
    throw TokenRangeError(v.request, v.position, v.value, *vocab_size);
  };
  const std::optional<Bounds> vocab_bounds =
      vocab_size ? std::optional<Bounds>({0, *vocab_size - 1}) : std::nullopt;
  // Within both the vocabulary and int32: the first id outside is the first outside either.
  const Bounds narrow_bounds =
      vocab_size ? Bounds{0, std::min(*vocab_size - 1, kInt32Bounds.hi)} : kInt32Bounds;
  auto staged = [&](StagedTokens tokens) {
    pool.counters().stages += 1;
    pool.counters().tokens += total;
    if (self->options().eager) {
      const ReleaseGil release;
      tokens.start_eager();
    }
    return tokens;
  };

  if (total == 0) {
    pool.check_usable();
    return staged({self, nullptr, IntType::kInt32, 0, true});
  }
  // int32 first; ids that do not fit are rare, and gathered again as int64. A wide wire is checked
  // against int32 as well: it decides whether int32 output can be had.
  bool fits_int32 = true;
  if (self->options().narrow_wire) {
    auto lease = acquire(*self, total * sizeof(int32_t));
    if (lease) {
      const auto violation = run(lease->data(), IntType::kInt32, &narrow_bounds);
      if (!violation) return staged({self, std::move(lease), IntType::kInt32, total, true});
      if (out_of_vocab(*violation)) raise_out_of_vocab(*violation);
      fits_int32 = false;
    }
  }
  std::shared_ptr<Lease> lease = acquire(*self, total * sizeof(int64_t));
  at::Tensor fallback;
  void* dst;
  if (lease) {
    dst = lease->data();
  } else {
    ++pool.counters().fallbacks;
    {
      const ReleaseGil release;  // this pins memory
      fallback = fallback_memory(self->device(), total);
    }
    dst = fallback.mutable_data_ptr();
  }
  if (fits_int32) {
    const auto violation = run(dst, IntType::kInt64, &narrow_bounds);
    if (violation && out_of_vocab(*violation)) raise_out_of_vocab(*violation);
    fits_int32 = !violation;
  }
  if (!fits_int32) {
    const auto violation = run(dst, IntType::kInt64, vocab_bounds ? &*vocab_bounds : nullptr);
    if (violation) raise_out_of_vocab(*violation);
  }
  if (lease) return staged({self, std::move(lease), IntType::kInt64, total, fits_int32});
  return staged({self, std::move(fallback), fits_int32});
}

// --- resolve -----------------------------------------------------------------------------------

at::Tensor tensor_of(py::handle object, const char* name) {
  if (!is_tensor(object.ptr()))
    throw py::type_error(std::string(name) + " is a " + type_name(object.ptr()) + ", not a tensor");
  return THPVariable_Unpack(object.ptr());
}

std::optional<at::Tensor> optional_tensor(py::handle object, const char* name) {
  if (object.is_none()) return std::nullopt;
  return tensor_of(object, name);
}

// Waits for what a reader could not be ordered behind. A reader on the CPU has no stream, so the
// host device's ids are waited for; not while a test holds the stream.
py::object finish(Resolved resolved, Device& device, bool blocking) {
  const bool host = resolved.ids.is_cpu();
  if (resolved.fence && (host ? !host_stream_held(host_current_stream()) : blocking)) {
    {
      const ReleaseGil release;
      device.synchronize(resolved.fence);
    }
    if (resolved.tail && resolved.tail->bad) {
      const RelayTail& tail = *resolved.tail;
      throw py::index_error("indices[" + std::to_string(tail.bad->position) + "] is " +
                            std::to_string(tail.bad->value) + ", outside a relay of " +
                            std::to_string(tail.relay_size) + " ids");
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

py::dict stats(const StagingPool& pool) {
  PoolStats s;
  {
    const ReleaseGil release;
    s = pool.core().stats();
  }
  py::dict d;
#define PYSTAGE_STAT(name) d[#name] = s.name
  PYSTAGE_STAT(capacity_bytes);
  PYSTAGE_STAT(reserved_bytes);
  PYSTAGE_STAT(in_use_bytes);
  PYSTAGE_STAT(high_water_bytes);
  PYSTAGE_STAT(pageable_bytes);
  PYSTAGE_STAT(leased_slots);
  PYSTAGE_STAT(in_flight_slots);
  PYSTAGE_STAT(quarantined_slots);
  PYSTAGE_STAT(stages);
  PYSTAGE_STAT(tokens);
  PYSTAGE_STAT(wire_bytes);
  PYSTAGE_STAT(waits);
  PYSTAGE_STAT(wait_seconds);
  PYSTAGE_STAT(exhausted);
  PYSTAGE_STAT(fallbacks);
  PYSTAGE_STAT(allocations);
  PYSTAGE_STAT(frees);
  PYSTAGE_STAT(range_errors);
  PYSTAGE_STAT(kernel_transfers);
  PYSTAGE_STAT(copy_engine_transfers);
  PYSTAGE_STAT(eager_transfers);
  PYSTAGE_STAT(fallback_transfers);
#undef PYSTAGE_STAT
  return d;
}

void close(StagingPool& pool) {
  pool.closing = true;
  try {
    ReleaseGil release;
    pool.close([&] { release.check_signals(); });
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

// The end of a pool unpins memory. The last to hold it may have the GIL, or not.
void end_pool(StagingPool* pool) {
  const ReleaseGil release(Py_IsInitialized() && PyGILState_Check());
  delete pool;
}

// --- tests' hold -------------------------------------------------------------------------------

// Keeps the calling thread's current stream of a pool, and the pool's eager stream, pending.
class Hold {
 public:
  explicit Hold(const StagingPool& pool) {
    hold(pool, pool.current_stream());
    if (pool.options().eager) hold(pool, pool.eager_stream());
  }
  void release() { holds_.clear(); }

 private:
  void hold(const StagingPool& pool, StreamHandle stream) {
    Device& device = pool.core().device();  // not the pool: a test may drop it
    holds_.emplace_back(device.hold(stream), [&device](void* hold) { device.release(hold); });
  }
  std::vector<std::shared_ptr<void>> holds_;
};

// Waits until the current stream, and the pool's eager stream, have done what was put on them.
void synchronize(const StagingPool& pool) {
  Device& device = pool.core().device();
  std::vector<StreamHandle> streams{pool.current_stream()};
  if (pool.options().eager) streams.push_back(pool.eager_stream());
  const DeviceScope scope(pool.device());
  const ReleaseGil release;
  const std::shared_ptr<void> fence = make_fence(device);
  for (const StreamHandle stream : streams) {
    device.record(fence.get(), stream);
    device.synchronize(fence.get());
  }
}

template <typename E>
void raise_as(const char* name, const E& error) {
  PyErr_SetString(py::module_::import("pystage.errors").attr(name).ptr(), error.what());
}

}  // namespace

void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const TokenRangeError& e) {
    const py::object type = py::module_::import("pystage.errors").attr("TokenRangeError");
    const py::object error = type(e.what(), e.request, e.position, e.value, e.vocab_size);
    PyErr_SetObject(type.ptr(), error.ptr());
  } catch (const RequestTooLargeError& e) {
    raise_as("RequestTooLargeError", e);
  } catch (const PoolExhaustedError& e) {
    raise_as("PoolExhaustedError", e);
  } catch (const PoolClosedError& e) {
    raise_as("PoolClosedError", e);
  } catch (const ForkedProcessError& e) {
    raise_as("ForkedProcessError", e);
  } catch (const CaptureError& e) {
    raise_as("CaptureError", e);
  } catch (const DeviceError& e) {
    raise_as("DeviceError", e);
  } catch (const Error& e) {
    raise_as("PystageError", e);
  } catch (const c10::TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  }
}

namespace {

// --- staged tokens as a Python type --------------------------------------------------------------

// stage() and resolve() run once a batch, when the caches hold something else. A call through
// pybind11 then costs 0.6 us, and so does an instance: a tenth of both calls. So these two, and the
// type between them, are written for CPython; all else is bound by pybind11.

struct StagedTokensObject {
  PyObject_HEAD PyObject* pool;  // the Python pool
  PyObject* weak_references;
  StagedTokens tokens;
};

// What stage() makes: pystage.StagedTokens, which derives from the type below. Never freed.
PyTypeObject* g_staged_tokens_type = nullptr;

StagedTokens& tokens_of(PyObject* self) {
  return reinterpret_cast<StagedTokensObject*>(self)->tokens;
}

PyObject* make_staged_tokens(PyObject* pool, StagedTokens tokens) {
  PyObject* object = g_staged_tokens_type->tp_alloc(g_staged_tokens_type, 0);
  if (!object) throw py::error_already_set();
  auto* self = reinterpret_cast<StagedTokensObject*>(object);
  Py_XINCREF(pool);  // null in a slice of what the garbage collector has cleared
  self->pool = pool;
  new (&self->tokens) StagedTokens(std::move(tokens));
  return object;
}

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

// For the garbage collector: a pool may hold what was staged in it, as an attribute.
int traverse_staged_tokens(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(reinterpret_cast<StagedTokensObject*>(object)->pool);
  return 0;
}
int clear_staged_tokens(PyObject* object) {
  Py_CLEAR(reinterpret_cast<StagedTokensObject*>(object)->pool);
  return 0;
}

constexpr const char* kPoolCapsule = "pystage.StagingPool";

}  // namespace

const std::shared_ptr<StagingPool>& pool_of(PyObject* handle) {
  void* pool = PyCapsule_GetPointer(handle, kPoolCapsule);
  if (!pool) throw py::error_already_set();
  return *static_cast<std::shared_ptr<StagingPool>*>(pool);
}

namespace {

// stage(handle, pool, token_ids, starts, stops, vocab_size)
PyObject* stage_fast(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    check_count("stage", count, 6);
    const std::shared_ptr<StagingPool>& pool = pool_of(args[0]);
    std::optional<int64_t> vocab_size;
    if (args[5] != Py_None) {
      int overflow = 0;
      vocab_size = PyLong_AsLongLongAndOverflow(args[5], &overflow);
      if (overflow) throw py::value_error("vocab_size does not fit int64");
      if (*vocab_size == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    return make_staged_tokens(args[1], stage(pool, args[2], args[3], args[4], vocab_size));
  });
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
      throw py::value_error("no such slice of " + std::to_string(tokens_of(self).count()) + " ids");
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

py::capsule pool_handle(const std::shared_ptr<StagingPool>& pool) {
  return py::capsule(new std::shared_ptr<StagingPool>(pool), kPoolCapsule, [](PyObject* capsule) {
    delete static_cast<std::shared_ptr<StagingPool>*>(PyCapsule_GetPointer(capsule, kPoolCapsule));
  });
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of pystage; use the pystage package.";
  py::register_exception_translator(translate);

  py::class_<StagingPool, std::shared_ptr<StagingPool>>(m, "StagingPool")
      .def(py::init([](const std::string& device, size_t capacity_bytes, size_t reserve_bytes,
                       const std::string& at_capacity, double timeout_s, bool eager,
                       bool copy_engine, bool narrow_wire) {
             StagingOptions options;
             options.pool.capacity_bytes = capacity_bytes;
             options.pool.reserve_bytes = reserve_bytes;
             options.pool.at_capacity = at_capacity == "wait"       ? AtCapacity::kWait
                                        : at_capacity == "fallback" ? AtCapacity::kFallback
                                                                    : AtCapacity::kRaise;
             options.pool.timeout_s = timeout_s;
             options.eager = eager;
             options.copy_engine = copy_engine;
             options.narrow_wire = narrow_wire;
             std::shared_ptr<StagingPool> pool;
             {
               const ReleaseGil release;
               pool = {new StagingPool(c10::Device(device), options), end_pool};
             }
             warn_if_pageable(*pool);
             return pool;
           }),
           py::kw_only(), py::arg("device"), py::arg("capacity_bytes"), py::arg("reserve_bytes"),
           py::arg("at_capacity"), py::arg("timeout_s"), py::arg("eager"), py::arg("copy_engine"),
           py::arg("narrow_wire"))
      .def("handle", &pool_handle)
      .def("stats", &stats)
      .def("trim",
           [](StagingPool& p) {
             const ReleaseGil release;
             return p.core().trim();
           })
      .def("close", &close)
      .def_property_readonly("closed", [](const StagingPool& p) { return p.core().closed(); })
      .def_property_readonly("why_pageable",
                             [](const StagingPool& p) { return p.core().why_pageable(); });

  static PyMethodDef functions[] = {
      fast_method<stage_fast>("stage", "handle, pool, token_ids, starts, stops, vocab_size"), {}};
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
  if (add_ids_view(m.ptr()) != 0) throw py::error_already_set();
  add_small_tensors(m);
  m.attr("StagedTokens") = make_staged_tokens_base();
  m.def("set_staged_tokens_type", &set_staged_tokens_type, py::arg("type"));

  py::class_<Hold>(m, "Hold")
      .def(py::init<const StagingPool&>(), py::arg("pool"))
      .def("release", &Hold::release);

  m.def("gather", &gather_from_relay, py::arg("relay"), py::arg("indices"), py::arg("out"));
  m.def("synchronize", &synchronize, py::arg("pool"));
  m.attr("torch_version") = PYSTAGE_TORCH_VERSION;
  m.def(
      "count_mem_pool_regions", [](int change) { mem_pool_regions += change; }, py::arg("change"));
  m.def("size_class", &size_class, py::arg("bytes"));
  m.def("current_cuda_device",
        [] { return int{c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getDevice().index()}; });
  m.def("host_stream", &host_current_stream_number);
  m.def("set_host_stream", &host_set_current_stream, py::arg("number"));
#ifdef PYSTAGE_WITH_CUDA
  m.attr("cuda_runtime") = cuda_build().compiled_runtime;
  m.attr("cuda_architectures") = cuda_build().architectures;
#else
  m.attr("cuda_runtime") = 0;
  m.attr("cuda_architectures") = "";
#endif
}

}  // namespace
}  // namespace pystage

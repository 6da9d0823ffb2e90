// pystage._C turns Python objects into staged tokens and tensors. pystage/_C.pyi describes it. This
// file has the module, the pool's type, the errors, and the hold for tests.
#include "python.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fast_calls.h"
#include "gil.h"
#include "host_device.h"
#include "ids_view.h"
#ifdef PYSTAGE_WITH_CUDA
#include "cuda_device.h"
#endif

namespace pystage {
namespace {

constexpr const char* kPoolCapsule = "pystage.StagingPool";

void log(const char* level, const std::string& text) {
  const py::module_ logging = py::module_::import("logging");
  const py::object logger =
      called([&] { return PyObject_CallMethod(logging.ptr(), "getLogger", "s", "pystage"); });
  called([&] { return PyObject_CallMethod(logger.ptr(), level, "ss", "%s", text.c_str()); });
}

// Warns, once for each pool, that its memory is pageable, and says why.
void warn_if_pageable(StagingPool& pool) {
  const std::string why = pool.core().why_pageable();
  if (why.empty() || pool.warned_pageable) return;
  // GCOV_EXCL_START: only memory for CUDA is pinned, or cannot be
  pool.warned_pageable = true;
  const std::string text = "pystage stages in pageable memory: " + why +
                           ". Ids stay correct; transfers are slower and may block the host";
  const py::object category = py::module_::import("pystage.errors").attr("PageableMemoryWarning");
  if (call_python([&] { return PyErr_WarnEx(category.ptr(), text.c_str(), 1); }) != 0)
    throw py::error_already_set();
  // GCOV_EXCL_STOP
}

}  // namespace

void tell_news(StagingPool& pool) {
  pool.may_have_news = false;
  warn_if_pageable(pool);
  const uint64_t fallbacks = pool.core().counters().fallbacks;
  const bool grown = pool.core().allocations() != pool.logged_allocations;
  if (!grown && fallbacks == pool.logged_fallbacks) return;
  PoolStats s;
  {
    const ReleaseGil release;
    s = pool.core().stats();
  }
  const bool first = pool.logged_fallbacks == 0;
  const bool fell_back = fallbacks != pool.logged_fallbacks;
  pool.logged_allocations = s.allocations;
  pool.logged_fallbacks = fallbacks;
  const std::string on = "the pool on " + pool.device().str();
  const std::string sizes = std::to_string(s.reserved_bytes) + " of at most " +
                            std::to_string(s.capacity_bytes) + " bytes";
  if (grown) log("info", on + " has grown to " + sizes);
  if (fell_back)
    log(first ? "warning" : "debug",
        on + " has no slot, with " + sizes +
            " reserved: a batch goes through memory of torch's own (" + std::to_string(fallbacks) +
            " so far); raise capacity_bytes, or drop staged tokens sooner");
}

namespace {

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

// Destroying a pool unpins memory. The thread that drops the last reference may hold the GIL or
// not.
void end_pool(StagingPool* pool) {
  const ReleaseGil release(Py_IsInitialized() && PyGILState_Check());
  delete pool;
}

// --- tests' hold -------------------------------------------------------------------------------

// Keeps the work of two streams pending: the calling thread's current stream on the pool's device,
// and the pool's eager stream.
class Hold {
 public:
  explicit Hold(const StagingPool& pool) {
    hold(pool, pool.current_stream());
    if (pool.options().eager) hold(pool, pool.eager_stream());
  }
  void release() { holds_.clear(); }

 private:
  void hold(const StagingPool& pool, StreamHandle stream) {
    Device& device = pool.core().device();  // not the pool, which a test may drop
    holds_.emplace_back(device.hold(stream), [&device](void* hold) { device.release(hold); });
  }
  std::vector<std::shared_ptr<void>> holds_;
};

// Waits until the current stream and the pool's eager stream have finished their work.
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

// NOLINTNEXTLINE(performance-unnecessary-value-param): pybind11 passes it by value
void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  std::optional<TokenRangeError> out_of_range;
  try {
    std::rethrow_exception(pointer);
  } catch (const TokenRangeError& e) {
    out_of_range = e;
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
  if (!out_of_range) return;
  const TokenRangeError& e = *out_of_range;  // its class is Python code, see guarded()
  const py::object type = py::module_::import("pystage.errors").attr("TokenRangeError");
  const auto given = py::make_tuple(e.what(), e.request, e.position, e.value, e.vocab_size);
  const py::object error = called([&] { return PyObject_CallObject(type.ptr(), given.ptr()); });
  PyErr_SetObject(type.ptr(), error.ptr());
}

const std::shared_ptr<StagingPool>& pool_of(PyObject* handle) {
  void* pool = PyCapsule_GetPointer(handle, kPoolCapsule);
  if (!pool) throw py::error_already_set();
  return *static_cast<std::shared_ptr<StagingPool>*>(pool);
}

namespace {

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
               pool->logged_allocations = pool->core().stats().allocations;
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

  if (add_ids_view(m.ptr()) != 0) throw py::error_already_set();
  add_stage(m);
  add_staged_tokens(m);
  add_small_tensors(m);
  add_rows(m);
  add_parcel(m);

  py::class_<Hold>(m, "Hold")
      .def(py::init<const StagingPool&>(), py::arg("pool"))
      .def("release", &Hold::release);

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

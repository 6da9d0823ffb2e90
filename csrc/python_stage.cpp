// stage(): reads the requests from Python and gathers their ids into a slot.
#include <limits>
#include <optional>
#include <vector>

#include "fast_calls.h"
#include "gil.h"
#include "python.h"
#include "requests.h"

namespace pystage {
namespace {

constexpr Bounds kInt32Bounds{std::numeric_limits<int32_t>::min(),
                              std::numeric_limits<int32_t>::max()};
// Gathers of at least this many ids (about 20 us) release the GIL.
constexpr size_t kReleaseGil = size_t{64} << 10;
// No memory holds more ids. A view of stride 0 can have more, and its size in bytes would overflow.
constexpr size_t kMaxIds = std::numeric_limits<size_t>::max() / 16;

std::shared_ptr<Lease> acquire(StagingPool& pool, size_t bytes) {
  if (auto lease = pool.core().try_acquire(bytes, /*ask_device=*/false)) return lease;
  std::shared_ptr<Lease> lease;
  {
    ReleaseGil release;  // this queries the device, pins memory or waits
    lease = pool.core().acquire(bytes, [&] { release.check_signals(); });
  }
  pool.may_have_news = true;
  return lease;
}

StagedTokens stage(const std::shared_ptr<StagingPool>& self, py::handle token_ids,
                   py::handle starts, py::handle stops, std::optional<int64_t> vocab_size) {
  Pool& pool = self->core();
  if (vocab_size && *vocab_size < 1)
    throw py::value_error("vocab_size is " + std::to_string(*vocab_size) +
                          ", but must be positive");
  const py::object requests = as_fast_sequence(token_ids, "token_ids");
  const size_t count = static_cast<size_t>(PySequence_Fast_GET_SIZE(requests.ptr()));
  // Read these before any buffer is exported, because reading them may run Python code.
  std::vector<size_t> first, last;
  if (!starts.is_none()) first = read_ends(starts, "starts", count);
  if (!stops.is_none()) last = read_ends(stops, "stops", count);
  Parts parts(count);
  size_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    if (i >= static_cast<size_t>(PySequence_Fast_GET_SIZE(requests.ptr())))
      throw Error("token_ids shrank while it was read");
    // Hold a reference: requesting its buffer may run code that changes the list.
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
  // The bounds of both the vocabulary and int32. The first id outside them is the first that is
  // outside one of the two.
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
  // Try int32 first. Ids that do not fit are rare, and are gathered again as int64. An int64 wire
  // is checked against int32 as well, to know whether the ids can be resolved to int32.
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
    auto staged = py::reinterpret_steal<py::object>(
        make_staged_tokens(args[1], stage(pool, args[2], args[3], args[4], vocab_size)));
    // Only now, because a handler of the log may change the requests.
    if (pool->may_have_news) tell_news(*pool);
    return staged.release().ptr();
  });
}

}  // namespace

void add_stage(py::module_& module) {
  static PyMethodDef functions[] = {
      fast_method<stage_fast>("stage", "handle, pool, token_ids, starts, stops, vocab_size"), {}};
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace pystage

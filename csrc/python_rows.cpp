// write_rows(): the rows of an engine's table of KV indices, written by one kernel.
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "fast_calls.h"
#include "gil.h"
#include "python.h"
#include "requests.h"

namespace pystage {
namespace {

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

// write_rows(handle, table, rest, prefixes, rows, prefix_lens, lens): writes to row rows[i] of the
// table the first prefix_lens[i] entries of prefixes[i], followed by the next lens[i] entries of
// rest. Returns False and does nothing if there are more rows than fit into one launch, or memory
// that it cannot read.
PyObject* write_rows_fast(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return guarded([&]() -> PyObject* {
    check_count("write_rows", given, 7);
    const std::shared_ptr<StagingPool> pool = pool_of(args[0]);
    const c10::Device device = pool->device();
    for (const int i : {1, 2})
      if (!is_tensor(args[i])) throw py::type_error("table and rest must be tensors");
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
    std::vector<at::Tensor> held;  // another thread may change the list while the GIL is released
    held.reserve(count);
    int64_t rest_at = 0;
    for (size_t i = 0; i < count; ++i) {
      if (i >= static_cast<size_t>(PySequence_Fast_GET_SIZE(prefixes.ptr())))
        throw Error("prefixes shrank while they were read");
      PyObject* object = PySequence_Fast_GET_ITEM(prefixes.ptr(), static_cast<Py_ssize_t>(i));
      if (!is_tensor(object)) throw py::type_error("prefixes must be tensors");
      const at::Tensor& prefix = held.emplace_back(THPVariable_Unpack(object));
      const int64_t row = rows[i], prefix_count = prefix_lens[i], length = lens[i];
      const bool fits = 0 <= row && row < table.size(0) && 0 <= prefix_count && 0 <= length &&
                        prefix_count <= std::min(prefix.numel(), table.size(1)) &&
                        length <= table.size(1) - prefix_count && length <= rest.numel() - rest_at;
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

}  // namespace

void add_rows(py::module_& module) {
  static PyMethodDef functions[] = {
      fast_method<write_rows_fast>("write_rows",
                                   "handle, table, rest, prefixes, rows, prefix_lens, lens"),
      {}};
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace pystage

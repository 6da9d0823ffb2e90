// torch.ops.pystage: schemas and kernels. The fakes are in pystage/ops.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "small_tensors.h"
#include "staging.h"

namespace pystage {
namespace {

at::Tensor transfer(const at::Tensor& wire, at::ScalarType dtype,
                    std::optional<at::Device> device) {
  at::Tensor out = at::empty(
      {wire.numel()}, at::TensorOptions().dtype(dtype).device(device.value_or(wire.device())));
  transfer_tensor(wire, out);
  return out;
}

void transfer_out(const at::Tensor& wire, at::Tensor& out) { transfer_tensor(wire, out); }

std::vector<at::Tensor> small_tensors_op(at::TensorList values, at::Device device) {
  return small_tensors(values, device);
}

}  // namespace

TORCH_LIBRARY(pystage, m) {
  m.def("transfer(Tensor wire, *, ScalarType dtype=long, Device? device=None) -> Tensor");
  m.def("transfer_out(Tensor wire, Tensor(a!) out) -> ()");
  m.def("small_tensors(Tensor[] values, *, Device device) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(pystage, CPU, m) {
  m.impl("transfer", &transfer);
  m.impl("transfer_out", &transfer_out);
  m.impl("small_tensors", &small_tensors_op);
}

TORCH_LIBRARY_IMPL(pystage, CUDA, m) {
  m.impl("transfer", &transfer);
  m.impl("transfer_out", &transfer_out);
}

// Torch's fallback for lazily negated tensors expects an op that mutates a tensor to return it, and
// would read past the results of this op. So the op handles such tensors itself: it reads them, and
// refuses to write to them.
TORCH_LIBRARY_IMPL(pystage, Negative, m) {
  m.impl("transfer_out", torch::CppFunction::makeFallthrough());
}

}  // namespace pystage

#include "output_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <utility>

namespace pystage {

// Calls the caching allocator directly, because the dispatcher costs as much as the allocation.
at::Tensor empty_ids(c10::Device device, at::ScalarType dtype, size_t count) {
  const int64_t size = static_cast<int64_t>(count);
  // Look the allocator up each time, because change_current_allocator() may replace it.
  // GCOV_EXCL_START: outputs on CUDA
  if (device.is_cuda())
    return at::detail::empty_generic({size}, at::detail::getCUDAHooks().getCUDADeviceAllocator(),
                                     c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype,
                                     std::nullopt);
  // GCOV_EXCL_STOP
  return at::empty({size}, at::TensorOptions().device(device).dtype(dtype));
}

at::Tensor cut(const c10::Storage& memory, size_t offset, at::ScalarType dtype,
               at::IntArrayRef sizes) {
  const c10::DispatchKey key =
      memory.device().is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(memory), c10::DispatchKeySet(key), c10::scalarTypeToTypeMeta(dtype));
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(static_cast<int64_t>(offset / c10::elementSize(dtype)));
  impl->generic_set_sizes_contiguous(sizes);
  return tensor;
}

std::atomic<int> mem_pool_regions{0};

// Note [Outputs cut from blocks]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A call of torch's caching allocator touches much memory. If none of it is in the CPU's caches,
// the call is the longest part of resolve(), longer than the launch (bench/notes.md). So short
// outputs are cut from blocks, eight or more from one block. No part of a block is handed out
// twice. A block is a storage from torch, shared by all tensors that are cut from it: it goes back
// to the allocator with the last of them, and record_stream() on one tensor covers the whole block.
// A tensor that is kept alive keeps its block, of 1 MiB at most. The pool also keeps one block for
// each of the streams that it used last. While a part of the program allocates from a
// torch.cuda.MemPool, no output is cut from a block: a block would pass memory from that MemPool to
// other parts of the program, or the other way round.
namespace {

constexpr size_t kOutputAlignment = 512;           // as in torch's caching allocator
constexpr size_t kLargestCut = size_t{128} << 10;  // bytes; longer outputs are allocated alone
constexpr size_t kSmallestBlock = size_t{64} << 10;
constexpr size_t kOutputStreams = 8;

}  // namespace

at::Tensor OutputMemory::allocate(at::ScalarType dtype, size_t count, StreamHandle stream) {
  const size_t item = c10::elementSize(dtype);
  if (!device_.is_cuda() || !count || count > kLargestCut / item ||
      mem_pool_regions.load(std::memory_order_relaxed) > 0)  // GCOV_EXCL_LINE: asked on CUDA
    return empty_ids(device_, dtype, count);
  // GCOV_EXCL_START: only outputs on CUDA are cut
  const size_t bytes = (count * item + kOutputAlignment - 1) / kOutputAlignment * kOutputAlignment;
  // The next part of `block` that has not been handed out.
  auto next = [&](Block& block) {
    at::Tensor ids = cut(block.storage, block.used, dtype, static_cast<int64_t>(count));
    block.used += bytes;
    return ids;
  };
  auto of_stream = [&] {
    return std::find_if(blocks_.begin(), blocks_.end(),
                        [&](const Block& block) { return block.stream == stream; });
  };
  {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto block = of_stream();
    if (block != blocks_.end() && block->storage.nbytes() - block->used >= bytes)
      return next(*block);
  }
  Block fresh{stream, empty_ids(device_, at::kByte, std::max(8 * bytes, kSmallestBlock)).storage(),
              0};
  at::Tensor ids = next(fresh);
  std::lock_guard<std::mutex> guard(mutex_);
  const auto block = of_stream();
  if (closed_) return ids;
  if (block != blocks_.end())
    std::swap(*block, fresh);
  else if (blocks_.size() < kOutputStreams)
    blocks_.push_back(std::move(fresh));
  else
    std::swap(blocks_[turn_++ % kOutputStreams], fresh);
  return ids;
  // GCOV_EXCL_STOP
}

void OutputMemory::close() {
  std::vector<Block> blocks;
  std::lock_guard<std::mutex> guard(mutex_);
  closed_ = true;
  blocks.swap(blocks_);
}

// GCOV_EXCL_START: only blocks on CUDA are leaked
void OutputMemory::leak() noexcept { new std::vector<Block>(std::move(blocks_)); }
// GCOV_EXCL_STOP

}  // namespace pystage

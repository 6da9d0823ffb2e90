// Device memory for the tensors that pystage hands out.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <atomic>
#include <cstddef>
#include <mutex>
#include <vector>

#include "device.h"

namespace pystage {

// A new tensor [count] on the current stream, for ids and other values.
at::Tensor empty_ids(c10::Device device, at::ScalarType dtype, size_t count);

// The part of `memory` that begins at byte `offset`, as a separate tensor.
at::Tensor cut(const c10::Storage& memory, size_t offset, at::ScalarType dtype,
               at::IntArrayRef sizes);

// The number of regions in this process that allocate from a torch.cuda.MemPool. Torch cannot tell,
// so pystage/_mempool.py counts them.
extern std::atomic<int> mem_pool_regions;

// Memory for the ids that resolve() hands out. See Note [Outputs cut from blocks].
class OutputMemory {
 public:
  explicit OutputMemory(c10::Device device) : device_(device) {}
  // A new tensor [count] for work on `stream`, which is current.
  at::Tensor allocate(at::ScalarType dtype, size_t count, StreamHandle stream);
  // Gives the blocks back, and keeps no more.
  void close();
  // Keeps the blocks until the process ends.
  void leak() noexcept;

 private:
  struct Block {
    StreamHandle stream;
    c10::Storage storage;
    size_t used;  // bytes
  };
  const c10::Device device_;
  std::mutex mutex_;           // not held while torch allocates
  std::vector<Block> blocks_;  // at most one per stream
  size_t turn_ = 0;
  bool closed_ = false;
};

}  // namespace pystage

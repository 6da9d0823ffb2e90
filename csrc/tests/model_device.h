// A device whose streams move only when a test steps them. It knows at each moment what the streams
// still have to read.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "errors.h"

namespace pystage::testing {

class ModelDevice final : public Device {
 public:
  explicit ModelDevice(size_t streams) : streams_(streams) {}

  // Called at the start of each call, with its name. May throw if the call may throw.
  std::function<void(const char*)> on_call = [](const char*) {};
  // The first error of the pool that was found; empty if none.
  std::string wrong;
  // Faults of the device itself, which the tests must detect.
  bool records_nothing = false;
  bool says_done = false;

  const std::string& name() const override { return name_; }

  HostMemory allocate(size_t bytes, std::string*) override {
    on_call("allocate");
    Memory memory(static_cast<char*>(std::aligned_alloc(4096, bytes)));
    if (!memory) throw DeviceError("out of memory");
    HostMemory result;
    result.host = memory.get();
    result.device = memory.get();
    result.bytes = bytes;
    result.pinned = true;
    memory_[result.host] = {std::move(memory), bytes};
    live_bytes_ += bytes;
    max_bytes_ = std::max(max_bytes_, live_bytes_);
    return result;
  }
  void free(const HostMemory& memory) noexcept override {
    on_call("free");
    if (has_to_read(memory.host, memory.bytes))  // keep the memory for the stream
      return note("memory was freed that a stream has yet to read");
    const auto it = memory_.find(memory.host);
    if (it == memory_.end()) return note("memory was freed twice");
    live_bytes_ -= it->second.second;
    memory_.erase(it);
  }

  void launch(const Transfer& t, StreamHandle stream) override {
    on_call("launch");
    const auto* src = static_cast<const char*>(t.src);
    Task task;
    task.src = src;
    task.expected.assign(src, src + t.count * size_of(t.wire));
    static_cast<Stream*>(stream)->push_back(std::move(task));
  }

  FenceHandle create_fence() override {
    on_call("create_fence");
    auto* fence = new FencePtr(std::make_shared<ModelFence>());
    ++live_fences_;
    return fence;
  }
  void destroy_fence(FenceHandle fence) noexcept override {
    on_call("destroy_fence");
    --live_fences_;
    delete static_cast<FencePtr*>(fence);
  }
  void record(FenceHandle fence, StreamHandle stream) override {
    on_call("record");
    if (records_nothing) return;
    Task task;
    task.fence = *static_cast<FencePtr*>(fence);
    task.point = task.fence->recorded + 1;
    static_cast<Stream*>(stream)->push_back(task);
    ++task.fence->recorded;
  }
  bool query(FenceHandle fence) override {
    on_call("query");
    const ModelFence& f = **static_cast<FencePtr*>(fence);
    return says_done || f.reached == f.recorded;
  }
  void synchronize(FenceHandle fence) override {
    on_call("synchronize");
    const ModelFence& f = **static_cast<FencePtr*>(fence);
    for (size_t s = 0; f.reached < f.recorded; s = (s + 1) % streams_.size())
      if (busy(s)) step(s);
  }
  void wait(StreamHandle stream, FenceHandle fence) override {
    on_call("wait");
    Task task;
    task.fence = *static_cast<FencePtr*>(fence);
    task.waits = true;
    task.point = task.fence->recorded;
    static_cast<Stream*>(stream)->push_back(std::move(task));
  }
  uint64_t stream_id(StreamHandle stream) override {
    on_call("stream_id");
    return static_cast<uint64_t>(static_cast<Stream*>(stream) - streams_.data());
  }
  bool capturing(StreamHandle) override { return false; }
  void* hold(StreamHandle) override { return nullptr; }  // a stream moves only in step()
  void release(void*) noexcept override {}

  StreamHandle stream(size_t number) { return &streams_[number]; }
  size_t streams() const { return streams_.size(); }
  // Whether a stream has work that does not wait for another stream.
  bool busy(size_t number) const {
    const Stream& stream = streams_[number];
    return !stream.empty() &&
           !(stream.front().waits && stream.front().fence->reached < stream.front().point);
  }
  // Runs the next task of a stream.
  void step(size_t number) {
    const Task task = std::move(streams_[number].front());
    streams_[number].pop_front();
    if (task.fence) {
      if (!task.waits) task.fence->reached = std::max(task.fence->reached, task.point);
    } else if (!task.expected.empty() &&
               std::memcmp(task.src, task.expected.data(), task.expected.size()) != 0) {
      note("a stream read another's ids");
    }
  }
  void finish() {
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t s = 0; s < streams_.size(); ++s)
        for (; busy(s); moved = true) step(s);
    }
  }
  // Whether a stream still has to read any of these bytes.
  bool has_to_read(const char* from, size_t bytes) const {
    for (const Stream& stream : streams_)
      for (const Task& task : stream)
        if (!task.fence && task.src < from + bytes && from < task.src + task.expected.size())
          return true;
    return false;
  }

  size_t live_bytes() const { return live_bytes_; }
  size_t max_bytes() const { return max_bytes_; }
  int live_fences() const { return live_fences_; }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<char, Free>;

  struct ModelFence {
    uint64_t recorded = 0, reached = 0;
  };
  using FencePtr = std::shared_ptr<ModelFence>;
  struct Task {  // a transfer, or a point of a fence
    const char* src = nullptr;
    std::vector<char> expected;
    FencePtr fence;
    uint64_t point = 0;
    bool waits = false;
  };
  using Stream = std::deque<Task>;

  void note(const char* what) {
    if (wrong.empty()) wrong = what;
  }

  const std::string name_ = "model";
  std::vector<Stream> streams_;
  std::map<char*, std::pair<Memory, size_t>> memory_;
  size_t live_bytes_ = 0, max_bytes_ = 0;
  int live_fences_ = 0;
};

}  // namespace pystage::testing

#include "host_device.h"

#include <pthread.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <thread>

#include "errors.h"
#include "gather.h"

namespace pystage {
namespace {

// Counts points on streams: recorded() makes a new point, reach() marks it as reached. A stream
// reaches its points in order.
class HostFence {
 public:
  uint64_t recorded() { return recorded_.fetch_add(1) + 1; }
  void reach(uint64_t point) {
    std::lock_guard<std::mutex> guard(mutex_);
    if (point > reached_) reached_ = point;
    changed_.notify_all();
  }
  bool done() {
    std::lock_guard<std::mutex> guard(mutex_);
    return reached_ >= recorded_;
  }
  void wait(uint64_t point) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return reached_ >= point; });
  }
  void wait() { wait(recorded_); }
  uint64_t last() const { return recorded_; }

 private:
  std::atomic<uint64_t> recorded_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t reached_ = 0;
};
using FencePtr = std::shared_ptr<HostFence>;  // shared with points that are still queued

// Runs tasks one after another on its own thread.
class HostStream {
 public:
  HostStream() {
    std::thread([this] { run(); }).detach();
  }

  void put(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_all();
  }
  void hold() {
    std::lock_guard<std::mutex> guard(mutex_);
    ++holds_;
    held_until_ =
        std::chrono::steady_clock::now() + std::chrono::seconds(Device::kHoldLimitSeconds);
  }
  void release() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      --holds_;
    }
    changed_.notify_all();
  }
  bool held() {
    std::lock_guard<std::mutex> guard(mutex_);
    return holds_ > 0;
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (holds_ > 0 && std::chrono::steady_clock::now() < held_until_) {
        changed_.wait_until(lock, held_until_);
        continue;
      }
      if (tasks_.empty()) {
        changed_.wait(lock);
        continue;
      }
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      task = nullptr;  // frees what it owns before the next task runs
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  int holds_ = 0;
  std::chrono::steady_clock::time_point held_until_;
};

int64_t read_int(const void* data, IntType type, size_t at) {
  return type == IntType::kInt32 ? static_cast<const int32_t*>(data)[at]
                                 : static_cast<const int64_t*>(data)[at];
}

void write_tail(RelayTail& tail, int64_t* dst) {
  const auto size = static_cast<int64_t>(tail.relay_size);
  for (size_t i = 0; i < tail.count; ++i) {
    const int64_t index = read_int(tail.indices, tail.index_type, i);
    const bool ok = index >= -size && index < size;
    if (!ok && !tail.bad) tail.bad = {i, index};
    const int64_t at = index < 0 ? index + size : index;
    dst[i] = ok ? read_int(tail.relay, tail.relay_type, static_cast<size_t>(at)) : -1;
  }
}

class HostDevice final : public Device {
 public:
  const std::string& name() const override { return name_; }

  HostMemory allocate(size_t bytes, std::string*) override {
    void* memory = std::aligned_alloc(4096, bytes);
    if (!memory)
      throw DeviceError("aligned_alloc of " + std::to_string(bytes) + " bytes failed [cpu]");
    auto* p = static_cast<char*>(memory);
    return {p, p, bytes, false};
  }
  void free(const HostMemory& memory) noexcept override { std::free(memory.host); }

  void launch(const Transfer& t, StreamHandle stream) override {
    static_cast<HostStream*>(stream)->put([t] {
      if (t.count) convert(t.src, t.wire, t.dst, t.out, t.count);
      if (t.tail) write_tail(*t.tail, static_cast<int64_t*>(t.dst) + t.count);
    });
  }

  // Values and rows are written at once, by the calling thread: no stream here uses that memory.
  size_t most_values() override { return size_t{32} << 10; }
  size_t most_rows() override { return 1024; }
  void launch_values(const void* values, size_t, const ValuesPiece* pieces, size_t count,
                     StreamHandle) override {
    for (const ValuesPiece* p = pieces; p != pieces + count; ++p)
      std::memcpy(p->dst, static_cast<const char*>(values) + p->first * kValuesAlignment,
                  p->count * kValuesAlignment);
  }
  void launch_rows(int32_t* table, size_t row_stride, const RowWrite* rows, size_t count,
                   const int64_t* rest, StreamHandle) override {
    for (const RowWrite* w = rows; w != rows + count; ++w) {
      int32_t* out = table + static_cast<size_t>(w->row) * row_stride;
      for (int32_t i = 0; i < w->prefix_count; ++i) *out++ = static_cast<int32_t>(w->prefix[i]);
      for (int32_t i = 0; i < w->count; ++i) *out++ = static_cast<int32_t>(rest[w->rest_at + i]);
    }
  }

  FenceHandle create_fence() override { return new FencePtr(std::make_shared<HostFence>()); }
  void destroy_fence(FenceHandle fence) noexcept override { delete static_cast<FencePtr*>(fence); }
  void record(FenceHandle fence, StreamHandle stream) override {
    FencePtr f = *static_cast<FencePtr*>(fence);
    const uint64_t point = f->recorded();
    static_cast<HostStream*>(stream)->put([f, point] { f->reach(point); });
  }
  bool query(FenceHandle fence) override { return (*static_cast<FencePtr*>(fence))->done(); }
  void synchronize(FenceHandle fence) override { (*static_cast<FencePtr*>(fence))->wait(); }
  void wait(StreamHandle stream, FenceHandle fence) override {
    FencePtr f = *static_cast<FencePtr*>(fence);
    const uint64_t point = f->last();
    static_cast<HostStream*>(stream)->put([f, point] { f->wait(point); });
  }
  uint64_t stream_id(StreamHandle stream) override {
    return reinterpret_cast<uintptr_t>(stream);  // never destroyed
  }
  bool capturing(StreamHandle) override { return false; }

  void* hold(StreamHandle stream) override {
    static_cast<HostStream*>(stream)->hold();
    return stream;
  }
  void release(void* hold) noexcept override { static_cast<HostStream*>(hold)->release(); }

  HostStream* stream(int number) {
    if (number < kHostEagerStream || number >= kHostStreams)
      throw Error("host stream " + std::to_string(number) + " is outside [0, " +
                  std::to_string(kHostStreams) + ")");
    std::lock_guard<std::mutex> guard(mutex_);
    HostStream*& stream = streams_[static_cast<size_t>(number + 1)];
    if (!stream) stream = new HostStream;
    return stream;
  }

 private:
  std::string name_ = "cpu";
  std::mutex mutex_;
  std::array<HostStream*, kHostStreams + 1> streams_{};
};

// After fork, the child has none of the threads and perhaps a locked mutex, so it makes a new
// device.
std::atomic<HostDevice*> g_device{nullptr};
[[maybe_unused]] const int g_fork_handler =
    pthread_atfork(nullptr, nullptr, [] { g_device.store(nullptr); });

thread_local int t_current_stream = 0;

HostDevice& device() {
  HostDevice* current = g_device.load();
  if (!current) {
    auto* fresh = new HostDevice;
    if (g_device.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

Device& host_device() { return device(); }
StreamHandle host_stream(int number) { return device().stream(number); }
StreamHandle host_current_stream() { return device().stream(t_current_stream); }
int host_current_stream_number() { return t_current_stream; }
void host_set_current_stream(int number) {
  device().stream(number);  // checks the number
  t_current_stream = number;
}
bool host_stream_held(StreamHandle stream) { return static_cast<HostStream*>(stream)->held(); }

}  // namespace pystage

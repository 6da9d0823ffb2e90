// Helpers that the C++ tests share.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <ostream>  // doctest prints with it
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "host_device.h"
#include "pool.h"

#ifdef PYSTAGE_COVERAGE
extern "C" void __gcov_dump(void);
#endif

namespace pystage::testing {

using Ids = std::vector<int64_t>;
using LeasePtr = std::shared_ptr<Lease>;

enum class Fail { kNothing, kAllocate, kPageable, kFence, kLaunch, kRecord, kQuery };

// The host device. Counts the calls of the pool and makes them fail on request.
class CountingDevice final : public Device {
 public:
  const std::string& name() const override { return name_; }

  HostMemory allocate(size_t bytes, std::string* why_pageable) override {
    if (on_allocate) on_allocate();
    maybe_throw(Fail::kAllocate, "allocate");
    HostMemory memory = host_device().allocate(bytes, why_pageable);
    if (fail == Fail::kPageable) {
      memory.device = nullptr;
      memory.fallback = true;
      *why_pageable = "told to";
    }
    std::lock_guard<std::mutex> guard(mutex_);
    ++allocations_;
    live_bytes_ += bytes;
    max_bytes_ = std::max(max_bytes_, live_bytes_);
    return memory;
  }
  void free(const HostMemory& memory) noexcept override {
    if (on_free) on_free();
    {
      std::lock_guard<std::mutex> guard(mutex_);
      live_bytes_ -= memory.bytes;
    }
    std::memset(memory.host, 0xdd, memory.bytes);  // so that a late reader gets wrong ids
    host_device().free(memory);
  }

  void launch(const Transfer& transfer, StreamHandle stream) override {
    maybe_throw(Fail::kLaunch, "launch");
    host_device().launch(transfer, stream);
  }
  FenceHandle create_fence() override {
    maybe_throw(Fail::kFence, "create_fence");
    fences.fetch_add(1, std::memory_order_relaxed);
    live_fences.fetch_add(1, std::memory_order_relaxed);
    return host_device().create_fence();
  }
  void destroy_fence(FenceHandle fence) noexcept override {
    live_fences.fetch_sub(1, std::memory_order_relaxed);
    host_device().destroy_fence(fence);
  }
  void record(FenceHandle fence, StreamHandle stream) override {
    maybe_throw(Fail::kRecord, "record");
    host_device().record(fence, stream);
  }
  bool query(FenceHandle fence) override {
    if (on_query) on_query();
    maybe_throw(Fail::kQuery, "query");
    return host_device().query(fence);
  }
  void synchronize(FenceHandle fence) override { host_device().synchronize(fence); }
  void wait(StreamHandle stream, FenceHandle fence) override { host_device().wait(stream, fence); }
  uint64_t stream_id(StreamHandle stream) override { return host_device().stream_id(stream); }
  bool capturing(StreamHandle stream) override { return host_device().capturing(stream); }
  void* hold(StreamHandle stream) override { return host_device().hold(stream); }
  void release(void* hold) noexcept override { host_device().release(hold); }

  size_t allocations() const { return locked(allocations_); }
  size_t live_bytes() const { return locked(live_bytes_); }
  size_t max_bytes() const { return locked(max_bytes_); }

  std::atomic<Fail> fail{Fail::kNothing};
  // Use relaxed order: the counters must not add ordering that the pool has to provide.
  std::atomic<int> fences{0}, live_fences{0};
  // Set before any other thread uses the device.
  std::function<void()> on_allocate, on_free, on_query;

 private:
  void maybe_throw(Fail kind, const char* call) {
    if (fail.load(std::memory_order_relaxed) == kind)
      throw DeviceError(std::string(call) + " failed [" + name_ + "]");
  }
  size_t locked(const size_t& value) const {
    std::lock_guard<std::mutex> guard(mutex_);
    return value;
  }

  std::string name_ = "counting";
  mutable std::mutex mutex_;
  size_t allocations_ = 0, live_bytes_ = 0, max_bytes_ = 0;
};

// Never destroyed: after a failed test, a pool with slots in flight may still refer to it.
inline CountingDevice& new_device() {
  static auto* devices = new std::vector<std::unique_ptr<CountingDevice>>;
  return *devices->emplace_back(std::make_unique<CountingDevice>());
}

// Owns a pool as StagingPool does: the owner's destructor drops it.
class Owner {
 public:
  Owner(Device& device, const PoolOptions& options) : pool_(Pool::create(device, options)) {}
  ~Owner() { drop(); }
  Owner(const Owner&) = delete;
  Owner& operator=(const Owner&) = delete;
  Pool* operator->() const { return pool_.get(); }
  Pool& operator*() const { return *pool_; }
  void drop() {
    if (pool_) Pool::drop(std::move(pool_));
    pool_ = nullptr;
  }

 private:
  std::shared_ptr<Pool> pool_;
};

// Keeps the work of a host stream pending for a scope.
class Held {
 public:
  explicit Held(StreamHandle stream) : hold_(host_device().hold(stream)) {}
  ~Held() { release(); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  void release() {
    if (hold_) host_device().release(hold_);
    hold_ = nullptr;
  }

 private:
  void* hold_;
};

// A fence that belongs to the test.
class Fence {
 public:
  Fence() : fence_(host_device().create_fence()) {}
  ~Fence() { host_device().destroy_fence(fence_); }
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  void record(StreamHandle stream) { host_device().record(fence_, stream); }
  bool done() { return host_device().query(fence_); }
  void synchronize() { host_device().synchronize(fence_); }
  FenceHandle handle() const { return fence_; }

 private:
  FenceHandle fence_;
};

// Waits for all work that is on a stream now.
inline void drain(StreamHandle stream) {
  Fence fence;
  fence.record(stream);
  fence.synchronize();
}

// The output of a pending transfer, and the ids that it must bring. It does not hold the lease.
struct Output {
  Ids expected;
  std::shared_ptr<Ids> actual;
  bool arrived() const { return *actual == expected; }
};

inline Output launch(Lease& lease, StreamHandle stream, Ids ids) {
  auto actual = std::make_shared<Ids>(ids.size(), -1);
  Transfer t;
  t.src = t.src_device = lease.data();
  t.wire = t.out = IntType::kInt64;
  t.dst = actual->data();
  t.dst_owner = actual;
  t.count = ids.size();
  lease.launch_transfer(t, stream);
  return {std::move(ids), std::move(actual)};
}

inline void write(Lease& lease, const Ids& ids) {
  std::memcpy(lease.data(), ids.data(), ids.size() * sizeof(int64_t));
}

// Ids that no other call returns, so that a read of a stale or wrong slot shows.
inline Ids fresh_ids(size_t count) {
  static std::atomic<int64_t> next{1};
  const int64_t first = next.fetch_add(static_cast<int64_t>(count), std::memory_order_relaxed);
  Ids ids(count);
  for (size_t i = 0; i < count; ++i) ids[i] = first + static_cast<int64_t>(i);
  return ids;
}

// Fills the whole slot and launches a transfer from it.
inline Output stage_and_launch(Lease& lease, StreamHandle stream) {
  Ids ids = fresh_ids(lease.bytes() / sizeof(int64_t));
  write(lease, ids);
  return launch(lease, stream, std::move(ids));
}

// Spins until another thread has made the predicate true. False if that takes over a minute.
template <typename Predicate>
bool eventually(Predicate predicate) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!predicate()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

// Sets PYSTAGE_DEBUG_CANARIES for a scope.
class Canaries {
 public:
  explicit Canaries(const char* value = "1") { setenv("PYSTAGE_DEBUG_CANARIES", value, 1); }
  ~Canaries() { unsetenv("PYSTAGE_DEBUG_CANARIES"); }
  Canaries(const Canaries&) = delete;
  Canaries& operator=(const Canaries&) = delete;
};

// Ends a child of fork: with an exit status, or, if used as a signal handler, with that signal.
[[noreturn]] inline void exit_child(int status) {
#ifdef PYSTAGE_COVERAGE
  __gcov_dump();
#endif
  _exit(status);
}
inline void end_of_child(int signal) {
#ifdef PYSTAGE_COVERAGE
  __gcov_dump();
#endif
  ::signal(signal, SIG_DFL);
  raise(signal);
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  // A value in [lo, hi]. The bounds may be the extremes of T.
  template <typename T>
  T in(T lo, T hi) {
    return std::uniform_int_distribution<T>(lo, hi)(engine_);
  }
  bool one_in(int n) { return in(1, n) == 1; }

 private:
  std::mt19937_64 engine_;
};

}  // namespace pystage::testing

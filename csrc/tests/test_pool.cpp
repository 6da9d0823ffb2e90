// Tests the pool on the model device. One file, because all cases test one class with the same
// helpers.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <limits>
#include <numeric>

#include "helpers.h"
#include "model_device.h"
#include "pool.h"

#if defined(__SANITIZE_THREAD__)
#define PYSTAGE_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define PYSTAGE_TSAN 1
#endif
#endif

namespace pystage {
namespace {

using namespace pystage::testing;  // NOLINT: tests

constexpr size_t kKiB = 1024;
constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kHuge = std::numeric_limits<size_t>::max();

PoolOptions options(size_t capacity, size_t reserve, AtCapacity policy = AtCapacity::kRaise,
                    double timeout_s = 30) {
  PoolOptions o;
  o.capacity_bytes = capacity;
  o.reserve_bytes = reserve;
  o.at_capacity = policy;
  o.timeout_s = timeout_s;
  return o;
}
// Options for a pool with all its capacity in one segment.
PoolOptions whole(size_t capacity, AtCapacity policy = AtCapacity::kRaise, double timeout_s = 30) {
  return options(capacity, capacity, policy, timeout_s);
}

std::vector<LeasePtr> acquire_all(Pool& pool, size_t bytes) {
  std::vector<LeasePtr> leases;
  while (auto lease = pool.try_acquire(bytes)) leases.push_back(std::move(lease));
  return leases;
}

// Checks the orphans, as the next call on any pool would.
void reap_dropped_pools() {
  CountingDevice& device = new_device();
  Owner pool(device, options(4096, 0));
  pool->try_acquire(1);
}

void check_figures(Pool& pool, const CountingDevice& device) {
  const PoolStats s = pool.stats();
  REQUIRE(s.reserved_bytes == device.live_bytes());
  REQUIRE(s.in_use_bytes <= s.reserved_bytes);
  REQUIRE(s.in_use_bytes <= s.high_water_bytes);
  REQUIRE(s.reserved_bytes <= s.capacity_bytes);
  REQUIRE(device.max_bytes() <= s.capacity_bytes);
}

// Runs a call on its own thread and keeps the exception that it threw.
class Background {
 public:
  template <typename Call>
  explicit Background(Call call)
      : thread_([this, call] {
          try {
            call();
          } catch (const std::exception& e) {
            error_ = e.what();
          }
          done_ = true;
        }) {}
  ~Background() { join(); }
  bool done() const { return done_; }
  const std::string& join() {
    if (thread_.joinable()) thread_.join();
    return error_;
  }

 private:
  std::string error_;
  std::atomic<bool> done_{false};
  std::thread thread_;
};

// --- size classes ------------------------------------------------------------------------------

TEST_CASE("size classes are monotone, whole cache lines, and waste little") {
  size_t before = 0, broken = 0;
  for (size_t bytes = 1; bytes <= 4 * kMiB && !broken; ++bytes) {
    const size_t slot = size_class(bytes);
    const size_t waste = slot - bytes;
    const bool ok = slot >= bytes && slot >= before && slot % 64 == 0 &&
                    (bytes < 512 ? waste <= 63 : waste * 8 <= bytes);
    if (!ok) broken = bytes;
    before = slot;
  }
  CHECK(broken == 0);
  CHECK(size_class(0) == 64);
  for (size_t bytes : {64, 512, 576, 4096, 1 << 20}) CHECK(size_class(bytes) == bytes);
}

TEST_CASE("there are eight size classes per doubling") {
  for (size_t power = 512; power <= kMiB; power *= 2) {
    int classes = 0;
    for (size_t bytes = power; bytes < 2 * power; bytes = size_class(bytes + 1)) ++classes;
    CHECK(classes == 8);
  }
}

TEST_CASE("size_class ends for every size, and is never less") {
  for (size_t bytes : {kHuge, kHuge - 1, kHuge / 2, kHuge / 2 + 1, kHuge / 2 + 2,
                       kHuge - kHuge / 16, size_t{1} << 60})
    CHECK(size_class(bytes) >= bytes);
}

// --- slots and segments ------------------------------------------------------------------------

TEST_CASE("options: whole pages, a reserve within the capacity") {
  CountingDevice& device = new_device();
  {
    Owner pool(device, options(10000, 5000));
    CHECK(pool->options().capacity_bytes == 8192);
    CHECK(pool->stats().reserved_bytes == 8192);
    CHECK(device.allocations() == 1);
    CHECK_FALSE(pool->closed());
    CHECK(&pool->device() == &device);
  }
  {
    Owner pool(device, options(kMiB, 0));
    CHECK(pool->stats().reserved_bytes == 0);
  }
  {
    Owner pool(device, options(8192, kHuge));
    CHECK(pool->stats().reserved_bytes == 8192);
  }
  CHECK_THROWS_AS(Owner(device, options(4095, 0)), Error);
  CHECK(device.live_bytes() == 0);
}

TEST_CASE("a lease describes its slot, and gives it back") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(64 * kKiB));
  LeasePtr a = pool->acquire(1000), b = pool->try_acquire(1);
  CHECK(a->bytes() == size_class(1000));
  CHECK(b->bytes() == 64);
  CHECK(reinterpret_cast<uintptr_t>(b->data()) % 64 == 0);
  CHECK(a->device_data() == a->data());
  CHECK(b->device_data() == b->data());
  CHECK(b->data() == a->data() + a->bytes());
  CHECK_FALSE(a->pinned());
  CHECK(&a->pool() == &*pool);
  CHECK(pool->stats().in_use_bytes == 1024 + 64);
  CHECK(pool->stats().leased_slots == 2);
  LeasePtr shared = a;
  a.reset();
  CHECK(pool->stats().leased_slots == 2);
  shared.reset();
  b.reset();
  CHECK(pool->stats().leased_slots == 0);
  CHECK(pool->stats().in_use_bytes == 0);
  CHECK(pool->stats().high_water_bytes == 1024 + 64);
}

TEST_CASE("slots merge with their neighbours, whatever the order they come back in") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4 * 4096));
  std::vector<int> order{0, 1, 2, 3};
  do {
    std::vector<LeasePtr> leases = acquire_all(*pool, 4096);
    REQUIRE(leases.size() == 4);
    for (int i : order) leases[i].reset();
    REQUIRE(pool->try_acquire(4 * 4096));
  } while (std::next_permutation(order.begin(), order.end()));
  CHECK(device.allocations() == 1);
}

TEST_CASE("the smallest gap that fits is taken, the lowest of equals") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(64 * kKiB));
  auto take = [&](size_t bytes) { return pool->try_acquire(bytes); };
  LeasePtr big = take(8192), w1 = take(64), small = take(4096), w2 = take(64), twin = take(4096),
           w3 = take(64);
  char* const at = small->data();
  char* const upper = twin->data();
  twin.reset();
  big.reset();
  small.reset();
  LeasePtr first = take(4000), second = take(4096);
  CHECK(first->data() == at);
  CHECK(second->data() == upper);
}

TEST_CASE("a pool grows in steps up to its capacity and no further") {
  CountingDevice& device = new_device();
  Owner pool(device, options(3 * kMiB + 8192, 0));
  LeasePtr a = pool->acquire(100);
  CHECK(device.live_bytes() == kMiB);
  LeasePtr b = pool->acquire(2 * kMiB);
  CHECK(device.live_bytes() == 3 * kMiB);
  LeasePtr c = pool->acquire(kMiB - 64 * kKiB), rest = pool->acquire(60 * kKiB);  // in the first
  CHECK(device.allocations() == 2);
  LeasePtr d = pool->acquire(8000);  // the capacity limits this step
  CHECK(device.live_bytes() == 3 * kMiB + 8192);
  CHECK_THROWS_AS(pool->acquire(8000), PoolExhaustedError);
  check_figures(*pool, device);
}

TEST_CASE("idle segments make room for a larger request, unless that is not enough") {
  CountingDevice& device = new_device();
  Owner pool(device, options(3 * kMiB, 0));
  std::vector<LeasePtr> leases;
  for (int i = 0; i < 3; ++i) leases.push_back(pool->acquire(kMiB));
  CHECK(device.allocations() == 3);
  leases.pop_back();
  CHECK_THROWS_AS(pool->acquire(2 * kMiB), PoolExhaustedError);
  CHECK(pool->stats().frees == 0);
  leases.pop_back();
  LeasePtr large = pool->acquire(2 * kMiB);
  CHECK(large->bytes() == 2 * kMiB);
  CHECK(device.allocations() == 4);
  CHECK(pool->stats().frees == 2);
  check_figures(*pool, device);
}

TEST_CASE("trim gives idle segments back, and only those") {
  CountingDevice& device = new_device();
  Owner pool(device, options(8 * kMiB, 2 * kMiB));
  LeasePtr a = pool->acquire(2 * kMiB), b = pool->acquire(kMiB);
  CHECK(pool->trim() == 0);
  a.reset();
  CHECK(pool->trim() == 2 * kMiB);
  CHECK(device.live_bytes() == kMiB);
  write(*b, fresh_ids(kMiB / 8));
  Held held(host_stream(1));
  stage_and_launch(*b, host_stream(1));
  b.reset();
  CHECK(pool->trim() == 0);  // in flight
  held.release();
  drain(host_stream(1));
  CHECK(pool->trim() == kMiB);
  CHECK(device.live_bytes() == 0);
  CHECK(pool->trim() == 0);
  CHECK(pool->acquire(100));
  check_figures(*pool, device);
}

TEST_CASE("random sizes: no two leases overlap, and the capacity holds") {
  for (const size_t reserve : {size_t{0}, 512 * kKiB, 4 * kMiB}) {
    CountingDevice& device = new_device();
    Owner pool(device, options(4 * kMiB, reserve, AtCapacity::kFallback));
    Random random(3 + reserve);
    std::vector<std::pair<LeasePtr, Ids>> live;
    bool intact = true;
    auto drop_one = [&] {
      const size_t i = random.in<size_t>(0, live.size() - 1);
      const auto& [lease, ids] = live[i];
      intact &= std::memcmp(lease->data(), ids.data(), ids.size() * sizeof(int64_t)) == 0;
      std::swap(live[i], live.back());
      live.pop_back();
    };
    for (int round = 0; round < 3000; ++round) {
      const size_t bytes = size_t{1} << random.in(0, 20);
      if (LeasePtr lease = pool->acquire(bytes + random.in<size_t>(0, bytes / 2))) {
        Ids ids = fresh_ids(lease->bytes() / sizeof(int64_t));
        write(*lease, ids);
        live.emplace_back(std::move(lease), std::move(ids));
      } else {
        drop_one();
      }
      if (!live.empty() && random.one_in(2)) drop_one();
      if (random.one_in(200)) pool->trim();
      if (round % 50 == 0) check_figures(*pool, device);
    }
    while (!live.empty()) drop_one();
    CHECK(intact);
    CHECK(pool->stats().in_use_bytes == 0);
    const size_t reserved = pool->stats().reserved_bytes;
    CHECK(pool->trim() == reserved);
    CHECK(device.live_bytes() == 0);
  }
}

TEST_CASE("after warm-up no call allocates or frees, whatever sizes come") {
  CountingDevice& device = new_device();
  Owner pool(device, options(8 * kMiB, kMiB, AtCapacity::kFallback));
  Random random(4);
  auto run = [&](int rounds) {
    std::vector<LeasePtr> leases;
    for (int i = 0; i < rounds; ++i) {
      leases.push_back(pool->acquire(random.in<size_t>(1, 300 * kKiB)));
      const size_t n = random.in<size_t>(0, leases.size() - 1);
      if (leases.size() > 8) std::swap(leases[n], leases.back()), leases.pop_back();
    }
  };
  run(2000);
  const size_t warm = device.allocations();
  const uint64_t frees = pool->stats().frees;
  const int fences = device.fences;
  run(5000);
  CHECK(device.allocations() == warm);
  CHECK(pool->stats().frees == frees);
  CHECK(device.fences == fences);
}

// --- policies ----------------------------------------------------------------------------------

TEST_CASE("wait: the end of a lease in another thread ends it") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192, AtCapacity::kWait));
  LeasePtr held = pool->acquire(8192);
  LeasePtr got;
  Background waiter([&] { got = pool->acquire(100); });
  REQUIRE(eventually([&] { return pool->stats().waits == 1; }));
  CHECK_FALSE(waiter.done());
  held.reset();
  CHECK(waiter.join() == "");
  CHECK(got);
  CHECK(pool->stats().wait_seconds > 0);
  CHECK(pool->stats().exhausted == 0);
}

TEST_CASE("wait: the end of a transfer ends it") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192, AtCapacity::kWait));
  Held held(host_stream(1));
  const Output out = stage_and_launch(*pool->acquire(8192), host_stream(1));
  LeasePtr got;
  Background waiter([&] { got = pool->acquire(8192); });
  REQUIRE(eventually([&] { return pool->stats().waits == 1; }));
  CHECK(pool->stats().in_flight_slots == 1);
  held.release();
  CHECK(waiter.join() == "");
  CHECK(got);
  CHECK(out.arrived());
}

TEST_CASE("wait: the time runs out, with figures") {
  CountingDevice& device = new_device();
  for (const double timeout_s : {0.0, 0.005}) {
    Owner pool(device, whole(12288, AtCapacity::kWait, timeout_s));
    Held held(host_stream(1));
    LeasePtr lease = pool->acquire(8192);
    stage_and_launch(*pool->acquire(4096), host_stream(1));
    std::string error;
    try {
      pool->acquire(300);
    } catch (const PoolExhaustedError& e) {
      error = e.what();
    }
    CAPTURE(error);
    for (const char* part :
         {"no slot of 300 bytes", "capacity 12288 bytes", "reserved 12288", "in use 12288",
          "1 slots leased", "1 in flight", "0 quarantined", "on counting"})
      CHECK(error.find(part) != std::string::npos);
    const PoolStats s = pool->stats();
    CHECK(s.exhausted == 1);
    CHECK((error.find("after waiting 0.0") != std::string::npos) == (timeout_s > 0));
    CHECK(s.wait_seconds >= (timeout_s > 0 ? timeout_s : 0));
    CHECK(s.waits == (timeout_s > 0 ? 1 : 0));
    held.release();
    drain(host_stream(1));
  }
}

TEST_CASE("wait: close ends it") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192, AtCapacity::kWait));
  LeasePtr held = pool->acquire(8192);
  Background a([&] { pool->acquire(100); }), b([&] { pool->acquire(8192); });
  REQUIRE(eventually([&] { return pool->stats().waits == 2; }));
  pool->close();
  CHECK(a.join() == "this StagingPool (counting) is closed");
  CHECK(b.join() == "this StagingPool (counting) is closed");
}

struct Interrupted {};

TEST_CASE("wait: the caller looks up now and then, without the pool's mutex, and may give up") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192, AtCapacity::kWait));
  LeasePtr held = pool->acquire(8192);
  int looks = 0;
  auto give_up = [&] {
    CHECK(pool->stats().leased_slots == 1);  // takes the mutex
    if (++looks == 2) throw Interrupted();
  };
  CHECK_THROWS_AS(pool->acquire(1, give_up), Interrupted);
  CHECK(looks == 2);
  PoolStats s = pool->stats();
  CHECK(s.waits == 1);
  CHECK(s.wait_seconds >= 0.1);
  CHECK(s.exhausted == 0);
  CHECK(s.in_use_bytes == 8192);
  // A slot that `poll` frees ends the wait like any other.
  LeasePtr got = pool->acquire(1, [&] { held.reset(); });
  CHECK(got);
  CHECK(pool->stats().waits == 2);
  // Without a wait, `poll` is not called.
  CHECK(pool->acquire(1, [] { throw Interrupted(); }));
}

TEST_CASE("raise: the wait for another thread's look through the queues can be given up too") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192));
  stage_and_launch(*pool->acquire(8192), host_stream(1));
  std::atomic<bool> asked{false}, open{false};
  device.on_query = [&] {
    asked = true;
    while (!open) std::this_thread::yield();
  };
  Background looks([&] { pool->stats(); });
  REQUIRE(eventually([&] { return asked.load(); }));
  CHECK_THROWS_AS(pool->acquire(1, [] { throw Interrupted(); }), Interrupted);
  CHECK(pool->stats().exhausted == 0);
  open = true;
  CHECK(looks.join() == "");
}

TEST_CASE("no policy waits for ever while another thread's device call is stuck") {
  CountingDevice& device = new_device();
  for (const AtCapacity policy : {AtCapacity::kRaise, AtCapacity::kFallback, AtCapacity::kWait}) {
    PoolOptions options;
    options.capacity_bytes = 2 << 20;
    options.reserve_bytes = 1 << 20;
    options.at_capacity = policy;
    options.timeout_s = 0.1;
    Owner pool(device, options);
    LeasePtr idle = pool->acquire(1 << 20), kept = pool->acquire(1 << 20);  // two segments
    idle.reset();
    std::atomic<bool> stuck{false}, open{false};
    device.on_free = [&] {
      stuck = true;
      while (!open) std::this_thread::yield();
    };
    Background trims([&] { pool->trim(); });
    REQUIRE(eventually([&] { return stuck.load(); }));
    if (policy == AtCapacity::kFallback)
      CHECK_FALSE(pool->acquire(4096));
    else
      CHECK_THROWS_AS(pool->acquire(4096), PoolExhaustedError);
    CHECK_FALSE(open);
    open = true;
    CHECK(trims.join() == "");
    device.on_free = nullptr;
  }
}

TEST_CASE("close can be given up: the pool is closed, and what is in flight comes back later") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192, AtCapacity::kWait));
  Held held(host_stream(1));
  const Output out = stage_and_launch(*pool->acquire(4096), host_stream(1));
  auto give_up = [&] {
    CHECK(pool->stats().in_flight_slots == 1);
    throw Interrupted();
  };
  CHECK_THROWS_AS(pool->close(give_up), Interrupted);
  CHECK(pool->closed());
  CHECK_THROWS_AS(pool->acquire(1), PoolClosedError);
  CHECK(device.live_bytes() == 8192);
  held.release();
  drain(host_stream(1));
  reap_dropped_pools();
  CHECK(device.live_bytes() == 0);
  CHECK(out.arrived());
  pool->close(give_up);  // nothing to wait for
}

TEST_CASE("raise: at once, and counted") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192));
  LeasePtr held = pool->acquire(8192);
  CHECK_THROWS_AS(pool->acquire(1), PoolExhaustedError);
  CHECK_THROWS_AS(pool->acquire(1), PoolExhaustedError);
  CHECK(pool->stats().exhausted == 2);
  CHECK(pool->stats().waits == 0);
  CHECK(pool->stats().wait_seconds == 0);
  held.reset();
  CHECK(pool->acquire(1));
}

TEST_CASE("fallback: null, at once") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192, AtCapacity::kFallback));
  LeasePtr held = pool->acquire(8192);
  CHECK_FALSE(pool->acquire(1));
  CHECK_FALSE(pool->acquire(8193));
  CHECK_FALSE(pool->acquire(kHuge));
  CHECK(pool->stats().exhausted == 0);
}

TEST_CASE("a request above the capacity never fits") {
  CountingDevice& device = new_device();
  for (const AtCapacity policy : {AtCapacity::kWait, AtCapacity::kRaise}) {
    Owner pool(device, whole(12288, policy));
    for (const size_t bytes : {size_t{12289}, kHuge / 2 + 1, kHuge - 1, kHuge}) {
      CHECK_THROWS_AS(pool->acquire(bytes), RequestTooLargeError);
      CHECK_FALSE(pool->try_acquire(bytes));
    }
    CHECK(pool->stats().exhausted == 4);
    CHECK(pool->stats().waits == 0);
  }
  // A request that fits must not become too large by rounding up.
  constexpr size_t kOdd = 17 * 4096;
  REQUIRE(size_class(kOdd - 100) > kOdd);
  Owner pool(device, whole(kOdd));
  for (const size_t bytes : {kOdd - 100, kOdd}) {
    CHECK(pool->try_acquire(bytes));
    CHECK(pool->acquire(bytes)->bytes() == kOdd);
  }
}

TEST_CASE("raise waits for a look through the queues that another thread is in the middle of") {
  CountingDevice& device = new_device();
  std::mutex mutex;
  std::condition_variable changed;
  bool asked = false, open = false;
  device.on_query = [&] {
    std::unique_lock<std::mutex> lock(mutex);
    asked = true;
    changed.notify_all();
    changed.wait(lock, [&] { return open; });
  };
  Owner pool(device, whole(8192));
  LeasePtr first = pool->acquire(4096), second = pool->acquire(4096);
  for (LeasePtr* lease : {&first, &second}) {
    stage_and_launch(**lease, host_stream(1));
    lease->reset();
  }
  drain(host_stream(1));
  Background looks([&] { first = pool->acquire(4096); });
  {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return asked; });
  }
  // The transfers of both slots are done, but the other thread has not yet found out.
  Background raises([&] { second = pool->acquire(4096); });
  for (int i = 0; i < 5000 && !raises.done(); ++i) pool->stats();
  {
    std::lock_guard<std::mutex> guard(mutex);
    open = true;
  }
  changed.notify_all();
  CHECK(looks.join() == "");
  CHECK(raises.join() == "");
  CHECK(first);
  CHECK(second);
}

TEST_CASE("raise waits for memory that another thread is in the middle of giving back") {
  CountingDevice& device = new_device();
  std::atomic<bool> asked{false}, open{false};
  device.on_free = [&] {
    asked = true;
    while (!open) std::this_thread::yield();
  };
  Owner pool(device, whole(8192));
  Background trims([&] { pool->trim(); });
  REQUIRE(eventually([&] { return asked.load(); }));
  // The memory is reserved, and holds no slot any more.
  LeasePtr lease;
  std::atomic<bool> waits{false};
  Background raises([&] { lease = pool->acquire(4096, [&] { waits = true; }); });
  CHECK(eventually([&] { return waits || raises.done(); }));
  open = true;
  CHECK(trims.join() == "");
  CHECK(raises.join() == "");
  CHECK(lease);
}

// --- recycling ---------------------------------------------------------------------------------

TEST_CASE("a stuck stream keeps its own slots and no others") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(6 * 4096));
  Held held(host_stream(1));
  std::vector<Output> outs;
  std::vector<LeasePtr> leases = acquire_all(*pool, 4096);
  REQUIRE(leases.size() == 6);
  std::vector<char*> other;
  for (size_t i = 0; i < 6; ++i) {  // the stuck stream gets the first slot and every other one
    outs.push_back(stage_and_launch(*leases[i], host_stream(i % 2 ? 2 : 1)));
    if (i % 2) other.push_back(leases[i]->data());
  }
  leases.clear();
  CHECK(pool->stats().leased_slots == 0);
  drain(host_stream(2));

  leases = acquire_all(*pool, 4096);
  CHECK(leases.size() == 3);
  for (const LeasePtr& lease : leases)
    CHECK(std::count(other.begin(), other.end(), lease->data()) == 1);
  CHECK(pool->stats().in_flight_slots == 3);
  for (const LeasePtr& lease : leases) write(*lease, fresh_ids(512));

  held.release();
  drain(host_stream(1));
  CHECK(acquire_all(*pool, 4096).size() == 3);
  for (const Output& out : outs) CHECK(out.arrived());
}

TEST_CASE("no slot is written while a stream still has to read it") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4 * 4096));
  Held held(host_stream(1));
  std::vector<Output> outs;
  for (int i = 0; i < 4; ++i)
    outs.push_back(stage_and_launch(*pool->acquire(4096), host_stream(1)));
  CHECK_FALSE(pool->try_acquire(1));
  CHECK_THROWS_AS(pool->acquire(1), PoolExhaustedError);
  CHECK(pool->trim() == 0);
  CHECK(pool->stats().in_use_bytes == 4 * 4096);
  held.release();
  drain(host_stream(1));
  for (LeasePtr& lease : acquire_all(*pool, 64)) std::memset(lease->data(), 0, lease->bytes());
  for (const Output& out : outs) CHECK(out.arrived());
}

TEST_CASE("a slot comes back after the last of its readers") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4096));
  for (const int last : {1, 2, 3}) {
    std::vector<std::unique_ptr<Held>> held;
    std::vector<Output> outs;
    LeasePtr lease = pool->acquire(4096);
    const Ids ids = fresh_ids(512);
    write(*lease, ids);
    for (const int stream : {1, 2, 3}) {
      held.push_back(std::make_unique<Held>(host_stream(stream)));
      outs.push_back(launch(*lease, host_stream(stream), ids));
    }
    lease.reset();
    for (const int stream : {1, 2, 3}) {
      if (stream == last) continue;
      held[stream - 1]->release();
      drain(host_stream(stream));
      CHECK_FALSE(pool->try_acquire(1));
    }
    held[last - 1]->release();
    drain(host_stream(last));
    CHECK(pool->try_acquire(4096));
    for (const Output& out : outs) CHECK(out.arrived());
  }
  CHECK(device.fences == 3);
}

TEST_CASE("transfers on one stream share a fence, which covers the last of them") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4096));
  LeasePtr lease = pool->acquire(4096);
  const Ids ids = fresh_ids(512);
  write(*lease, ids);
  Output first = launch(*lease, host_stream(1), ids);
  drain(host_stream(1));
  Held held(host_stream(1));
  Output second = launch(*lease, host_stream(1), ids);
  CHECK(device.fences == 1);
  lease.reset();
  CHECK_FALSE(pool->try_acquire(1));  // the first is done, the second is not
  held.release();
  drain(host_stream(1));
  lease = pool->try_acquire(4096);
  REQUIRE(lease);
  CHECK(first.arrived());
  CHECK(second.arrived());
  stage_and_launch(*lease, host_stream(2));  // another stream reuses the fence
  CHECK(device.fences == 1);
}

TEST_CASE("leases that end in another order than their transfers") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4 * 4096));
  LeasePtr early = pool->acquire(4096), late = pool->acquire(4096);
  const char* held_data = late->data();
  const Output first = stage_and_launch(*early, host_stream(1));
  drain(host_stream(1));
  Held held(host_stream(1));
  const Output second = stage_and_launch(*late, host_stream(1));
  late.reset();  // is queued ahead of `early`
  early.reset();
  for (const LeasePtr& lease : acquire_all(*pool, 4096)) {
    CHECK(lease->data() != held_data);
    write(*lease, fresh_ids(512));
  }
  held.release();
  drain(host_stream(1));
  CHECK(acquire_all(*pool, 4096).size() == 4);
  CHECK(first.arrived());
  CHECK(second.arrived());
}

TEST_CASE("the newest fence of a stream vouches for those before it") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8 * 4096));
  std::vector<LeasePtr> leases = acquire_all(*pool, 4096);
  REQUIRE(leases.size() == 8);
  for (const LeasePtr& lease : leases) stage_and_launch(*lease, host_stream(1));
  leases.clear();
  drain(host_stream(1));
  int queries = 0;
  device.on_query = [&] { ++queries; };
  CHECK(pool->stats().in_flight_slots == 0);
  CHECK(queries == 1);
  device.on_query = nullptr;
}

TEST_CASE("a lease keeps its slot after its transfers, and its fence can be waited for") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4096));
  LeasePtr lease = pool->acquire(4096);
  const int64_t id = 17;
  int64_t out = 0;
  std::memcpy(lease->data(), &id, sizeof id);
  Transfer t;
  t.src = lease->data();
  t.wire = t.out = IntType::kInt64;
  t.dst = &out;
  t.count = 1;
  device.synchronize(lease->launch_transfer(t, host_stream(1)));
  CHECK(out == 17);
  t.kind = TransferKind::kCopyEngine;
  device.synchronize(lease->launch_transfer(t, host_stream(1)));
  CHECK_FALSE(pool->try_acquire(1));
  const PoolStats s = pool->stats();
  CHECK(s.kernel_transfers == 1);
  CHECK(s.copy_engine_transfers == 1);
  CHECK(s.wire_bytes == 16);
  CHECK(s.leased_slots == 1);
  lease.reset();
  CHECK(pool->try_acquire(4096));
}

TEST_CASE("random holds: what a stream has yet to read stays as it was") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(64 * kKiB, AtCapacity::kFallback));
  Random random(5);
  std::unique_ptr<Held> held[3];
  std::vector<Output> outs;
  std::vector<LeasePtr> leases;
  for (int round = 0; round < 4000; ++round) {
    const int s = random.in(0, 2);
    if (random.one_in(10)) held[s] = held[s] ? nullptr : std::make_unique<Held>(host_stream(s));
    LeasePtr lease = pool->acquire(random.in<size_t>(8, 8 * kKiB));
    if (!lease) {
      leases.clear();
      held[s] = nullptr;
      continue;
    }
    const Ids ids = fresh_ids(lease->bytes() / sizeof(int64_t));
    write(*lease, ids);
    for (int readers = random.in(0, 3); readers > 0; --readers)
      outs.push_back(launch(*lease, host_stream(random.in(0, 2)), ids));
    if (random.one_in(4)) leases.push_back(std::move(lease));
  }
  for (int s = 0; s < 3; ++s) {
    held[s] = nullptr;
    drain(host_stream(s));
  }
  CHECK(std::all_of(outs.begin(), outs.end(), [](const Output& o) { return o.arrived(); }));
  leases.clear();
  CHECK(pool->trim() == 64 * kKiB);
  CHECK(device.allocations() == 1);
}

// --- failures ----------------------------------------------------------------------------------

TEST_CASE("a failed allocation is reported, and leaves no trace") {
  CountingDevice& device = new_device();
  device.fail = Fail::kAllocate;
  CHECK_THROWS_AS(Owner(device, whole(kMiB)), DeviceError);
  Owner pool(device, options(kMiB, 0, AtCapacity::kWait));
  CHECK_THROWS_AS(pool->acquire(100), DeviceError);
  CHECK(pool->stats().reserved_bytes == 0);
  CHECK(pool->stats().allocations == 0);
  device.fail = Fail::kNothing;
  CHECK(pool->acquire(kMiB));
  check_figures(*pool, device);
}

TEST_CASE("pageable memory serves, is counted, and tells why") {
  CountingDevice& device = new_device();
  Owner pool(device, options(2 * kMiB, kMiB));
  CHECK(pool->why_pageable() == "");
  CHECK(pool->stats().pageable_bytes == 0);
  LeasePtr a = pool->acquire(kMiB);
  device.fail = Fail::kPageable;
  LeasePtr b = pool->acquire(kMiB);
  CHECK(b->device_data() == nullptr);
  CHECK(pool->why_pageable() == "told to");
  CHECK(pool->stats().pageable_bytes == kMiB);
  const Output out = stage_and_launch(*b, host_stream(1));
  b.reset();
  drain(host_stream(1));
  CHECK(out.arrived());
  CHECK(pool->trim() == kMiB);
  CHECK(pool->stats().pageable_bytes == 0);
}

TEST_CASE("after a failed launch the slot comes back") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4096));
  for (const Fail fail : {Fail::kFence, Fail::kLaunch}) {
    LeasePtr lease = pool->acquire(4096);
    device.fail = fail;
    CHECK_THROWS_AS(stage_and_launch(*lease, host_stream(1)), DeviceError);
    device.fail = Fail::kNothing;
    lease.reset();
    CHECK(pool->stats().in_use_bytes == 0);
  }
  LeasePtr lease = pool->acquire(4096);
  Held held(host_stream(1));
  const Output out = stage_and_launch(*lease, host_stream(1));
  CHECK(device.fences == 1);    // the fence of the failed launch was reused
  device.fail = Fail::kLaunch;  // a further launch fails: the first transfer still holds the slot
  CHECK_THROWS_AS(launch(*lease, host_stream(1), out.expected), DeviceError);
  CHECK_THROWS_AS(launch(*lease, host_stream(2), out.expected), DeviceError);
  device.fail = Fail::kNothing;
  lease.reset();
  CHECK_FALSE(pool->try_acquire(1));
  held.release();
  drain(host_stream(1));
  CHECK(pool->try_acquire(4096));
  CHECK(out.arrived());
  CHECK(pool->stats().kernel_transfers == 1);
}

TEST_CASE("a slot without a fence is quarantined") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192));
  LeasePtr lease = pool->acquire(4096);
  char* const lost = lease->data();
  const Ids ids = fresh_ids(512);
  write(*lease, ids);
  device.fail = Fail::kRecord;
  CHECK_THROWS_AS(launch(*lease, host_stream(1), ids), DeviceError);
  device.fail = Fail::kNothing;
  launch(*lease, host_stream(1), ids);  // a later fence does not end the quarantine
  lease.reset();
  drain(host_stream(1));
  CHECK(pool->stats().quarantined_slots == 1);
  CHECK(pool->stats().in_use_bytes == 4096);
  CHECK(pool->stats().in_flight_slots == 0);
  for (int i = 0; i < 3; ++i) {
    const std::vector<LeasePtr> rest = acquire_all(*pool, 4096);
    REQUIRE(rest.size() == 1);
    CHECK(rest[0]->data() != lost);
  }
  CHECK(pool->trim() == 0);
  pool->close();
  pool.drop();
  CHECK(device.live_bytes() == 8192);  // not freed, because a stream may still read it
  CHECK(device.live_fences == 0);
  host_device().free({lost, nullptr, 8192});  // the first slot is at the segment's start
}

TEST_CASE("a failed query is reported; the slots come back once it succeeds") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192, AtCapacity::kWait, 0.002));
  for (const int stream : {1, 2}) {
    stage_and_launch(*pool->acquire(4096), host_stream(stream));
    drain(host_stream(stream));
    device.fail = Fail::kQuery;
    CHECK_THROWS_AS(pool->acquire(8192), DeviceError);
    CHECK_THROWS_AS(pool->try_acquire(8192), DeviceError);
    CHECK_THROWS_AS(pool->trim(), DeviceError);
    CHECK(pool->stats().in_flight_slots == 1);
    device.fail = Fail::kNothing;
    CHECK(pool->try_acquire(8192));
  }
}

// --- the end -----------------------------------------------------------------------------------

TEST_CASE("close frees an idle pool, and may be called again") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(kMiB));
  stage_and_launch(*pool->acquire(100), host_stream(1));  // close() waits for it if it is not done
  pool->close();
  CHECK(device.live_bytes() == 0);
  CHECK(pool->closed());
  CHECK_THROWS_AS(pool->acquire(1), PoolClosedError);
  CHECK_THROWS_AS(pool->try_acquire(1), PoolClosedError);
  CHECK_THROWS_AS(pool->check_usable(), PoolClosedError);
  CHECK(pool->trim() == 0);
  pool->close();
  check_figures(*pool, device);
  pool.drop();
  CHECK(device.live_fences == 0);
}

TEST_CASE("leases outlive close, and free what they hold") {
  CountingDevice& device = new_device();
  Owner pool(device, options(2 * kMiB, kMiB));
  LeasePtr a = pool->acquire(kMiB), b = pool->acquire(kMiB);
  const Ids ids = fresh_ids(kMiB / 8);
  write(*b, ids);
  pool->close();
  CHECK(device.live_bytes() == 2 * kMiB);
  a.reset();
  CHECK(device.live_bytes() == kMiB);
  const Output out = launch(*b, host_stream(1), ids);
  b.reset();
  drain(host_stream(1));
  pool->close();
  CHECK(out.arrived());
  CHECK(device.live_bytes() == 0);
}

TEST_CASE("close gives up on a stuck stream; a later call on any pool frees the slots") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(kMiB, AtCapacity::kWait, 0.002));
  Held held(host_stream(1));
  const Output out = stage_and_launch(*pool->acquire(kMiB), host_stream(1));
  pool->close();
  pool->close();
  CHECK(pool->stats().in_flight_slots == 1);
  reap_dropped_pools();
  CHECK(device.live_bytes() == kMiB);
  held.release();
  drain(host_stream(1));
  reap_dropped_pools();
  CHECK(device.live_bytes() == 0);
  CHECK(pool->stats().in_flight_slots == 0);
  CHECK(out.arrived());
}

TEST_CASE("close waits for slots in flight") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4096));
  auto held = std::make_unique<Held>(host_stream(1));
  int queries = 0;
  device.on_query = [&] {
    if (++queries == 3) held = nullptr;
  };
  const Output out = stage_and_launch(*pool->acquire(4096), host_stream(1));
  pool->close();
  CHECK(queries >= 3);
  CHECK(device.live_bytes() == 0);
  CHECK(out.arrived());
}

TEST_CASE("close on a lost device does not throw; nothing in flight is freed") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4096));
  stage_and_launch(*pool->acquire(4096), host_stream(1));
  drain(host_stream(1));
  device.fail = Fail::kQuery;
  pool->close();
  reap_dropped_pools();
  CHECK(device.live_bytes() == 4096);
  device.fail = Fail::kNothing;
  reap_dropped_pools();
  CHECK(device.live_bytes() == 0);
}

TEST_CASE("a pool closed while it grows keeps nothing") {
  CountingDevice& device = new_device();
  Owner pool(device, options(kMiB, 0));
  device.on_allocate = [&] { pool->close(); };
  CHECK_THROWS_AS(pool->acquire(100), PoolClosedError);
  CHECK(device.live_bytes() == 0);
  CHECK(pool->stats().reserved_bytes == 0);
}

TEST_CASE("dropped pools live on until their streams are through") {
  CountingDevice& device = new_device();
  std::vector<Output> outs;
  LeasePtr lease;
  Held held1(host_stream(1)), held2(host_stream(2));
  {
    Owner a(device, whole(8192)), b(device, whole(8192)), idle(device, whole(8192));
    outs.push_back(stage_and_launch(*a->acquire(4096), host_stream(1)));
    outs.push_back(stage_and_launch(*b->acquire(8192), host_stream(2)));
    lease = a->acquire(4096);
  }
  CHECK(device.live_bytes() == 2 * 8192);
  reap_dropped_pools();
  CHECK(device.live_bytes() == 2 * 8192);

  held2.release();
  drain(host_stream(2));
  reap_dropped_pools();
  CHECK(device.live_bytes() == 8192);

  outs.push_back(stage_and_launch(*lease, host_stream(1)));  // from a pool whose owner is gone
  lease.reset();
  held1.release();
  drain(host_stream(1));
  CHECK(device.live_bytes() == 8192);
  reap_dropped_pools();
  CHECK(device.live_bytes() == 0);
  CHECK(device.live_fences == 0);
  for (const Output& out : outs) CHECK(out.arrived());
}

TEST_CASE("the last lease of a dropped pool frees it") {
  CountingDevice& device = new_device();
  LeasePtr lease = Owner(device, whole(8192))->acquire(100);
  CHECK(device.live_bytes() == 8192);
  Background([&] { lease.reset(); }).join();
  CHECK(device.live_bytes() == 0);
}

// --- fork --------------------------------------------------------------------------------------

template <typename E, typename Call>
bool throws(Call call) {
  try {
    call();
  } catch (const E&) {
    return true;
  } catch (...) {
  }
  return false;
}

// Runs in a child of fork. Returns the number of the first step that went wrong, or 0.
int child_of_fork(Owner& pool, LeasePtr& lease) {
  auto forked = [](auto call) { return throws<ForkedProcessError>(call); };
  if (!forked([&] { pool->acquire(1); })) return 1;
  if (!forked([&] { pool->try_acquire(1); })) return 2;
  if (!forked([&] { pool->trim(); })) return 3;
  if (!forked([&] { pool->stats(); })) return 4;
  if (!forked([&] { pool->closed(); })) return 5;
  if (!forked([&] { pool->check_usable(); })) return 6;
  if (!forked([&] { pool->why_pageable(); })) return 7;
  if (!forked([&] { launch(*lease, host_stream(1), {1}); })) return 8;
  pool->close();
  lease.reset();
  pool.drop();
  CountingDevice device;  // uses the child's own host device
  {
    Owner fresh(device, whole(8192));
    Output out = stage_and_launch(*fresh->acquire(8192), host_stream(1));
    drain(host_stream(1));
    if (!out.arrived() || !fresh->try_acquire(8192)) return 9;
  }
  return device.live_bytes() == 0 ? 0 : 10;
}

#ifdef PYSTAGE_TSAN
// ThreadSanitizer kills a child that starts threads after a fork of a process with several threads.
// This child must start threads: its host streams are threads.
constexpr bool kSkipFork = true;
#else
constexpr bool kSkipFork = false;
#endif

TEST_CASE("a child of fork can use neither pool nor lease, lets go of both, and makes its own" *
          doctest::skip(kSkipFork)) {
  CountingDevice& device = new_device();
  {
    Owner pool(device, whole(8192, AtCapacity::kWait, 60));
    LeasePtr lease = pool->acquire(4096), rest = pool->acquire(4096);
    drain(host_stream(1));
    Held held(host_stream(1));
    stage_and_launch(*rest, host_stream(1));
    rest.reset();
    // At fork, one thread waits on the pool's condition variable and another often holds its mutex.
    // Neither thread exists in the child. All threads have started before the fork, including the
    // stream's: a thread that is starting may be inside AddressSanitizer's allocator, and a child
    // inherits the locks of that allocator as they are (GCC 12).
    Background waiter([&] { pool->acquire(8192); });
    std::atomic<bool> begun{false}, stop{false};
    Background busy([&] {
      for (begun = true; !stop;) pool->stats();
    });
    REQUIRE(eventually([&] { return begun && pool->stats().waits == 1; }));
    for (int i = 0; i < 10; ++i) {
      const pid_t child = fork();
      REQUIRE(child >= 0);
      if (child == 0) {
        alarm(30);  // a child that hangs fails
        exit_child(child_of_fork(pool, lease));
      }
      int status = 0;
      REQUIRE(waitpid(child, &status, 0) == child);
      CHECK_FALSE(WIFSIGNALED(status));
      CHECK(WEXITSTATUS(status) == 0);
    }
    stop = true;
    lease.reset();  // the parent is not affected
    held.release();
    CHECK(waiter.join() == "");
  }
  reap_dropped_pools();
  CHECK(device.live_bytes() == 0);
}

// Runs `steps` in a child and returns how the child ended. `steps` returns the number of the first
// step that went wrong, or 0.
template <typename Steps>
int in_child(Steps steps) {
  std::fflush(stdout);  // otherwise the child may print it again
  const pid_t child = fork();
  if (child < 0) return -1;
  if (child == 0) {
    alarm(30);
    exit_child(steps());
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) return -2;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status) - 10;
}

// A model device starts no threads, so these tests also run under ThreadSanitizer.
Output launch_on(ModelDevice& device, Lease& lease, size_t stream) {
  Ids ids = fresh_ids(lease.bytes() / sizeof(int64_t));
  write(lease, ids);
  Transfer t;
  t.src = lease.data();
  t.wire = IntType::kInt64;
  t.count = ids.size();
  lease.launch_transfer(t, device.stream(stream));
  return {std::move(ids), nullptr};
}

TEST_CASE("a child of fork leaves the parent's orphans and their device alone, and has its own") {
  ModelDevice device(2);
  auto orphan = Pool::create(device, whole(8192));
  launch_on(device, *orphan->acquire(4096), 0);
  Pool::drop(std::move(orphan));
  device.finish();                                // the next call on any pool frees the orphan
  auto pool = Pool::create(device, whole(8192));  // this is that call
  CHECK(device.live_bytes() == 8192);
  LeasePtr leased = pool->acquire(4096), flying = pool->acquire(4096);
  orphan = Pool::create(device, whole(4096));
  launch_on(device, *orphan->acquire(4096), 0);
  Pool::drop(std::move(orphan));
  device.finish();
  launch_on(device, *leased, 1);
  launch_on(device, *flying, 1);
  flying = nullptr;

  CHECK(in_child([&] {
          int calls = 0;
          device.on_call = [&](const char*) { ++calls; };
          ModelDevice own(1);
          auto fresh = Pool::create(own, whole(8192));  // checks the orphans
          LeasePtr lease = fresh->acquire(4096);
          launch_on(own, *lease, 0);
          lease = nullptr;
          Pool::drop(std::move(fresh));  // becomes an orphan in the child
          if (own.live_bytes() != 8192) return 1;
          leased = nullptr;
          pool->close();
          Pool::drop(std::move(pool));
          if (calls) return 2;
          own.finish();
          ModelDevice third(1);
          Pool::drop(Pool::create(third, whole(4096)));
          if (own.live_bytes() != 0 || own.live_fences() != 0) return 3;
          return calls ? 4 : 0;
        }) == 0);

  // The parent's pools have not changed.
  CHECK(device.live_bytes() == 8192 + 4096);
  CHECK(pool->stats().leased_slots == 1);
  reap_dropped_pools();
  CHECK(device.live_bytes() == 8192);
  leased = nullptr;
  device.finish();
  CHECK(pool->trim() == 8192);
  Pool::drop(std::move(pool));
  CHECK(device.live_fences() == 0);
  CHECK(device.wrong == "");
}

TEST_CASE("a child of fork can launch from no lease of its parent's, and its own child from none") {
  ModelDevice device(1);
  auto pool = Pool::create(device, whole(8192));
  LeasePtr lease = pool->acquire(4096);
  CHECK(in_child([&] {
          int calls = 0;
          device.on_call = [&](const char*) { ++calls; };
          if (!throws<ForkedProcessError>([&] { launch_on(device, *lease, 0); })) return 1;
          if (calls) return 2;
          ModelDevice own(1);
          auto fresh = Pool::create(own, whole(4096));
          LeasePtr second = fresh->acquire(4096);
          const int grandchild = in_child([&] {
            for (LeasePtr* l : {&lease, &second})
              if (!throws<ForkedProcessError>([&] { launch_on(own, **l, 0); })) return 1;
            second = lease = nullptr;
            Pool::drop(std::move(fresh));
            return 0;
          });
          if (grandchild != 0) return 3;
          launch_on(own, *second, 0);
          second = nullptr;
          own.finish();
          fresh->close();
          return own.live_bytes() == 0 ? 0 : 4;
        }) == 0);
  launch_on(device, *lease, 0);
  lease = nullptr;
  device.finish();
  pool->close();
  CHECK(device.live_bytes() == 0);
}

TEST_CASE("a wait whose caller forks ends in the child, and goes on in the parent") {
  ModelDevice device(1);
  PoolOptions waits = whole(4096, AtCapacity::kWait, 30);
  auto pool = Pool::create(device, waits);
  LeasePtr lease = pool->acquire(4096);
  pid_t child = -1;
  auto fork_once = [&] {
    if (child == -1) child = fork();
    if (child == 0) return;
    lease = nullptr;
  };
  LeasePtr got;
  bool ended = false;
  try {
    got = pool->acquire(1, fork_once);
  } catch (const ForkedProcessError&) {
    ended = true;
  }
  if (child == 0) exit_child(ended ? 0 : 1);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(got);
  CHECK_FALSE(ended);
  launch_on(device, *got, 0);
  got = nullptr;
  child = -1;
  try {
    pool->close([&] {
      if (child == -1) child = fork();
      device.finish();
    });
  } catch (const ForkedProcessError&) {
    ended = true;
  }
  if (child == 0) exit_child(ended && device.live_bytes() == 4096 ? 0 : 1);
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK_FALSE(ended);
  CHECK(device.live_bytes() == 0);
}

// --- stress ------------------------------------------------------------------------------------

// The transfers that a thread still has to check. The thread has one fence of its own per stream,
// recorded after them.
class Checker {
 public:
  void launch(Lease& lease, int stream, const Ids& ids) {
    outs_.push_back(testing::launch(lease, host_stream(stream), ids));
    fences_[stream].record(host_stream(stream));
    if (outs_.size() >= 16) check();
  }
  void check() {
    for (Fence& fence : fences_) fence.synchronize();
    for (const Output& out : outs_) wrong_ += !out.arrived();
    checked_ += outs_.size();
    outs_.clear();
  }
  size_t wrong() const { return wrong_; }
  size_t checked() const { return checked_; }

  static constexpr int kStreams = 4;

 private:
  Fence fences_[kStreams];
  std::vector<Output> outs_;
  size_t wrong_ = 0, checked_ = 0;
};

void share_a_small_pool(int rounds) {
  constexpr int kThreads = 4;
  CountingDevice& device = new_device();
  Owner pool(device, options(48 * kKiB, 0, AtCapacity::kWait, 60));
  // A lease that any thread may take over, and that several threads may launch from at once.
  std::mutex shared_mutex;
  std::pair<LeasePtr, Ids> shared;
  std::atomic<size_t> wrong{0}, checked{0};
  std::atomic<int> running{kThreads};
  auto work = [&](int seed) {
    Random random(seed);
    Checker checker;
    for (int round = 0; round < rounds; ++round) {
      const auto stream = [&] { return random.in(0, Checker::kStreams - 1); };
      const size_t bytes = random.in<size_t>(8, random.one_in(4) ? 12 * kKiB : kKiB);
      LeasePtr lease = pool->acquire(bytes);
      Ids ids = fresh_ids(bytes / sizeof(int64_t));
      write(*lease, ids);
      for (int readers = random.in(1, 3); readers > 0; --readers)
        checker.launch(*lease, stream(), ids);
      if (random.one_in(8)) {
        std::lock_guard<std::mutex> guard(shared_mutex);
        shared = {std::move(lease), std::move(ids)};
      } else if (random.one_in(4)) {
        std::unique_lock<std::mutex> lock(shared_mutex);
        const auto [borrowed, its_ids] = shared;
        lock.unlock();
        if (borrowed) checker.launch(*borrowed, stream(), its_ids);
      }
    }
    checker.check();
    wrong += checker.wrong();
    checked += checker.checked();
    --running;
  };
  {
    std::vector<std::unique_ptr<Background>> threads;
    for (int n = 0; n < kThreads; ++n)
      threads.push_back(std::make_unique<Background>([&, n] { work(n); }));
    while (running) {  // this thread only reads the figures and trims
      const PoolStats s = pool->stats();
      CHECK(s.reserved_bytes <= s.capacity_bytes);
      pool->trim();
      std::this_thread::yield();
    }
    for (auto& thread : threads) CHECK(thread->join() == "");
  }
  shared = {};
  CHECK(wrong == 0);
  CHECK(checked >= static_cast<size_t>(kThreads * rounds));
  CHECK(pool->stats().waits > 0);
  CHECK(pool->stats().high_water_bytes > 40 * kKiB);
  CHECK(device.max_bytes() <= 48 * kKiB);
  pool->close();
  CHECK(device.live_bytes() == 0);
}

TEST_CASE("stress: threads and streams share a pool that is too small") {
  share_a_small_pool(20000);
}

TEST_CASE("stress: and canaries find nothing") {
  const Canaries canaries;
  share_a_small_pool(5000);
}

TEST_CASE("stress: threads launch from one lease") {
  constexpr int kThreads = 4, kRounds = 300;
  CountingDevice& device = new_device();
  Owner pool(device, whole(64 * kKiB, AtCapacity::kWait));
  std::atomic<size_t> wrong{0};
  for (int round = 0; round < 20; ++round) {
    LeasePtr lease = pool->acquire(4 * kKiB);
    const Ids ids = fresh_ids(512);
    write(*lease, ids);
    std::vector<std::unique_ptr<Background>> threads;
    for (int n = 0; n < kThreads; ++n) {
      threads.push_back(std::make_unique<Background>([&, n, mine = lease] {
        Checker checker;
        for (int i = 0; i < kRounds / 20; ++i) checker.launch(*mine, (i + n) % 3, ids);
        checker.check();
        wrong += checker.wrong();
      }));
    }
    lease.reset();
    for (auto& thread : threads) CHECK(thread->join() == "");
  }
  CHECK(wrong == 0);
  CHECK(device.fences <= 6);  // one per stream for each of two overlapping rounds
  CHECK(pool->stats().kernel_transfers == kThreads * kRounds);
}

TEST_CASE("stress: pools come and go with transfers in flight") {
  constexpr int kThreads = 3, kRounds = 400;
  CountingDevice& device = new_device();
  std::atomic<size_t> wrong{0};
  auto work = [&](int seed) {
    Random random(seed);
    Checker checker;
    LeasePtr kept;
    for (int round = 0; round < kRounds; ++round) {
      Owner pool(device, options(64 * kKiB, random.one_in(2) ? 0 : 8192));
      for (int i = random.in(1, 3); i > 0; --i) {
        LeasePtr lease = pool->acquire(random.in<size_t>(64, 8192));
        const Ids ids = fresh_ids(lease->bytes() / sizeof(int64_t));
        write(*lease, ids);
        checker.launch(*lease, random.in(0, Checker::kStreams - 1), ids);
        if (random.one_in(2)) kept = lease;  // outlives its pool, and replaces an older lease
      }
      if (random.one_in(4)) pool->close();
    }
    checker.check();
    wrong += checker.wrong();
  };
  {
    std::vector<std::unique_ptr<Background>> threads;
    for (int n = 0; n < kThreads; ++n)
      threads.push_back(std::make_unique<Background>([&, n] { work(n); }));
    for (auto& thread : threads) CHECK(thread->join() == "");
  }
  for (int s = 0; s < Checker::kStreams; ++s) drain(host_stream(s));
  reap_dropped_pools();
  CHECK(wrong == 0);
  CHECK(device.live_bytes() == 0);
  CHECK(device.live_fences == 0);
}

// --- what a call does besides its own work ------------------------------------------------------

TEST_CASE("free slots are handed out without a look at those in flight, until these are many") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(kMiB));
  int queries = 0;
  device.on_query = [&] { ++queries; };
  for (int i = 0; i < 16; ++i) {
    stage_and_launch(*pool->try_acquire(64), host_stream(1));
    drain(host_stream(1));
    CHECK(queries == 0);
  }
  LeasePtr lease = pool->try_acquire(64);  // 16 are in flight: one query frees them all
  CHECK(queries == 1);
  stage_and_launch(*pool->try_acquire(240 * kKiB), host_stream(1));
  drain(host_stream(1));
  CHECK(pool->try_acquire(64));
  CHECK(queries == 1);
  stage_and_launch(*pool->try_acquire(16 * kKiB), host_stream(1));  // 256 KiB are in flight
  drain(host_stream(1));
  CHECK(pool->try_acquire(64));
  CHECK(queries == 2);
  CHECK(pool->try_acquire(64));  // none is in flight
  CHECK(queries == 2);
  device.on_query = nullptr;
}

TEST_CASE("a call that may not ask the device leaves what takes a look to another") {
  CountingDevice& device = new_device();
  int queries = 0;
  device.on_query = [&] { ++queries; };
  Owner pool(device, whole(8192));
  stage_and_launch(*pool->acquire(8192), host_stream(1));
  drain(host_stream(1));
  CHECK_FALSE(pool->try_acquire(1, false));  // the only slot still counts as in flight
  CHECK(queries == 0);
  CHECK(pool->try_acquire(1));
  CHECK(pool->try_acquire(1, false));
  Held held(host_stream(1));
  {
    Owner dropped(device, whole(8192));
    stage_and_launch(*dropped->acquire(4096), host_stream(1));
  }
  queries = 0;
  CHECK_FALSE(pool->try_acquire(1, false));  // a dropped pool must be checked first
  CHECK(queries == 0);
  held.release();
  drain(host_stream(1));
  CHECK(pool->try_acquire(1));
  CHECK(pool->try_acquire(1, false));
  device.on_query = nullptr;
}

TEST_CASE("slots that came back call for no look at the device") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(size_t{1} << 16));
  for (int i = 0; i < 8; ++i) {  // together more than worth_reaping() needs
    stage_and_launch(*pool->acquire(size_t{1} << 16), host_stream(1));
    drain(host_stream(1));
    REQUIRE(pool->stats().in_flight_slots == 0);
  }
  CHECK(pool->try_acquire(1, false));
}

TEST_CASE("a closed pool hands out nothing of a segment that a lease keeps") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(8192));
  LeasePtr lease = pool->acquire(100);
  pool->close();
  CHECK(device.live_bytes() == 8192);
  CHECK_THROWS_AS(pool->try_acquire(1), PoolClosedError);
  CHECK_THROWS_AS(pool->try_acquire(1, false), PoolClosedError);
  CHECK_THROWS_AS(pool->acquire(1), PoolClosedError);
  lease.reset();
  CHECK(device.live_bytes() == 0);
}

TEST_CASE("close does not wait for a device that is lost") {
  CountingDevice& device = new_device();
  Owner pool(device, whole(4096, AtCapacity::kWait, 30));
  stage_and_launch(*pool->acquire(4096), host_stream(1));
  drain(host_stream(1));
  int queries = 0;
  device.on_query = [&] { ++queries; };
  device.fail = Fail::kQuery;
  pool->close();
  CHECK(queries <= 2);  // one for itself, and one for dropped pools
  device.fail = Fail::kNothing;
  reap_dropped_pools();
  CHECK(device.live_bytes() == 0);
  device.on_query = nullptr;
}

TEST_CASE("of equal slots the one in the oldest segment is taken") {
  CountingDevice& device = new_device();
  Owner pool(device, options(3 * kMiB, 0));
  std::vector<LeasePtr> leases;
  for (int i = 0; i < 3; ++i) leases.push_back(pool->acquire(kMiB));
  char* const oldest = leases[0]->data();
  for (const int last : {0, 2}) {
    if (last == 2) std::swap(leases[0], leases[2]);
    for (LeasePtr& lease : leases) lease.reset();
    for (LeasePtr& lease : leases) lease = pool->try_acquire(kMiB);
    CHECK(leases[0]->data() == oldest);
  }
}

TEST_CASE("every call that takes or frees memory, or tells the figures, frees dropped pools too") {
  CountingDevice& device = new_device();
  CountingDevice& other = new_device();
  Owner pool(other, whole(8192));
  const std::function<void()> calls[] = {
      [&] { pool->try_acquire(1); },      [&] { pool->acquire(1); }, [&] { pool->trim(); },
      [&] { Owner(other, whole(4096)); }, [&] { pool->stats(); },    [&] { pool->close(); }};
  for (const auto& call : calls) {
    Held held(host_stream(1));
    Output out = [&] {
      Owner dropped(device, whole(8192));
      return stage_and_launch(*dropped->acquire(4096), host_stream(1));
    }();
    held.release();
    drain(host_stream(1));
    CHECK(device.live_bytes() == 8192);
    call();
    CHECK(device.live_bytes() == 0);
    CHECK(out.arrived());
  }
}

TEST_CASE("a child of fork leaves those pools alone that its parent has dropped" *
          doctest::skip(kSkipFork)) {
  CountingDevice& device = new_device();
  Held held(host_stream(1));
  stage_and_launch(*Owner(device, whole(8192))->acquire(4096), host_stream(1));
  held.release();
  drain(host_stream(1));
  REQUIRE(device.live_bytes() == 8192);  // only the parent's next call frees it
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(30);
    reap_dropped_pools();
    _exit(device.live_bytes() == 8192 ? 0 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  reap_dropped_pools();
  CHECK(device.live_bytes() == 0);
}

}  // namespace
}  // namespace pystage

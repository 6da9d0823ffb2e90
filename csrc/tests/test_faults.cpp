// Each device call that may fail, and each allocation, fails once at every place where it is made.
// In other runs, all calls from that place on fail. In every case the result must be a typed error,
// no leak, and a pool that can still be used or ended.
#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <ostream>
#include <string>
#include <vector>

#include "model_device.h"
#include "pool.h"

namespace {

// The number of allocations in this thread until one fails. t_all_after: all later ones fail too.
thread_local long t_until_failure = -1;  // negative: never
thread_local bool t_all_after = false;

bool allocation_fails() {
  if (t_until_failure < 0) return false;
  if (t_until_failure > 0) {
    --t_until_failure;
    return false;
  }
  if (!t_all_after) t_until_failure = -1;
  return true;
}

}  // namespace

// Not inlined, because GCC would then warn about mismatched new and delete.
[[gnu::noinline]] void* operator new(size_t bytes) {
  if (allocation_fails()) throw std::bad_alloc();
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace pystage {
namespace {

using testing::ModelDevice;
using LeasePtr = std::shared_ptr<Lease>;

constexpr size_t kPage = 4096;

PoolOptions options(size_t pages, size_t reserved_pages) {
  PoolOptions o;
  o.capacity_bytes = pages * kPage;
  o.reserve_bytes = reserved_pages * kPage;
  o.at_capacity = AtCapacity::kWait;
  o.timeout_s = 0.001;
  return o;
}

// The objects that a scenario uses. They outlive it, so that the state after a failure can be
// checked.
struct Machine {
  ModelDevice device{2};
  std::shared_ptr<Pool> pool;

  void create(size_t pages, size_t reserved_pages) {
    pool = Pool::create(device, options(pages, reserved_pages));
  }
  void launch(const LeasePtr& lease, size_t stream) {
    Transfer t;
    t.src = t.src_device = lease->data();
    t.wire = t.out = IntType::kInt64;
    t.count = lease->bytes() / sizeof(int64_t);
    lease->launch_transfer(t, device.stream(stream));
  }
  LeasePtr write(LeasePtr lease) {
    static int next = 0;
    if (lease) std::memset(lease->data(), ++next % 128, lease->bytes());
    return lease;
  }
  void drop() {
    if (pool) Pool::drop(std::move(pool));
    pool = nullptr;
  }
};

void look_at_orphans() {
  ModelDevice other(1);
  Pool::drop(Pool::create(other, options(1, 0)));
}

// --- scenarios: no fault may change more than what they request --------------------------------

void life(Machine& m) {
  m.create(4, 4);
  LeasePtr a = m.write(m.pool->acquire(kPage)), b = m.write(m.pool->acquire(100));
  m.launch(a, 0);
  m.launch(a, 1);
  m.launch(a, 0);
  m.launch(b, 1);
  a = nullptr;
  m.device.step(0);
  a = m.write(m.pool->try_acquire(2 * kPage));
  b = nullptr;
  m.device.finish();
  m.pool->stats();
  b = m.write(m.pool->acquire(kPage));
  m.launch(b, 0);
  a = b = nullptr;
  m.device.finish();
  m.pool->trim();
  m.pool->close();
}

void growing(Machine& m) {
  constexpr size_t kStep = 256;  // pages of a segment
  m.create(3 * kStep, 0);
  {
    std::vector<LeasePtr> leases;
    for (int i = 0; i < 3; ++i) leases.push_back(m.write(m.pool->acquire(kStep * kPage)));
    m.launch(leases[1], 0);
    leases.erase(leases.begin());
  }
  m.device.finish();
  const LeasePtr whole = m.write(m.pool->acquire(3 * kStep * kPage));  // replaces the segments
  m.launch(whole, 1);
}

// Cuts and merges slots, with readers on many streams.
void crowd(Machine& m) {
  m.create(8, 2);
  for (int round = 0; round < 3; ++round) {
    std::vector<LeasePtr> leases;
    for (size_t bytes : {64, 640, 4096, 128, 1000}) {
      leases.push_back(m.write(m.pool->acquire(bytes)));
      if (bytes != 640) m.launch(leases.back(), bytes % 3 % 2);
    }
    std::swap(leases[0], leases[3]);
    leases.pop_back();
    m.device.step(0);
    leases.clear();
    m.device.finish();
  }
}

void at_capacity(Machine& m) {
  m.create(1, 1);
  m.launch(m.write(m.pool->acquire(kPage)), 0);
  try {
    m.pool->acquire(1);
  } catch (const PoolExhaustedError&) {
  }
  m.device.finish();
  m.launch(m.write(m.pool->acquire(kPage)), 0);
  m.pool->stats();
  m.pool->close();  // the wait for slots in flight does not succeed
}

void orphans(Machine& m) {
  m.create(2, 2);
  LeasePtr lease = m.write(m.pool->acquire(kPage));
  m.launch(m.write(m.pool->acquire(kPage)), 0);
  m.drop();
  look_at_orphans();
  m.launch(lease, 1);
  lease = nullptr;
  look_at_orphans();
  m.device.finish();
  look_at_orphans();
}

struct Scenario {
  const char* name;
  void (*run)(Machine&);
};
constexpr Scenario kScenarios[] = {{"life", life},
                                   {"growing", growing},
                                   {"crowd", crowd},
                                   {"at capacity", at_capacity},
                                   {"orphans", orphans}};

// Checks that the pool works, if it is open, and then that all slots and memory are given back.
void check_what_is_left(Machine& m) {
  m.device.finish();
  size_t quarantined = 0;
  if (m.pool) {
    PoolStats s = m.pool->stats();
    REQUIRE(s.leased_slots == 0);
    REQUIRE(s.in_flight_slots == 0);
    REQUIRE((s.in_use_bytes > 0) == (s.quarantined_slots > 0));
    REQUIRE(s.reserved_bytes == m.device.live_bytes());
    quarantined = s.quarantined_slots;
    if (!m.pool->closed() && !quarantined) {
      LeasePtr whole = m.write(m.pool->acquire(s.capacity_bytes));
      m.launch(whole, 0);
      whole = nullptr;
      m.device.finish();
      REQUIRE(m.pool->try_acquire(s.capacity_bytes));
    }
    m.drop();
  } else {
    quarantined = m.device.live_bytes() > 0;  // for a pool that was dropped
  }
  look_at_orphans();
  if (!quarantined) REQUIRE(m.device.live_bytes() == 0);
  REQUIRE(m.device.live_fences() == 0);
  REQUIRE(m.device.wrong == "");
}

// --- device calls ------------------------------------------------------------------------------

// `lost`: all calls from the place on fail. `typed`: they fail with the device's own error. If not
// typed, they fail with bad_alloc, as the building of an error message may.
void fail_device_calls(bool lost, bool typed) {
  CAPTURE(lost);
  CAPTURE(typed);
  int failures = 0;
  for (const Scenario& scenario : kScenarios) {
    CAPTURE(scenario.name);
    bool failed = true;
    for (int place = 1; failed; ++place) {
      CAPTURE(place);
      Machine m;
      std::string what;
      int calls = 0;
      bool recording = false;
      failed = false;
      m.device.on_call = [&](const char* call) {
        if (!std::strcmp(call, "free") || !std::strcmp(call, "destroy_fence")) return;
        if (++calls != place && !(lost && calls > place)) return;
        if (!failed) recording = !std::strcmp(call, "record");
        failed = true;
        if (!typed) throw std::bad_alloc();
        throw DeviceError(std::string(call) + " failed");
      };
      try {
        scenario.run(m);
      } catch (const DeviceError& e) {
        what = e.what();
      } catch (const std::bad_alloc& e) {
        REQUIRE_FALSE(typed);
      }
      CAPTURE(what);
      if (failed && recording && m.pool) REQUIRE(m.pool->stats().quarantined_slots == 1);
      if (failed && !recording && m.pool) REQUIRE(m.pool->stats().quarantined_slots == 0);
      if (lost && place % 2) m.drop();  // while the device is lost
      m.device.on_call = [](const char*) {};
      failures += failed;
      check_what_is_left(m);
    }
  }
  CHECK(failures > 100);
}

TEST_CASE("a device call fails at each place") {
  fail_device_calls(/*lost=*/false, /*typed=*/true);
  fail_device_calls(/*lost=*/false, /*typed=*/false);
}

TEST_CASE("a device fails for good at each place") {
  fail_device_calls(/*lost=*/true, /*typed=*/true);
  fail_device_calls(/*lost=*/true, /*typed=*/false);
}

// --- allocations -------------------------------------------------------------------------------

TEST_CASE("an allocation fails, or all from one on do, at each place") {
  int failures = 0;
  for (const Scenario& scenario : kScenarios) {
    CAPTURE(scenario.name);
    for (const bool all_after : {false, true}) {
      CAPTURE(all_after);
      bool failed = true;
      for (long place = 0; failed; ++place) {
        CAPTURE(place);
        Machine m;
        t_all_after = all_after;
        t_until_failure = place;
        failed = false;
        try {
          scenario.run(m);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
        // The pool may have caught the failure itself, in its check of the orphans.
        failed |= all_after ? t_until_failure == 0 : t_until_failure < 0;
        if (all_after && place % 2) m.drop();  // while every allocation fails
        t_until_failure = -1;
        failures += failed;
        check_what_is_left(m);
      }
    }
  }
  CHECK(failures > 100);
}

}  // namespace
}  // namespace pystage

// Runs the pool under every interleaving of two or three threads, up to a bound, and under random
// interleavings of more threads. See schedule.h. A schedule that fails is printed. To run it again
// with its trace:
//   PYSTAGE_SCHEDULE='<scenario>:<schedule>' build/cpp-plain/schedules -tc='one schedule*'
#include <doctest/doctest.h>

#include <cstdlib>
#include <iostream>
#include <map>
#include <ostream>
#include <random>

#include "model_device.h"
#include "pool.h"
#include "schedule.h"

#ifndef PYSTAGE_SCHEDULED
#error "build this, and pool.cpp, with PYSTAGE_SCHEDULED"
#endif

namespace pystage {
namespace {

using schedule::Result;
using schedule::Run;
using testing::ModelDevice;

constexpr size_t kPage = 4096;
constexpr size_t kIds = 8;  // ids per transfer
#ifdef __SANITIZE_ADDRESS__
constexpr int kLess = 1;  // fewer departures, because each run takes ten times as long
#else
constexpr int kLess = 0;
#endif

PoolOptions options(size_t pages, AtCapacity policy, bool reserve = true) {
  PoolOptions o;
  o.capacity_bytes = pages * kPage;
  o.reserve_bytes = reserve ? o.capacity_bytes : 0;
  o.at_capacity = policy;
  o.timeout_s = 10;  // in the scheduler's virtual time
  return o;
}

// A fault of the device. The tests of the tests use it.
enum class Fault { kNone, kRecordsNothing, kSaysDone };
Fault g_fault = Fault::kNone;

// Checks the orphans, as the next call on any pool does.
void look_at_orphans() {
  ModelDevice other(1);
  Pool::drop(Pool::create(other, options(1, AtCapacity::kRaise)));
}

// A pool, its device, and the leases that are out.
class World {
 public:
  World(Run& run, const PoolOptions& options, size_t streams) : device(streams), run_(run) {
    device.records_nothing = g_fault == Fault::kRecordsNothing;
    device.says_done = g_fault == Fault::kSaysDone;
    device.on_call = [](const char* call) { schedule::point(call); };
    pool = Pool::create(device, options);
    capacity = pool->options().capacity_bytes;
    for (size_t s = 0; s < streams; ++s)
      run.agent([this, s] { return device.busy(s); },
                [this, s] {
                  device.step(s);
                  look();
                });
  }

  // A lease that World keeps track of while it lives.
  struct Held {
    Held(World& world, std::shared_ptr<Lease> lease) : world(world), lease(std::move(lease)) {}
    ~Held() { world.leased_.erase(lease->data()); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;
    World& world;
    std::shared_ptr<Lease> lease;
  };
  using HeldPtr = std::shared_ptr<Held>;

  // Checks that nothing else uses the slot of a fresh lease, keeps track of it and fills the slot.
  HeldPtr hold(std::shared_ptr<Lease> lease) {
    if (!lease) return nullptr;
    char* const from = lease->data();
    for (const auto& [other, bytes] : leased_)
      run_.check(other + bytes <= from || from + lease->bytes() <= other,
                 "a slot was handed out while it was leased");
    run_.check(!device.has_to_read(from, lease->bytes()),
               "a slot was handed out that a stream has yet to read");
    leased_[from] = lease->bytes();
    const int64_t id = ++next_id_;
    for (size_t i = 0; i < kIds; ++i) std::memcpy(from + i * sizeof id, &id, sizeof id);
    look();
    return std::make_shared<Held>(*this, std::move(lease));
  }
  HeldPtr take(size_t bytes = kPage) { return hold(pool->acquire(bytes)); }
  HeldPtr try_take(size_t bytes = kPage) { return hold(pool->try_acquire(bytes)); }

  void launch(const HeldPtr& held, size_t stream) {
    Transfer t;
    t.src = t.src_device = held->lease->data();
    t.wire = t.out = IntType::kInt64;
    t.count = kIds;
    held->lease->launch_transfer(t, device.stream(stream));
    look();
  }
  // Takes a slot, launches a transfer from it and drops the lease.
  void stage(size_t stream) { launch(take(), stream); }

  void look() {
    if (!device.wrong.empty()) run_.fail(device.wrong);
    run_.check(device.max_bytes() <= capacity, "the pool took more than its capacity");
  }

  void look_at_stats() {
    const PoolStats s = pool->stats();
    run_.check(s.in_use_bytes <= s.reserved_bytes && s.reserved_bytes <= s.capacity_bytes &&
                   s.in_use_bytes <= s.high_water_bytes,
               "the figures do not fit each other");
  }

  // Runs the threads and then ends the pool. Checks that all slots and memory were given back.
  void go() {
    run_.go();
    if (!run_.ended()) return;  // stuck threads still use all this
    kept.clear();
    look();
    device.finish();
    look_at_orphans();
    if (pool && pool->closed())
      run_.check(device.live_bytes() == 0, "a closed pool kept memory that nobody uses");
    if (pool) {
      const PoolStats s = pool->stats();
      run_.check(s.leased_slots == 0 && s.in_flight_slots == 0 && s.in_use_bytes == 0,
                 "a slot did not come back");
      run_.check(s.reserved_bytes == device.live_bytes(), "reserved_bytes is not what is held");
      Pool::drop(std::move(pool));
    }
    look_at_orphans();
    run_.check(device.live_bytes() == 0, "memory did not go back to the device");
    run_.check(device.live_fences() == 0, "a fence was not destroyed");
    look();
  }

  ModelDevice device;
  std::shared_ptr<Pool> pool;
  size_t capacity = 0;        // of all pools on the device
  std::vector<HeldPtr> kept;  // dropped when all threads have ended

 private:
  Run& run_;
  std::map<char*, size_t> leased_;
  int64_t next_id_ = 0;
};

// --- scenarios ---------------------------------------------------------------------------------

// The world of a stuck run is not destroyed, because its threads still refer to it.
template <typename Body>
schedule::Scenario in_world(const PoolOptions& options, size_t streams, Body body) {
  return [=](Run& run) {
    auto world = std::make_unique<World>(run, options, streams);
    body(run, *world);
    world->go();
    if (!run.ended()) static_cast<void>(world.release());
  };
}

struct Scenario {
  const char* name;
  schedule::Scenario run;
  int bound;
};

const std::vector<Scenario>& scenarios() {
  static const std::vector<Scenario> all = {
      {"reuse",  // one slot, two threads, one stream for each thread
       in_world(options(1, AtCapacity::kWait), 2,
                [](Run& run, World& w) {
                  for (size_t t = 0; t < 2; ++t)
                    run.thread([&w, t] {
                      for (int i = 0; i < 2; ++i) w.stage(t);
                    });
                }),
       3},
      {"vouch",  // two threads launch on one stream; a third takes the free slots
       in_world(options(2, AtCapacity::kWait), 1,
                [](Run& run, World& w) {
                  for (int t = 0; t < 2; ++t)
                    run.thread([&w, held = w.take()]() mutable {
                      w.launch(held, 0);
                      held = nullptr;
                    });
                  run.thread([&w] { const auto first = w.try_take(), second = w.try_take(); });
                }),
       3},
      {"shared lease",  // two threads launch from it, on one stream and on two
       in_world(options(1, AtCapacity::kWait), 2,
                [](Run& run, World& w) {
                  auto held = w.take();
                  for (int t = 0; t < 2; ++t)
                    run.thread([&w, t, mine = held]() mutable {
                      w.launch(mine, 0);
                      if (t) w.launch(mine, 1);
                      mine = nullptr;
                    });
                  run.thread([&w] { w.take(); });
                }),
       3},
      {"two looks",  // several threads go through the queues at once
       in_world(options(3, AtCapacity::kWait), 2,
                [](Run& run, World& w) {
                  auto a = w.take(), b = w.take(), c = w.take();
                  w.launch(a, 0), w.launch(b, 1), w.launch(c, 0), w.launch(c, 1);
                  a = b = c = nullptr;
                  while (w.device.busy(0)) w.device.step(0);
                  run.thread([&w] { const auto first = w.take(), second = w.take(); });
                  run.thread([&w] { w.look_at_stats(); });
                  run.thread([&w] { w.pool->trim(); });
                }),
       3},
      {"raise",  // a query would free both slots, so no thread may fail
       in_world(options(2, AtCapacity::kRaise), 1,
                [](Run& run, World& w) {
                  auto a = w.take(), b = w.take();
                  w.launch(a, 0), w.launch(b, 0);
                  a = b = nullptr;
                  w.device.finish();
                  for (int t = 0; t < 2; ++t) run.thread([&w] { w.kept.push_back(w.take()); });
                }),
       4},
      {"raise and grow",  // one thread's growth makes room for both, so no thread may fail
       in_world(options(2, AtCapacity::kRaise, /*reserve=*/false), 1,
                [](Run& run, World& w) {
                  for (int t = 0; t < 2; ++t) run.thread([&w] { w.kept.push_back(w.take()); });
                }),
       4},
      {"wake-up",  // no thread may depend on a timeout
       in_world(options(1, AtCapacity::kWait), 1,
                [](Run& run, World& w) {
                  run.timeouts = false;
                  for (int t = 0; t < 3; ++t)
                    run.thread([&w] {
                      w.take();
                      w.take();
                    });
                }),
       3},
      {"grow",  // three threads want the first segment, one gives it back
       in_world(options(2, AtCapacity::kWait, /*reserve=*/false), 1,
                [](Run& run, World& w) {
                  run.timeouts = false;
                  run.thread([&w] { w.take(); });
                  run.thread([&w] { w.take(2 * kPage); });
                  run.thread([&w] {
                    w.pool->trim();
                    w.look_at_stats();
                  });
                }),
       4},
      {"failed allocation",  // the other thread waits for the room
       in_world(options(1, AtCapacity::kWait, /*reserve=*/false), 1,
                [](Run& run, World& w) {
                  run.timeouts = false;
                  auto calls = std::make_shared<int>(0);
                  w.device.on_call = [calls](const char* call) {
                    schedule::point(call);
                    if (std::string("allocate") == call && ++*calls == 1) throw DeviceError(call);
                  };
                  auto failed = std::make_shared<int>(0);
                  for (int t = 0; t < 2; ++t)
                    run.thread([&run, &w, failed] {
                      try {
                        w.take();
                      } catch (const DeviceError&) {
                        run.check(++*failed == 1, "one failure was reported twice");
                      }
                    });
                }),
       5},
      {"close",  // with a waiting thread, a lease and a transfer
       in_world(options(1, AtCapacity::kWait), 1,
                [](Run& run, World& w) {
                  run.thread([&w, held = w.take()]() mutable {
                    w.launch(held, 0);
                    held = nullptr;
                  });
                  run.thread([&w] {
                    try {
                      w.stage(0);
                    } catch (const PoolClosedError&) {
                    }
                  });
                  run.thread([&w] { w.pool->close(); });
                }),
       3},
      {"close and grow",
       in_world(options(2, AtCapacity::kWait, /*reserve=*/false), 1,
                [](Run& run, World& w) {
                  for (int t = 0; t < 2; ++t)
                    run.thread([&w] {
                      try {
                        w.stage(0);
                      } catch (const PoolClosedError&) {
                      }
                    });
                  run.thread([&w] { w.pool->close(); });
                }),
       3},
      {"drop",  // at once: the drop, the end of the last lease, a check of the orphans
       in_world(options(2, AtCapacity::kWait), 2,
                [](Run& run, World& w) {
                  auto first = w.take();
                  w.launch(first, 0);
                  first = nullptr;
                  run.thread([&w, held = w.take()]() mutable {
                    w.launch(held, 1);
                    held = nullptr;
                  });
                  run.thread([&w] { Pool::drop(std::move(w.pool)); });
                  run.thread([] {
                    look_at_orphans();
                    look_at_orphans();
                  });
                }),
       3},
      {"two orphans",  // several threads add and check orphans at once
       in_world(options(1, AtCapacity::kWait), 1,
                [](Run& run, World& w) {
                  auto second = std::make_shared<std::shared_ptr<Pool>>(
                      Pool::create(w.device, options(1, AtCapacity::kWait)));
                  w.capacity += kPage;
                  w.stage(0);
                  w.launch(w.hold((*second)->acquire(kPage)), 0);
                  run.thread([&w] { Pool::drop(std::move(w.pool)); });
                  run.thread([second] { Pool::drop(std::move(*second)); });
                  run.thread([] { look_at_orphans(); });
                }),
       3},
      {"close and wait",  // the waiting threads never get a slot
       in_world(options(1, AtCapacity::kWait), 1,
                [](Run& run, World& w) {
                  run.timeouts = false;
                  w.kept.push_back(w.take());
                  for (int t = 0; t < 2; ++t)
                    run.thread([&run, &w] {
                      try {
                        w.take();
                        run.fail("a slot came from nowhere");
                      } catch (const PoolClosedError&) {
                      }
                    });
                  run.thread([&w] { w.pool->close(); });
                }),
       4},
      {"given up",  // a wait that its caller ends
       in_world(options(1, AtCapacity::kWait), 1,
                [](Run& run, World& w) {
                  struct Interrupted {};
                  w.kept.push_back(w.take());
                  run.thread([&run, &w] {
                    try {
                      w.pool->acquire(kPage, [] {
                        schedule::point("poll");
                        throw Interrupted();
                      });
                      run.fail("a slot came from nowhere");
                    } catch (const Interrupted&) {
                      const PoolStats s = w.pool->stats();
                      run.check(s.waits == 1 && s.wait_seconds >= 0.05 && s.exhausted == 0,
                                "the wait that was given up is not counted as it was");
                    }
                  });
                  run.thread([&w] {
                    w.look_at_stats();
                    w.pool->trim();
                  });
                }),
       3},
  };
  return all;
}

void report(const std::string& name, const Result& result) {
  if (result.error.empty()) return;
  MESSAGE(name << ": " << result.error << "\n  PYSTAGE_SCHEDULE='" << name << ":" << result.schedule
               << "'");
}

// --- random runs -------------------------------------------------------------------------------

// Four threads, three streams and slots of many sizes. The seed alone determines what they do.
schedule::Scenario crowd(uint64_t seed) {
  return in_world(options(4, AtCapacity::kWait, seed % 2), 3, [seed](Run& run, World& w) {
    w.kept.resize(1);
    World::HeldPtr& shared = w.kept[0];
    for (uint64_t t = 0; t < 4; ++t)
      run.thread([&w, &shared, seed, t] {
        std::mt19937_64 random(seed * 4 + t);
        auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
        for (int round = 0; round < 12; ++round) {
          const size_t bytes = 64 << below(7);
          World::HeldPtr held = below(3) ? w.take(bytes) : w.try_take(bytes);
          for (size_t n = below(4); held && n > 0; --n) w.launch(held, below(3));
          switch (below(6)) {
            case 0:
              held.swap(shared);  // another thread may end it
              break;
            case 1:
              if (const World::HeldPtr borrowed = shared) w.launch(borrowed, below(3));
              break;
            case 2:
              w.look_at_stats();
              break;
            case 3:
              if (t == 0) w.pool->trim();
              break;
            default:
              break;
          }
        }
      });
  });
}

schedule::Scenario by_name(const std::string& name) {
  for (const Scenario& scenario : scenarios())
    if (name == scenario.name) return scenario.run;
  if (name.rfind("crowd ", 0) == 0) return crowd(std::stoull(name.substr(6)));
  throw Error("no scenario is called " + name);
}

// --- tests -------------------------------------------------------------------------------------

TEST_CASE("every schedule within the bound") {
  const char* only = std::getenv("PYSTAGE_SCENARIO");
  for (const Scenario& scenario : scenarios()) {
    if (only && std::string(only) != scenario.name) continue;
    const Result result = schedule::explore(scenario.run, scenario.bound - kLess);
    MESSAGE(std::string(scenario.name)
            << ": " << result.runs << " schedules, at most " << scenario.bound << " departures");
    report(scenario.name, result);
    CHECK(result.error == "");
  }
}

TEST_CASE("random schedules of a crowd") {
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    const Result result = schedule::sample(crowd(seed), seed, 1);
    report("crowd " + std::to_string(seed), result);
    REQUIRE(result.error == "");
  }
}

TEST_CASE("a device without fences is found out, and each schedule can be run again") {
  for (const Fault fault : {Fault::kRecordsNothing, Fault::kSaysDone}) {
    g_fault = fault;
    for (const char* name : {"reuse", "vouch", "shared lease", "close", "drop"}) {
      CAPTURE(name);
      const schedule::Scenario scenario = by_name(name);
      const Result found = schedule::explore(scenario, 3);
      CHECK(found.error != "");
      const Result again = schedule::replay(scenario, found.schedule);
      CHECK(again.error == found.error);
      CHECK(again.schedule == found.schedule);
      CHECK(again.trace == found.trace);
    }
    CHECK(schedule::sample(crowd(1), 1, 100).error != "");
    g_fault = Fault::kNone;
  }
}

TEST_CASE("one schedule, from PYSTAGE_SCHEDULE" *
          doctest::skip(std::getenv("PYSTAGE_SCHEDULE") == nullptr)) {
  const std::string given = std::getenv("PYSTAGE_SCHEDULE");
  const size_t colon = given.find(':');
  const Result result = schedule::replay(by_name(given.substr(0, colon)), given.substr(colon + 1));
  std::cout << result.trace;
  CHECK(result.error == "");
}

}  // namespace
}  // namespace pystage

// A scheduler that decides which thread runs next, at each mutex, condition variable, atomic, clock
// and device call of the pool. So every interleaving can be tried, and each can be run again.
//
// Threads are fibers on one real thread. A schedule is the list of the choices that were made where
// there was a choice: another thread, a step of a stream, or the end of a timed wait. Time is
// virtual: it advances when a timed wait ends without a notification. The memory model is
// sequential consistency. Weaker orders are left to ThreadSanitizer, which cannot check these runs.
//
// Relacy has the same idea and also models weak memory. It does not fit here: the pool throws and
// catches across scheduling points, and waits with timeouts.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>

namespace pystage::schedule {

class ConditionVariable;
class Engine;

class Mutex {
 public:
  void lock();
  void unlock();
  bool locked() const { return locked_; }

 private:
  friend class ConditionVariable;
  bool locked_ = false;
};

struct Clock {
  using duration = std::chrono::nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<Clock>;
  static constexpr bool is_steady = true;
  static time_point now();
};

class ConditionVariable {
 public:
  void notify_one();
  void notify_all();
  template <typename Rep, typename Period>
  void wait_for(std::unique_lock<Mutex>& lock, std::chrono::duration<Rep, Period> time) {
    wait_until(*lock.mutex(), Clock::now() + std::chrono::ceil<Clock::duration>(time));
  }

 private:
  void wait_until(Mutex& mutex, Clock::time_point deadline);
};

// Lets another thread run here; `what` names the place in a trace.
void point(const char* what);

template <typename T>
class Atomic {
 public:
  constexpr Atomic(T value) : value_(value) {}
  T load(std::memory_order = std::memory_order_seq_cst) const { return point("load"), value_; }
  void store(T value, std::memory_order = std::memory_order_seq_cst) {
    point("store");
    value_ = value;
  }
  T exchange(T value) {
    point("exchange");
    std::swap(value, value_);
    return value;
  }
  T fetch_add(T value) {
    point("fetch_add");
    value_ += value;
    return value_ - value;
  }
  bool compare_exchange_weak(T& expected, T desired) {
    point("compare_exchange");
    if (value_ == expected) {
      value_ = desired;
      return true;
    }
    expected = value_;
    return false;
  }

 private:
  T value_;
};

// One execution of a scenario.
class Run {
 public:
  void thread(std::function<void()> body);
  // Something besides the threads that can make a step while it is ready: a stream.
  void agent(std::function<bool()> ready, std::function<void()> step);
  // Whether a timed wait may end without a notification. If not, a lost notification is a deadlock.
  bool timeouts = true;
  // Runs the threads to their end.
  void go();
  // Reports an error. Only the first one is kept.
  void fail(const std::string& error);
  void check(bool ok, const char* what) {
    if (!ok) fail(what);
  }
  // Whether go() finished. If not, threads are stuck, and what they hold must not be destroyed.
  bool ended() const { return ended_; }

 private:
  friend class Engine;
  explicit Run(Engine& engine) : engine_(engine) {}
  Engine& engine_;
  bool ended_ = false;
};

using Scenario = std::function<void(Run&)>;

struct Result {
  size_t runs = 0;
  std::string error;     // of the first failed run; empty if none failed
  std::string schedule;  // of that run, for replay()
  std::string trace;     // the steps of that run
};

// Runs all schedules with at most `bound` departures from the plain schedule. In the plain schedule
// a thread runs until it blocks, and streams move and time passes only when all threads are
// blocked. The choice of the thread that runs after one that blocked is not a departure: all are
// tried.
Result explore(const Scenario& scenario, int bound);
// Runs random schedules, one per seed.
Result sample(const Scenario& scenario, uint64_t first_seed, size_t runs);
// Runs one schedule again.
Result replay(const Scenario& scenario, const std::string& schedule);

}  // namespace pystage::schedule

#ifdef PYSTAGE_SCHEDULED
namespace pystage::sync {
using schedule::Atomic;
using schedule::Clock;
using schedule::ConditionVariable;
using schedule::Mutex;
}  // namespace pystage::sync
#endif

// A scheduler that decides, at each mutex, condition variable, atomic, clock and device call of the
// pool, who runs next; so every interleaving can be tried, and each can be run again.
//
// Threads are fibers on one real thread. A schedule is the list of what was chosen wherever there
// was a choice: another thread, a step of a stream, the end of a timed wait. Time is virtual: it
// moves when a timed wait ends without a notification. The memory model is sequential consistency;
// weaker orders are for ThreadSanitizer, which sees nothing here.
//
// Relacy is the same idea with weak memory. It does not fit: the pool throws and catches across
// scheduling points, and waits with timeouts.
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
  // Something beside the threads that moves on its own while it is ready: a stream.
  void agent(std::function<bool()> ready, std::function<void()> step);
  // Whether a timed wait may end by itself. Where it may not, a lost notification is a deadlock.
  bool timeouts = true;
  // Runs the threads to their end.
  void go();
  // Notes what is wrong; the first counts.
  void fail(const std::string& error);
  void check(bool ok, const char* what) {
    if (!ok) fail(what);
  }
  // Whether go() came to its end; else threads are stuck, and what they hold must stay.
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
  std::string error;     // of the first bad run; empty if there is none
  std::string schedule;  // that run's, for replay()
  std::string trace;     // and what happened in it
};

// Runs all schedules with at most `bound` departures from the plain one, in which a thread runs
// until it blocks, and a stream moves and time passes only when all threads are blocked. Which
// thread runs after one that blocked is no departure: all are tried.
Result explore(const Scenario& scenario, int bound);
// Runs random schedules, one a seed.
Result sample(const Scenario& scenario, uint64_t first_seed, size_t runs);
// Runs one again.
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

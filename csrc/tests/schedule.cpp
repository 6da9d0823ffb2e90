#include "schedule.h"

#include <cxxabi.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace pystage::schedule {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kMostSteps = 50000;  // more steps in one run are a livelock
constexpr size_t kTraceSteps = 400;

// The C++ runtime keeps the exceptions in flight per real thread. Each fiber has its own copy of
// this state.
struct Exceptions {
  void* caught = nullptr;
  unsigned int uncaught = 0;
};
Exceptions& exceptions() { return *reinterpret_cast<Exceptions*>(abi::__cxa_get_globals()); }

struct Stack {
  ucontext_t context;
  Exceptions exceptions;
  void* fake = nullptr;  // AddressSanitizer's fake stack
  const void* bottom = nullptr;
  size_t bytes = 0;
};

struct Fiber : Stack {
  std::function<void()> body;
  bool ended = false;
  const Mutex* wants = nullptr;
  const ConditionVariable* waits_for = nullptr;
  Clock::time_point deadline;

  bool runnable() const { return !ended && !waits_for && !(wants && wants->locked()); }
};

struct Agent {
  std::function<bool()> ready;
  std::function<void()> step;
};

struct Choice {
  size_t taken;
  size_t options;
  int departures;    // number made before this choice
  uint64_t departs;  // one bit per option: whether it is a departure
};

}  // namespace

// Runs one schedule and records it.
class Engine {
 public:
  // Makes the choices of `prefix`, then the plain ones. With a seed, makes random choices.
  explicit Engine(std::vector<size_t> prefix) : prefix_(std::move(prefix)) {}
  explicit Engine(uint64_t seed) : random_(true), engine_(seed), rarely_(2 + seed % 7) {}

  void run(const Scenario& scenario) {
    Run run(*this);
    run_ = &run;
    scenario(run);
    run_ = nullptr;
  }

  void add(std::function<void()> body) {
    fibers_.push_back(std::make_unique<Fiber>());
    fibers_.back()->body = std::move(body);
  }
  void add(Agent agent) { agents_.push_back(std::move(agent)); }

  void go() {
    for (auto& fiber : fibers_) start(*fiber);
    active_ = this;
    pick(nullptr, "start");
    active_ = nullptr;
    const bool ended =
        std::all_of(fibers_.begin(), fibers_.end(), [](const auto& f) { return f->ended; });
    for (auto& fiber : fibers_) {
      if (ended)
        spare_stacks().push_back(fiber->bottom);
      else
        static_cast<void>(fiber.release());  // its stack holds live objects
    }
    run_->ended_ = ended;
  }

  void fail(const std::string& error) {
    if (!error_.empty()) return;
    error_ = error;
    failed_at_ = steps_.size();
  }

  // A scheduling point of the running fiber, or of main if `from` is null.
  void pick(Fiber* from, const char* what) {
    steps_.push_back({from ? Step::kThread : Step::kMain, self_, what});
    for (;;) {
      if (steps_.size() > kMostSteps) {
        fail("livelock: " + std::to_string(kMostSteps) + " steps and no end");
        return leave(from);
      }
      find_options(from);
      if (options_.empty()) {
        for (const auto& fiber : fibers_)
          if (!fiber->ended) fail("deadlock: no thread can run");
        return leave(from);
      }
      const Option taken = options_[choose(options_.size())];
      if (taken.kind == Option::kAgent) {
        steps_.push_back({Step::kStream, taken.number, "step"});
        agents_[taken.number].step();
        continue;
      }
      Fiber* next = fibers_[taken.number].get();
      if (taken.kind == Option::kTimeout) {
        steps_.push_back({Step::kThread, taken.number, "timeout"});
        now_ = std::max(now_, next->deadline);
        next->waits_for = nullptr;
        if (!next->runnable()) continue;
      }
      self_ = taken.number;
      if (next != from) switch_to(from ? *from : main_, *next, false);
      return;
    }
  }

  void notify(const ConditionVariable& condition, bool all) {
    std::vector<Fiber*> waiting;
    for (const auto& fiber : fibers_)
      if (fiber->waits_for == &condition) waiting.push_back(fiber.get());
    if (waiting.empty()) return;
    if (!all) {
      departs_ = 0;
      waiting = {waiting[choose(waiting.size())]};
    }
    for (Fiber* fiber : waiting) fiber->waits_for = nullptr;
  }

  Fiber& self() { return *fibers_[self_]; }
  Clock::time_point now() const { return now_; }
  const std::string& error() const { return error_; }
  static Engine* active() { return active_; }

  // The choices of the next schedule in depth-first order; empty if this was the last.
  std::vector<size_t> next(int bound) const {
    for (size_t at = choices_.size(); at-- > 0;) {
      const Choice& choice = choices_[at];
      for (size_t other = choice.taken + 1; other < choice.options; ++other) {
        if (choice.departures + departs(choice, other) > bound) continue;
        std::vector<size_t> prefix;
        for (size_t i = 0; i < at; ++i) prefix.push_back(choices_[i].taken);
        prefix.push_back(other);
        return prefix;
      }
    }
    return {};
  }

  // In the form "12*0,1,3*0,2".
  std::string schedule() const {
    std::string text;
    for (size_t i = 0, same; i < choices_.size(); i += same) {
      for (same = 1; i + same < choices_.size(); ++same)
        if (choices_[i + same].taken != choices_[i].taken) break;
      text += (text.empty() ? "" : ",") + (same > 1 ? std::to_string(same) + "*" : "") +
              std::to_string(choices_[i].taken);
    }
    return text;
  }

  // The steps up to the failure.
  std::string trace() const {
    std::string text;
    for (size_t i = failed_at_ > kTraceSteps ? failed_at_ - kTraceSteps : 0; i < failed_at_; ++i)
      text += steps_[i].who() + ": " + steps_[i].what + "\n";
    return text;
  }

 private:
  struct Option {
    enum Kind { kThread, kAgent, kTimeout } kind;
    size_t number;
  };
  struct Step {
    enum Kind { kMain, kThread, kStream } kind;
    size_t number;
    const char* what;
    std::string who() const {
      if (kind == kMain) return "main";
      return (kind == kThread ? "thread " : "stream ") + std::to_string(number);
    }
  };

  static int departs(const Choice& choice, size_t option) {
    return static_cast<int>(choice.departs >> option & 1);
  }

  // Finds the steps that are possible now, the plain one first.
  void find_options(Fiber* from) {
    options_.clear();
    departs_ = 0;
    auto add = [this](Option::Kind kind, size_t number, bool departs) {
      if (departs) departs_ |= uint64_t{1} << options_.size();
      options_.push_back({kind, number});
    };
    const bool stays = from && from->runnable();
    if (stays) add(Option::kThread, self_, false);
    for (size_t i = 0; i < fibers_.size(); ++i)
      if (fibers_[i].get() != from && fibers_[i]->runnable()) add(Option::kThread, i, stays);
    for (size_t i = 0; i < agents_.size(); ++i)
      if (agents_[i].ready()) add(Option::kAgent, i, !options_.empty());
    for (size_t i = 0; i < fibers_.size() && run_->timeouts; ++i)
      if (fibers_[i]->waits_for) add(Option::kTimeout, i, !options_.empty());
  }

  size_t choose(size_t options) {
    if (options == 1) return 0;
    size_t taken = 0;
    if (choices_.size() < prefix_.size()) {
      taken = prefix_[choices_.size()];
      if (taken >= options) {
        fail("this schedule is not one of the scenario's");
        taken = 0;
      }
    } else if (random_ && (!departs_ || engine_() % rarely_ == 0)) {
      taken = engine_() % options;
    }
    int departures = 0;
    if (!choices_.empty()) {
      const Choice& last = choices_.back();
      departures = last.departures + departs(last, last.taken);
    }
    choices_.push_back({taken, options, departures, departs_});
    return taken;
  }

  static std::vector<const void*>& spare_stacks() {
    static auto* stacks = new std::vector<const void*>;  // never destroyed, to keep them alive
    return *stacks;
  }

  static void start(Fiber& fiber) {
    if (spare_stacks().empty()) spare_stacks().push_back(new char[kStackBytes]);
    fiber.bottom = spare_stacks().back();
    fiber.bytes = kStackBytes;
    spare_stacks().pop_back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.bottom);
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Engine::enter, 0);
  }

  static void enter() {
    Engine& engine = *active_;
    Fiber& fiber = engine.self();
    engine.arrive(fiber);
    try {
      fiber.body();
    } catch (const std::exception& e) {
      engine.fail(std::string("a thread ended with: ") + e.what());
    }
    fiber.body = nullptr;
    fiber.ended = true;
    engine.pick(&fiber, "end");
    std::abort();  // a finished fiber is never resumed
  }

  // Returns to go() for ever.
  void leave(Fiber* from) {
    if (from) switch_to(*from, main_, from->ended);
  }

  void switch_to(Stack& from, Stack& to, [[maybe_unused]] bool for_good) {
    from.exceptions = exceptions();
    exceptions() = to.exceptions;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake, to.bottom, to.bytes);
#endif
    swapcontext(&from.context, &to.context);
    arrive(from);
  }

  void arrive([[maybe_unused]] Stack& here) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(here.fake, &bottom, &bytes);
    if (!main_.bottom) {  // the very first switch comes from main
      main_.bottom = bottom;
      main_.bytes = bytes;
    }
#endif
  }

  const std::vector<size_t> prefix_;
  const bool random_ = false;
  std::mt19937_64 engine_;
  const uint64_t rarely_ = 1;  // a departure is allowed at one choice in this many

  Run* run_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Agent> agents_;
  Stack main_;
  size_t self_ = 0;
  Clock::time_point now_{};

  std::vector<Option> options_;
  uint64_t departs_ = 0;
  std::vector<Choice> choices_;
  std::vector<Step> steps_;
  std::string error_;
  size_t failed_at_ = 0;

  static Engine* active_;
};

Engine* Engine::active_ = nullptr;

// --- what the pool uses ------------------------------------------------------------------------

void point(const char* what) {
  if (Engine* engine = Engine::active()) engine->pick(&engine->self(), what);
}

void Mutex::lock() {
  if (Engine* engine = Engine::active()) {
    Fiber& self = engine->self();
    self.wants = this;
    engine->pick(&self, "lock");
    self.wants = nullptr;
  }
  if (locked_) std::abort();  // outside go() no other thread could unlock it
  locked_ = true;
}

void Mutex::unlock() { locked_ = false; }

Clock::time_point Clock::now() {
  const Engine* engine = Engine::active();
  return engine ? engine->now() : time_point{};
}

void ConditionVariable::notify_one() {
  if (Engine* engine = Engine::active()) engine->notify(*this, false);
}

void ConditionVariable::notify_all() {
  if (Engine* engine = Engine::active()) engine->notify(*this, true);
}

void ConditionVariable::wait_until(Mutex& mutex, Clock::time_point deadline) {
  Engine* engine = Engine::active();
  if (!engine) std::abort();  // outside go() no other thread could notify
  Fiber& self = engine->self();
  mutex.unlock();
  self.waits_for = this;
  self.deadline = deadline;
  self.wants = &mutex;
  engine->pick(&self, "wait");
  self.wants = nullptr;
  mutex.locked_ = true;
}

// --- runs --------------------------------------------------------------------------------------

void Run::thread(std::function<void()> body) { engine_.add(std::move(body)); }
void Run::agent(std::function<bool()> ready, std::function<void()> step) {
  engine_.add(Agent{std::move(ready), std::move(step)});
}
void Run::go() { engine_.go(); }
void Run::fail(const std::string& error) { engine_.fail(error); }

namespace {

void note_failure(Result& result, const Engine& engine) {
  result.error = engine.error();
  result.schedule = engine.schedule();
  result.trace = engine.trace();
}

}  // namespace

Result explore(const Scenario& scenario, int bound) {
  Result result;
  // Try few departures first, so that a failing schedule is short.
  for (int most = 0; most <= bound; ++most) {
    result.runs = 0;
    std::vector<size_t> prefix;
    do {
      Engine engine(prefix);
      engine.run(scenario);
      ++result.runs;
      if (!engine.error().empty()) {
        note_failure(result, engine);
        return result;
      }
      prefix = engine.next(most);
    } while (!prefix.empty());
  }
  return result;
}

Result sample(const Scenario& scenario, uint64_t first_seed, size_t runs) {
  Result result;
  while (result.runs < runs && result.error.empty()) {
    Engine engine(first_seed + result.runs);
    engine.run(scenario);
    ++result.runs;
    if (!engine.error().empty()) note_failure(result, engine);
  }
  return result;
}

Result replay(const Scenario& scenario, const std::string& schedule) {
  std::vector<size_t> prefix;
  for (size_t at = 0; at < schedule.size();) {
    size_t end = 0, times = 1, taken = std::stoul(schedule.substr(at), &end);
    at += end;
    if (at < schedule.size() && schedule[at] == '*') {
      times = taken;
      taken = std::stoul(schedule.substr(++at), &end);
      at += end;
    }
    prefix.insert(prefix.end(), times, taken);
    ++at;  // the comma
  }
  Engine engine(std::move(prefix));
  engine.run(scenario);
  Result result;
  result.runs = 1;
  if (!engine.error().empty()) note_failure(result, engine);
  return result;
}

}  // namespace pystage::schedule

// The GIL: when it is let go, and what becomes of a thread that never gets it back.
//
// Note [Device calls and the GIL]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A launch waits while the stream's queue is full, a free or an event query may wait for it, and a
// stream may wait for work that another Python thread has yet to do. So no device call is made with
// the GIL held. What Python objects then share between threads has a mutex of its own.
//
// Note [Threads that outlive the interpreter]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Before Python 3.14, a daemon thread that asks for the GIL while the interpreter shuts down is
// ended by pthread_exit(). That unwinds the C++ frames below it: it runs destructors that need the
// GIL, and std::terminate() at the first noexcept function. Such a thread sleeps here instead, as
// Python 3.14 has it sleep. So every call that may take the GIL goes through this file.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace pystage {

// Runs `call`, C functions that may run Python code or take the GIL.
template <typename Call>
auto call_python(Call call) noexcept {
  try {
    return call();
  } catch (const abi::__forced_unwind&) {
    for (;;) pause();
  }
}

// A signal handler has raised: the Python error is set. Made a Python exception by guarded().
struct Interrupted {};

// Lets other Python threads run for a scope, if `release` says so.
class ReleaseGil {
 public:
  explicit ReleaseGil(bool release = true) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~ReleaseGil() {
    if (state_) restore();
  }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

  // Runs signal handlers meanwhile: Ctrl-C ends a wait.
  void check_signals() {
    restore();
    const int raised = call_python([] { return PyErr_CheckSignals(); });
    state_ = PyEval_SaveThread();
    if (raised) throw Interrupted();
  }

 private:
  void restore() noexcept {
    call_python([this] {
      PyEval_RestoreThread(state_);
      return 0;
    });
  }
  PyThreadState* state_;
};

}  // namespace pystage

// The GIL: when pystage releases it, and what happens to a thread that never gets it back.
//
// Note [Device calls and the GIL]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A launch waits while the stream's queue is full, and a free or an event query may wait for that
// launch. The stream may in turn wait for work that another Python thread has yet to do. So no
// device call is made with the GIL held. State that Python objects then share between threads has
// its own mutex.
//
// Note [Threads that outlive the interpreter]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Before Python 3.14, a daemon thread that requests the GIL while the interpreter shuts down is
// ended by pthread_exit(). This unwinds the thread's C++ frames: it runs destructors that need the
// GIL, and calls std::terminate() at the first noexcept function. Here such a thread sleeps
// instead, as it does in Python 3.14. So every call that may take the GIL goes through this file.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace pystage {

// Runs `call`: C functions that may run Python code or take the GIL.
template <typename Call>
auto call_python(Call call) noexcept {
  try {
    return call();
  } catch (const abi::__forced_unwind&) {
    for (;;) pause();
  }
}

// A signal handler has raised, and the Python error is set. guarded() passes it on to Python. It
// does not derive from std::exception, so that no handler on the way takes it for its own error.
struct Interrupted {};

// Releases the GIL for a scope if `release` is true, so that other Python threads can run.
class ReleaseGil {
 public:
  explicit ReleaseGil(bool release = true) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~ReleaseGil() {
    if (state_) restore();
  }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

  // Runs Python's signal handlers, so that Ctrl-C can end a wait.
  void check_signals() {
    restore();
    const int raised = call_python([] { return PyErr_CheckSignals(); });
    state_ = PyEval_SaveThread();
    if (raised) throw Interrupted();  // NOLINT(bugprone-std-exception-baseclass)
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

// The mutex, condition variable, atomic and clock types of the pool. With PYSTAGE_SCHEDULED they
// are those of the test scheduler, which decides at each use which thread runs next.
#pragma once

#ifdef PYSTAGE_SCHEDULED
#include "tests/schedule.h"
#else

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace pystage::sync {

using Mutex = std::mutex;
using ConditionVariable = std::condition_variable;
template <typename T>
using Atomic = std::atomic<T>;
using Clock = std::chrono::steady_clock;

}  // namespace pystage::sync

#endif

// What the threads of a pool meet in. With PYSTAGE_SCHEDULED these are the test scheduler's, which
// decides at each of them who runs next.
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

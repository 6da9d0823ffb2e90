// See Note [Debug canaries] in pool.h.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

#include "helpers.h"
#include "model_device.h"
#include "pool.h"

namespace pystage {
namespace {

using testing::Canaries;
using testing::LeasePtr;
using testing::ModelDevice;

PoolOptions options(size_t pages) {
  PoolOptions o;
  o.capacity_bytes = o.reserve_bytes = pages * 4096;
  o.at_capacity = AtCapacity::kRaise;
  return o;
}

// Runs a call in a child process. Returns what it wrote to stderr before it aborted, or how it
// ended if it did not abort.
std::string aborts_with(const std::function<void(Pool&)>& call) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  std::fflush(stdout);  // otherwise the child may print it again
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::signal(SIGABRT, testing::end_of_child);
    alarm(30);
    dup2(ends[1], STDERR_FILENO);
    const Canaries canaries;
    ModelDevice device(1);
    auto pool = Pool::create(device, options(4));
    call(*pool);
    testing::exit_child(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[512];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) return text;
  return "no abort, status " + std::to_string(status) + ": " + text;
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

TEST_CASE("canaries: a write behind the ids is found when the lease ends") {
  for (const size_t bytes : {100, 128, 4000, 0})
    for (const size_t past : {0, 1, 63}) {
      const std::string error = aborts_with([&](Pool& pool) {
        LeasePtr lease = pool.acquire(bytes);
        lease->data()[bytes + past] = 7;
      });
      CAPTURE(error);
      CHECK(has(error, "StagingPool (model)"));
      CHECK(has(error, "wrote behind a slot"));
      CHECK(has(error, (std::to_string(bytes) + " bytes at offset 64 of segment 1").c_str()));
      CHECK(has(error, ("byte at offset " + std::to_string(bytes + past) + " ").c_str()));
      CHECK(has(error, "is 0x07"));
    }
}

TEST_CASE("canaries: a write in front of the ids is found when the lease ends") {
  for (const int before : {1, 64}) {
    const std::string error = aborts_with([&](Pool& pool) {
      const LeasePtr first = pool.acquire(64), second = pool.try_acquire(64);
      second->data()[-before] = 0;
    });
    CAPTURE(error);
    CHECK(has(error, "wrote in front of a slot"));
    CHECK(has(error, "64 bytes at offset 256 of segment 1"));
    CHECK(has(error, ("byte at offset -" + std::to_string(before) + " ").c_str()));
  }
}

TEST_CASE("canaries: a write after the end of the lease is found at the next one, or in the end") {
  auto write_late = [](Pool& pool) {
    LeasePtr lease = pool.acquire(1000);
    char* const data = lease->data();
    lease = nullptr;
    data[999] = 1;
  };
  for (const auto& end : {+[](Pool& pool) { pool.acquire(1000); }, +[](Pool& pool) { pool.trim(); },
                          +[](Pool& pool) { pool.close(); }}) {
    const std::string error = aborts_with([&](Pool& pool) {
      write_late(pool);
      end(pool);
    });
    CAPTURE(error);
    CHECK(has(error, "wrote in free memory"));
    CHECK(has(error, "is 0x01"));
  }
}

TEST_CASE("canaries: what keeps to its bytes is left alone") {
  const Canaries canaries;
  ModelDevice device(1);
  const auto pool = Pool::create(device, options(4));
  for (int round = 0; round < 3; ++round) {
    for (const size_t bytes :
         {size_t{0}, size_t{1}, size_t{64}, size_t{1000}, size_t{4 * 4096 - 128}}) {
      const LeasePtr lease = pool->acquire(bytes);
      CHECK(lease->bytes() == bytes);
      CHECK(reinterpret_cast<uintptr_t>(lease->data()) % 64 == 0);
      CHECK(lease->device_data() == lease->data());
      std::memset(lease->data(), 0xAB, bytes);
      Transfer t;
      t.src = lease->data();
      t.count = bytes / 4;
      lease->launch_transfer(t, device.stream(0));
      device.finish();
    }
  }
  CHECK(pool->stats().in_flight_slots == 0);
  // The two guards of a slot count against the capacity.
  CHECK_THROWS_AS(pool->acquire(4 * 4096 - 127), RequestTooLargeError);
  CHECK_FALSE(pool->try_acquire(4 * 4096 - 127));
  LeasePtr lease = pool->acquire(100);
  CHECK(pool->stats().in_use_bytes == size_class(100) + 128);
  // Bytes that were never written are not a valid id.
  int32_t id;
  std::memcpy(&id, lease->data(), sizeof id);
  CHECK(id < 0);
  lease = nullptr;
  Pool::drop(pool);
  CHECK(device.live_bytes() == 0);
}

TEST_CASE("canaries: only where they are asked for") {
  for (const char* value : {"", "0"}) {
    const Canaries canaries(value);
    ModelDevice device(1);
    const auto pool = Pool::create(device, options(1));
    CHECK(pool->acquire(4096)->bytes() == 4096);
    Pool::drop(pool);
  }
}

}  // namespace
}  // namespace pystage

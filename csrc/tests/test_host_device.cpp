#include <doctest/doctest.h>

#include <cstdint>
#include <tuple>

#include "errors.h"
#include "helpers.h"
#include "host_device.h"

namespace pystage {
namespace {

using testing::drain;
using testing::Fence;
using testing::Held;
using testing::Ids;

// Copies one id on a stream; `to` must outlive the copy.
void copy(const int64_t& from, int64_t& to, StreamHandle stream) {
  Transfer t;
  t.src = &from;
  t.wire = t.out = IntType::kInt64;
  t.dst = &to;
  t.count = 1;
  host_device().launch(t, stream);
}

TEST_CASE("the host device is one, and named") {
  CHECK(&host_device() == &host_device());
  CHECK(host_device().name() == "cpu");
  CHECK_FALSE(host_device().capturing(host_stream(0)));
}

TEST_CASE("host memory is page-aligned, readable as is and never pinned") {
  std::string why;
  const HostMemory memory = host_device().allocate(8192, &why);
  CHECK(reinterpret_cast<uintptr_t>(memory.host) % 4096 == 0);
  CHECK(memory.device == memory.host);
  CHECK(memory.bytes == 8192);
  CHECK_FALSE(memory.pinned);
  CHECK_FALSE(memory.fallback);
  CHECK(why.empty());
  std::memset(memory.host, 1, memory.bytes);
  host_device().free(memory);
}

TEST_CASE("host streams are numbered and checked") {
  CHECK(host_stream(0) == host_stream(0));
  CHECK(host_stream(0) != host_stream(1));
  CHECK(host_stream(kHostEagerStream) != host_stream(0));
  CHECK(host_stream(kHostStreams - 1) != nullptr);
  CHECK_THROWS_AS(host_stream(kHostStreams), Error);
  CHECK_THROWS_AS(host_stream(kHostEagerStream - 1), Error);
  CHECK_THROWS_WITH(host_set_current_stream(64), "host stream 64 is outside [0, 64)");
}

TEST_CASE("the current stream is the thread's own") {
  CHECK(host_current_stream_number() == 0);
  host_set_current_stream(3);
  CHECK(host_current_stream() == host_stream(3));
  CHECK_THROWS_AS(host_set_current_stream(-2), Error);
  CHECK(host_current_stream_number() == 3);
  int elsewhere = -1;
  std::thread([&] { elsewhere = host_current_stream_number(); }).join();
  CHECK(elsewhere == 0);
  host_set_current_stream(0);
}

TEST_CASE("a stream runs its work in order, and converts") {
  const Ids ids{-1, 2, 3};
  std::vector<int32_t> narrow(3);
  Ids wide(3);
  Transfer t;
  t.src = ids.data();
  t.wire = IntType::kInt64;
  t.dst = narrow.data();
  t.out = IntType::kInt32;
  t.count = 3;
  host_device().launch(t, host_stream(1));
  t.src = narrow.data();  // reads the output of the previous transfer
  t.wire = IntType::kInt32;
  t.dst = wide.data();
  t.out = IntType::kInt64;
  host_device().launch(t, host_stream(1));
  drain(host_stream(1));
  CHECK(narrow == std::vector<int32_t>{-1, 2, 3});
  CHECK(wide == ids);
}

TEST_CASE("hold keeps a stream pending, and only that one; holds nest") {
  const int64_t id = 7;
  int64_t held_out = 0, other_out = 0;
  Fence fence;
  Held outer(host_stream(1)), inner(host_stream(1));
  CHECK(host_stream_held(host_stream(1)));
  CHECK_FALSE(host_stream_held(host_stream(2)));
  copy(id, held_out, host_stream(1));
  copy(id, other_out, host_stream(2));
  fence.record(host_stream(1));
  drain(host_stream(2));
  CHECK(other_out == 7);
  CHECK_FALSE(fence.done());
  inner.release();
  CHECK(host_stream_held(host_stream(1)));
  CHECK_FALSE(fence.done());
  outer.release();
  CHECK_FALSE(host_stream_held(host_stream(1)));
  fence.synchronize();
  CHECK(fence.done());
  CHECK(held_out == 7);
}

TEST_CASE("a fence that was never recorded is done") {
  Fence fence;
  CHECK(fence.done());
  fence.synchronize();
  host_device().wait(host_stream(1), fence.handle());
  drain(host_stream(1));
}

TEST_CASE("recording a fence again forgets the earlier point") {
  Fence fence;
  fence.record(host_stream(1));
  fence.synchronize();
  Held held(host_stream(1));
  fence.record(host_stream(1));
  CHECK_FALSE(fence.done());
  held.release();
  fence.synchronize();
  CHECK(fence.done());
}

TEST_CASE("a fence recorded on another stream forgets the earlier point, which may come later") {
  Fence fence;
  Held held(host_stream(1));
  fence.record(host_stream(1));
  fence.record(host_stream(2));
  drain(host_stream(2));
  CHECK(fence.done());
  held.release();
  drain(host_stream(1));
  CHECK(fence.done());
  fence.synchronize();
}

TEST_CASE("a fence may go while its points are queued") {
  Held held(host_stream(1));
  {
    Fence fence;
    fence.record(host_stream(1));
    host_device().wait(host_stream(2), fence.handle());
  }
  held.release();
  drain(host_stream(2));
}

TEST_CASE("a stream waits for a fence of another") {
  const int64_t id = 5;
  int64_t first = 0, second = 0;
  Fence fence, behind;
  Held held(host_stream(1));
  copy(id, first, host_stream(1));
  fence.record(host_stream(1));
  host_device().wait(host_stream(2), fence.handle());
  copy(first, second, host_stream(2));
  behind.record(host_stream(2));
  CHECK_FALSE(behind.done());
  held.release();
  behind.synchronize();
  CHECK(second == 5);
}

TEST_CASE("a stream waits for the point a fence had, not for later ones") {
  Fence fence, behind;
  Held late(host_stream(2));
  fence.record(host_stream(1));
  host_device().wait(host_stream(2), fence.handle());
  behind.record(host_stream(2));
  drain(host_stream(1));
  Held held(host_stream(1));
  fence.record(host_stream(1));  // pending, and independent of the other stream
  late.release();
  behind.synchronize();
  CHECK_FALSE(fence.done());
}

TEST_CASE("a tail is gathered behind the ids, and its first bad index told") {
  const Ids ids{1, 2}, relay{10, 11, 12};
  const std::vector<int32_t> narrow_relay{10, 11, 12};
  for (const bool narrow : {false, true}) {
    for (const std::vector<int32_t>& indices :
         {std::vector<int32_t>{0, 2, -1, -3}, {1, 3, -4, 0}, {-5}, {}}) {
      auto tail = std::make_shared<RelayTail>();
      tail->relay = narrow ? static_cast<const void*>(narrow_relay.data()) : relay.data();
      tail->relay_type = narrow ? IntType::kInt32 : IntType::kInt64;
      tail->relay_size = 3;
      tail->indices = indices.data();
      tail->index_type = IntType::kInt32;
      tail->count = indices.size();
      Ids out(2 + indices.size(), 99), expected = ids;
      std::optional<RelayTail::BadIndex> bad;
      for (size_t i = 0; i < indices.size(); ++i) {
        const int64_t index = indices[i];
        const bool ok = index >= -3 && index < 3;
        expected.push_back(ok ? relay[static_cast<size_t>(index < 0 ? index + 3 : index)] : -1);
        if (!ok && !bad) bad = {i, index};
      }
      Transfer t;
      t.src = ids.data();
      t.wire = t.out = IntType::kInt64;
      t.dst = out.data();
      t.count = 2;
      t.tail = tail;
      host_device().launch(t, host_stream(1));
      drain(host_stream(1));
      CHECK(out == expected);
      CHECK(tail->bad.has_value() == bad.has_value());
      if (bad && tail->bad) {
        CHECK(tail->bad->position == bad->position);
        CHECK(tail->bad->value == bad->value);
      }
    }
  }
}

TEST_CASE("a transfer keeps the owner of its output until it ran") {
  const int64_t id = 9;
  auto out = std::make_shared<int64_t>(0);
  const std::weak_ptr<int64_t> alive = out;
  Transfer t;
  t.src = &id;
  t.wire = t.out = IntType::kInt64;
  t.dst = out.get();
  t.count = 1;
  t.dst_owner = std::move(out);
  Held held(host_stream(1));
  host_device().launch(t, host_stream(1));
  t.dst_owner = nullptr;
  CHECK_FALSE(alive.expired());
  held.release();
  drain(host_stream(1));
  CHECK(alive.expired());
}

TEST_CASE("a tail is gathered behind the ids, and its first bad index is told") {
  const Ids ids{7, 8}, wide_relay{10, 11, 12};
  const std::vector<int32_t> relay{10, 11, 12}, narrow_indices{2, -3};
  const Ids indices{0, -1, 3, -4, 1};
  auto run = [&](const void* from, IntType type, const void* at, IntType index_type, size_t count) {
    auto tail = std::make_shared<RelayTail>();
    tail->relay = from;
    tail->relay_type = type;
    tail->relay_size = 3;
    tail->indices = at;
    tail->index_type = index_type;
    tail->count = count;
    Ids out(2 + count, 99);
    Transfer t;
    t.src = ids.data();
    t.wire = t.out = IntType::kInt64;
    t.dst = out.data();
    t.count = 2;
    t.tail = tail;
    host_device().launch(t, host_stream(1));
    drain(host_stream(1));
    return std::pair(out, tail->bad);
  };
  auto [out, bad] = run(relay.data(), IntType::kInt32, indices.data(), IntType::kInt64, 5);
  CHECK(out == Ids{7, 8, 10, 12, -1, -1, 11});
  REQUIRE(bad);
  CHECK(bad->position == 2);
  CHECK(bad->value == 3);
  std::tie(out, bad) =
      run(wide_relay.data(), IntType::kInt64, narrow_indices.data(), IntType::kInt32, 2);
  CHECK(out == Ids{7, 8, 12, 10});
  CHECK_FALSE(bad);
}

TEST_CASE("pieces of values go where each is to go") {
  const std::vector<int32_t> values{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  std::vector<int32_t> first(8, -1), second(4, -1);
  const ValuesPiece pieces[] = {{first.data(), 1, 2}, {second.data(), 0, 1}};
  host_device().launch_values(values.data(), 48, pieces, 2, host_stream(0));
  CHECK(first == std::vector<int32_t>{5, 6, 7, 8, 9, 10, 11, 12});
  CHECK(second == std::vector<int32_t>{1, 2, 3, 4});
  CHECK(host_device().most_values() > 48);
}

TEST_CASE("rows begin with their prefix and go on with the rest") {
  std::vector<int32_t> table(12, -1);
  const Ids prefix{7, 8}, rest{20, 21, 22};
  const RowWrite rows[] = {{prefix.data(), 2, 2, 1, 2}, {nullptr, 0, 0, 0, 1}};
  host_device().launch_rows(table.data(), 4, rows, 2, rest.data(), host_stream(0));
  CHECK(table == std::vector<int32_t>{20, -1, -1, -1, -1, -1, -1, -1, 7, 8, 21, 22});
  CHECK(host_device().most_rows() > 2);
}

TEST_CASE("memory that cannot be had is a typed error") {
  std::string why;
  CHECK_THROWS_AS(host_device().allocate(SIZE_MAX / 4096 * 4096, &why), DeviceError);
}

TEST_CASE("threads may share a stream") {
  constexpr int kThreads = 4;
  constexpr size_t kRounds = 500;
  std::vector<Ids> from(kThreads), to(kThreads, Ids(kRounds));
  std::vector<std::thread> threads;
  for (int n = 0; n < kThreads; ++n) {
    from[n] = testing::fresh_ids(kRounds);
    threads.emplace_back([&, n] {
      Fence fence;
      for (size_t i = 0; i < kRounds; ++i) {
        copy(from[n][i], to[n][i], host_stream(5));
        fence.record(host_stream(5));
        if (i % 50 == 0) fence.synchronize();
      }
      fence.synchronize();
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(from == to);
}

}  // namespace
}  // namespace pystage

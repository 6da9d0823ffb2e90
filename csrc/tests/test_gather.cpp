#include <doctest/doctest.h>

#include <limits>
#include <utility>

#include "gather.h"
#include "helpers.h"

namespace pystage {
namespace {

using testing::Ids;
using testing::Random;

constexpr int64_t kMin64 = std::numeric_limits<int64_t>::min();
constexpr int64_t kMax64 = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin32 = std::numeric_limits<int32_t>::min();
constexpr int64_t kMax32 = std::numeric_limits<int32_t>::max();
constexpr IntType kTypes[] = {IntType::kInt32, IntType::kInt64};

// Ids laid out in memory at any offset and stride, and the part that describes them.
class Layout {
 public:
  Layout(const Ids& ids, IntType type, ptrdiff_t stride, size_t misalign = 0) {
    const size_t step = static_cast<size_t>(std::abs(stride));
    // The exact size, so that a read past either end is outside the allocation.
    bytes_.resize(misalign + (ids.empty() ? 0 : (ids.size() - 1) * step + size_of(type)));
    char* first = bytes_.data() + misalign;
    if (stride < 0 && !ids.empty()) first += (ids.size() - 1) * step;
    for (size_t i = 0; i < ids.size(); ++i) {
      char* at = first + static_cast<ptrdiff_t>(i) * stride;
      const auto narrow = static_cast<int32_t>(ids[i]);
      if (type == IntType::kInt64)
        std::memcpy(at, &ids[i], sizeof ids[i]);
      else
        std::memcpy(at, &narrow, sizeof narrow);
    }
    part_.data = first;
    part_.count = ids.size();
    part_.stride = stride;
    part_.type = type;
  }
  // The part points to the bytes, which keep their address in a move.
  Layout(Layout&&) = default;

  Part part(size_t request = 0, size_t first = 0) const {
    Part p = part_;
    p.request = request;
    p.first = first;
    return p;
  }

 private:
  std::vector<char> bytes_;
  Part part_;
};

ptrdiff_t packed(IntType type) { return static_cast<ptrdiff_t>(size_of(type)); }

int64_t as(IntType type, int64_t id) {
  return type == IntType::kInt32 ? static_cast<int32_t>(id) : id;
}
Ids as(IntType type, Ids ids) {
  for (int64_t& id : ids) id = as(type, id);
  return ids;
}

// The bytes of a wire, followed by a guard.
class Wire {
 public:
  Wire(IntType type, size_t count)
      : type_(type), count_(count), storage_((count * size_of(type) + 7) / 8 + 1, kGuard) {}
  void* data() { return storage_.data(); }
  Ids ids() const {
    Ids ids(count_);
    const char* at = reinterpret_cast<const char*>(storage_.data());
    for (int64_t& id : ids) {
      int32_t narrow;
      if (type_ == IntType::kInt64) {
        std::memcpy(&id, at, sizeof id);
      } else {
        std::memcpy(&narrow, at, sizeof narrow);
        id = narrow;
      }
      at += size_of(type_);
    }
    return ids;
  }
  bool guarded() const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(storage_.data());
    for (size_t i = count_ * size_of(type_); i < storage_.size() * 8; ++i)
      if (bytes[i] != 0xa5) return false;
    return true;
  }

 private:
  static constexpr uint64_t kGuard = 0xa5a5a5a5a5a5a5a5;
  IntType type_;
  size_t count_;
  std::vector<uint64_t> storage_;
};

std::optional<Violation> gather_one(const Ids& ids, IntType type, IntType wire, Bounds bounds,
                                    bool strided = false) {
  const Layout layout(ids, type, packed(type) * (strided ? 2 : 1));
  const Part part = layout.part();
  Wire out(wire, ids.size());
  return gather(&part, 1, out.data(), wire, &bounds);
}

bool same(const std::optional<Violation>& a, const std::optional<Violation>& b) {
  if (!a || !b) return !a && !b;
  return a->request == b->request && a->position == b->position && a->value == b->value;
}

TEST_CASE("gather copies every pair of types, contiguous, strided, unaligned and reversed") {
  for (const IntType from : kTypes) {
    for (const IntType to : kTypes) {
      for (const ptrdiff_t stride : {1, 2, 5, -1, -3}) {
        for (const size_t misalign : {0, 1, 4}) {
          for (const size_t count : {0, 1, 2, 3, 7, 8, 63, 64, 65, 128, 129, 256, 512, 1000}) {
            Ids ids(count);
            for (size_t i = 0; i < count; ++i) ids[i] = static_cast<int64_t>(i * 7919) - 1000;
            const Layout layout(ids, from, packed(from) * stride, misalign);
            const Part part = layout.part();
            const Bounds bounds{-1000, 1000 * 7919};
            for (const Bounds* checked : {static_cast<const Bounds*>(nullptr), &bounds}) {
              Wire wire(to, count);
              const auto violation = gather(&part, 1, wire.data(), to, checked);
              const bool ok = !violation && wire.ids() == ids && wire.guarded();
              if (!ok) {
                CAPTURE(size_of(from));
                CAPTURE(size_of(to));
                CAPTURE(stride);
                CAPTURE(misalign);
                CAPTURE(count);
                FAIL_CHECK("differs");
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("gather takes any stride in bytes, zero and odd ones included") {
  const Ids ids{3, 1, 4, 1, 5, 9, 2, 6};
  for (const ptrdiff_t stride : {9, 11, 13, -9, -17}) {
    const Layout layout(ids, IntType::kInt64, stride);
    const Part part = layout.part();
    Wire wire(IntType::kInt32, ids.size());
    CHECK_FALSE(gather(&part, 1, wire.data(), IntType::kInt32, nullptr));
    CHECK(wire.ids() == ids);
  }
  const int64_t id = 42;  // an expanded view: one id, many times
  const Part part{&id, 5, 0, IntType::kInt64};
  Wire wire(IntType::kInt64, 5);
  CHECK_FALSE(gather(&part, 1, wire.data(), IntType::kInt64, nullptr));
  CHECK(wire.ids() == Ids(5, 42));
}

TEST_CASE("gather joins parts in order and skips empty ones") {
  const Layout a({1, 2}, IntType::kInt64, 8), b({3}, IntType::kInt32, 4),
      c({4, 5, 6}, IntType::kInt64, -16, 3);
  Part empty;  // no memory at all
  for (const IntType to : kTypes) {
    const Part parts[] = {empty, a.part(), empty, b.part(), c.part(), empty};
    Wire wire(to, 6);
    const Bounds bounds{0, 6};
    CHECK_FALSE(gather(parts, 6, wire.data(), to, &bounds));
    CHECK(wire.ids() == Ids{1, 2, 3, 4, 5, 6});
    CHECK(wire.guarded());
  }
  CHECK_FALSE(gather(nullptr, 0, nullptr, IntType::kInt64, nullptr));
  CHECK_FALSE(gather(&empty, 1, nullptr, IntType::kInt32, nullptr));
}

TEST_CASE("gather lets in exactly the ids within the bounds") {
  const int64_t vocabs[] = {1, 2, 32000, kMax32, kMax32 + 1, kMax32 + 2, int64_t{1} << 62, kMax64};
  std::vector<Bounds> all{{kMin32, kMax32}, {kMin32, 0}, {0, 0},
                          {-5, 7},          {0, kMax64}, {kMin32, kMax64 + kMin32}};
  for (const int64_t vocab : vocabs) all.push_back({0, vocab - 1});
  for (const Bounds& bounds : all) {
    Ids values{kMin64,     kMin64 + 1, kMin32 - 1, kMin32, kMin32 + 1, -1,        0,        1,
               kMax32 - 1, kMax32,     kMax32 + 1, kMax64, kMax64 - 1, bounds.lo, bounds.hi};
    if (bounds.lo > kMin64) values.push_back(bounds.lo - 1);
    if (bounds.hi < kMax64) values.push_back(bounds.hi + 1);
    for (const int64_t value : values) {
      const bool in_range = value >= bounds.lo && value <= bounds.hi;
      for (const bool strided : {false, true}) {
        for (const IntType wire : kTypes) {
          // The ids before and after are in range: the reported position must be the exact one, not
          // the end of a vector.
          Ids ids(37, bounds.hi);
          ids[5] = bounds.lo;
          ids[21] = value;
          const auto found = gather_one(ids, IntType::kInt64, wire, bounds, strided);
          const auto expected =
              in_range ? std::nullopt : std::optional<Violation>(Violation{0, 21, value});
          if (!same(found, expected)) {
            CAPTURE(bounds.lo);
            CAPTURE(bounds.hi);
            CAPTURE(value);
            CAPTURE(strided);
            FAIL_CHECK("wrong verdict");
          }
        }
      }
    }
  }
}

TEST_CASE("gather checks every id of a long run") {
  const Bounds bounds{-3, 1000};
  for (const IntType from : kTypes) {
    for (const IntType wire : kTypes) {
      for (const size_t count : {256, 300, 600}) {
        size_t wrong = 0;
        Ids ids(count, bounds.hi);
        ids[count / 2] = bounds.lo;
        for (size_t at = 0; at < count; ++at) {
          for (const int64_t bad : {bounds.lo - 1, bounds.hi + 1}) {
            const int64_t good = std::exchange(ids[at], bad);
            wrong += !same(gather_one(ids, from, wire, bounds), Violation{0, at, bad});
            ids[at] = good;
          }
        }
        wrong += gather_one(ids, from, wire, bounds).has_value();
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("gather checks int32 ids against int32 and int64 bounds") {
  for (const IntType wire : kTypes) {
    for (const bool strided : {false, true}) {
      auto check = [&](Ids ids, Bounds b) {
        return gather_one(ids, IntType::kInt32, wire, b, strided);
      };
      CHECK_FALSE(check({kMin32, -1, 0, kMax32}, {kMin32, kMax32}));
      CHECK_FALSE(check({0, kMax32}, {0, kMax64 - 1}));
      CHECK(same(check({0, kMin32}, {0, kMax64 - 1}), Violation{0, 1, kMin32}));
      CHECK(same(check({0, 0, 1}, {0, 0}), Violation{0, 2, 1}));
      CHECK(same(check({kMax32}, {0, kMax32 - 1}), Violation{0, 0, kMax32}));
    }
  }
}

TEST_CASE("gather names the first violation over all parts") {
  const Layout good({1, 2, 3}, IntType::kInt32, 4), bad({1, 9, 8}, IntType::kInt64, 16),
      worse({-1}, IntType::kInt64, 8);
  Part empty;
  const Part parts[] = {good.part(0), empty, bad.part(4, 100), worse.part(5)};
  const Bounds bounds{0, 7};
  Wire wire(IntType::kInt32, 7);
  CHECK(same(gather(parts, 4, wire.data(), IntType::kInt32, &bounds), Violation{4, 101, 9}));
  CHECK(wire.guarded());
}

TEST_CASE("without bounds a narrow wire truncates") {
  const Ids ids{kMin64, kMax64, kMax32 + 1, kMin32 - 1, (int64_t{5} << 32) + 7, -1};
  for (const ptrdiff_t stride : {8, 24}) {
    const Layout layout(ids, IntType::kInt64, stride);
    const Part part = layout.part();
    Wire wire(IntType::kInt32, ids.size());
    CHECK_FALSE(gather(&part, 1, wire.data(), IntType::kInt32, nullptr));
    CHECK(wire.ids() == Ids{0, -1, kMin32, kMax32, 7, -1});
  }
}

// A part that is not plain memory: a vector of strings.
int64_t read_id(const Part& part, size_t index) {
  return std::stoll((*static_cast<const std::vector<std::string>*>(part.data))[part.first + index]);
}
bool read_strings(const Part& part, void* dst, IntType wire, const Bounds* bounds) {
  bool ok = true;
  for (size_t i = 0; i < part.count; ++i) {
    const int64_t id = read_id(part, i);
    if (bounds) ok &= id >= bounds->lo && id <= bounds->hi;
    if (wire == IntType::kInt32)
      static_cast<int32_t*>(dst)[i] = static_cast<int32_t>(id);
    else
      static_cast<int64_t*>(dst)[i] = id;
  }
  return ok;
}

TEST_CASE("gather reads parts that are no memory through their functions") {
  const std::vector<std::string> strings{"0", "11", "-12", "13"};
  const Layout before({7}, IntType::kInt32, 4), after({8}, IntType::kInt64, 8);
  Part custom{&strings, 3, 0, IntType::kInt64, 1, 1, read_strings, read_id};
  const Part parts[] = {before.part(0), custom, after.part(2)};
  for (const IntType to : kTypes) {
    Wire wire(to, 5);
    CHECK_FALSE(gather(parts, 3, wire.data(), to, nullptr));
    CHECK(wire.ids() == Ids{7, 11, -12, 13, 8});
    CHECK(wire.guarded());
    const Bounds bounds{0, 100};
    CHECK(same(gather(parts, 3, wire.data(), to, &bounds), Violation{1, 2, -12}));
  }
}

TEST_CASE("ids that another thread mends after the check still name their request") {
  const std::vector<std::string> strings{"5", "6"};
  const Part part{&strings,
                  1,
                  0,
                  IntType::kInt64,
                  3,
                  1,
                  [](const Part&, void*, IntType, const Bounds*) { return false; },
                  read_id};
  const Bounds bounds{0, 100};
  Wire wire(IntType::kInt64, 1);
  CHECK(same(gather(&part, 1, wire.data(), IntType::kInt64, &bounds), Violation{3, 1, 6}));
}

TEST_CASE("convert widens, narrows and copies") {
  Random random(1);
  for (const IntType from : kTypes) {
    for (const IntType to : kTypes) {
      for (const size_t count : {0, 1, 5, 1000}) {
        for (const size_t misalign : {0, 1, 4}) {
          Ids ids(count);
          for (int64_t& id : ids) id = as(from, random.in(kMin64, kMax64));
          const Layout layout(ids, from, packed(from), misalign);
          Wire wire(to, count);
          convert(layout.part().data, from, wire.data(), to, count);
          CHECK(wire.ids() == as(to, ids));
          CHECK(wire.guarded());
        }
      }
    }
  }
}

TEST_CASE("gather agrees with a naive reference on random parts") {
  Random random(2);
  for (int round = 0; round < 4000; ++round) {
    const IntType to = kTypes[random.in(0, 1)];
    const int64_t hi = random.one_in(3) ? kMax64 - 1 : random.in<int64_t>(0, 1 << 20);
    const Bounds bounds{
        random.one_in(2) ? 0 : -random.in<int64_t>(0, std::min(-kMin32, kMax64 - hi)), hi};
    const bool checked = !random.one_in(4);
    std::vector<Layout> layouts;
    std::vector<Part> parts;
    Ids expected;
    std::optional<Violation> first;
    const size_t count = random.in<size_t>(0, 6);
    for (size_t request = 0; request < count; ++request) {
      const IntType from = kTypes[random.in(0, 1)];
      Ids ids(random.one_in(5) ? 0 : random.in<size_t>(1, 150));
      for (int64_t& id : ids) {
        id = as(from, random.in(bounds.lo, bounds.hi));
        if (random.one_in(300)) id = as(from, random.in(kMin64, kMax64));
        if (from == IntType::kInt32 && random.one_in(2)) id = random.in<int64_t>(0, 1);
      }
      ptrdiff_t stride = packed(from);
      if (random.one_in(2)) stride += random.in<ptrdiff_t>(0, 20);
      if (random.one_in(3)) stride = -stride;
      const size_t start = random.in<size_t>(0, 9);
      layouts.emplace_back(ids, from, stride, random.in<size_t>(0, 8));
      parts.push_back(layouts.back().part(request, start));
      for (size_t i = 0; i < ids.size(); ++i) {
        expected.push_back(as(to, ids[i]));
        const bool bad = ids[i] < bounds.lo || ids[i] > bounds.hi;
        if (checked && bad && !first) first = Violation{request, start + i, ids[i]};
      }
    }
    Wire wire(to, expected.size());
    const auto found =
        gather(parts.data(), parts.size(), wire.data(), to, checked ? &bounds : nullptr);
    CAPTURE(round);
    REQUIRE(same(found, first));
    REQUIRE(wire.guarded());
    if (!found) REQUIRE(wire.ids() == expected);
  }
}

}  // namespace
}  // namespace pystage

#include "gather.h"

#include <cstring>

namespace pystage {
namespace {

// The check costs two additions and two ORs per id, and no branch: an id outside [lo, hi] sets the
// sign bit of (v - lo) or of (hi - v). The limits on Bounds ensure that neither wraps back into
// range.
template <typename In, typename Out, bool kChecked>
inline uint64_t copy_block(const In* __restrict__ src, Out* __restrict__ dst, size_t count,
                           uint64_t lo, uint64_t hi) {
  uint64_t bad = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto v = static_cast<uint64_t>(static_cast<int64_t>(src[i]));
    if constexpr (kChecked) bad |= (v - lo) | (hi - v);
    dst[i] = static_cast<Out>(v);
  }
  return bad;
}

// Copies one contiguous run. A request's ids were last touched when the request arrived, and the
// device has taken the slot's cache lines away by reading them, so both come from the outer caches.
// Prefetching, and copying at four positions at once, lets a core have more loads in flight.
template <typename In, typename Out, bool kChecked>
bool copy_run(const In* __restrict__ src, Out* __restrict__ dst, size_t count, Bounds bounds) {
  constexpr size_t kRuns = 4;
  constexpr size_t kBlock = 256 / sizeof(In);
  constexpr size_t kAhead = 1024 / sizeof(In);
  const auto lo = static_cast<uint64_t>(bounds.lo);
  const auto hi = static_cast<uint64_t>(bounds.hi);
  const size_t run = count / kRuns / kBlock * kBlock;
  uint64_t bad = 0;
  for (size_t i = 0; i < run; i += kBlock) {
    for (size_t at = i; at < run * kRuns; at += run) {
      if (i + kAhead + kBlock <= run) {
        for (size_t k = 0; k < kBlock; k += 64 / sizeof(In))
          __builtin_prefetch(src + at + kAhead + k);
        for (size_t k = 0; k < kBlock; k += 64 / sizeof(Out))
          __builtin_prefetch(dst + at + kAhead + k, 1);
      }
      bad |= copy_block<In, Out, kChecked>(src + at, dst + at, kBlock, lo, hi);
    }
  }
  bad |= copy_block<In, Out, kChecked>(src + run * kRuns, dst + run * kRuns, count - run * kRuns,
                                       lo, hi);
  return static_cast<int64_t>(bad) >= 0;
}

template <typename In, typename Out, bool kChecked>
bool copy_strided(const Part& part, Out* dst, Bounds bounds) {
  bool ok = true;
  const char* src = static_cast<const char*>(part.data);
  for (size_t i = 0; i < part.count; ++i, src += part.stride) {
    In v;
    std::memcpy(&v, src, sizeof(In));  // a strided view may be unaligned
    const bool in_range = !kChecked || (v >= bounds.lo && v <= bounds.hi);
    ok = ok && in_range;
    dst[i] = static_cast<Out>(v);
  }
  return ok;
}

template <typename In, typename Out>
bool copy_part(const Part& part, void* dst, const Bounds* bounds) {
  auto* out = static_cast<Out*>(dst);
  const bool contiguous = part.stride == static_cast<ptrdiff_t>(sizeof(In)) &&
                          reinterpret_cast<uintptr_t>(part.data) % alignof(In) == 0;
  if (!contiguous)
    return bounds ? copy_strided<In, Out, true>(part, out, *bounds)
                  : copy_strided<In, Out, false>(part, out, {});
  const auto* in = static_cast<const In*>(part.data);
  if (bounds) return copy_run<In, Out, true>(in, out, part.count, *bounds);
  if constexpr (sizeof(In) == sizeof(Out)) {
    if (part.count) std::memcpy(out, in, part.count * sizeof(In));
    return true;
  }
  return copy_run<In, Out, false>(in, out, part.count, {});
}

bool copy_part(const Part& part, void* dst, IntType wire, const Bounds* bounds) {
  if (part.read) return part.read(part, dst, wire, bounds);
  if (part.type == IntType::kInt64)
    return wire == IntType::kInt64 ? copy_part<int64_t, int64_t>(part, dst, bounds)
                                   : copy_part<int64_t, int32_t>(part, dst, bounds);
  return wire == IntType::kInt64 ? copy_part<int32_t, int64_t>(part, dst, bounds)
                                 : copy_part<int32_t, int32_t>(part, dst, bounds);
}

int64_t id_at(const Part& part, size_t index) {
  if (part.read_id) return part.read_id(part, index);
  const char* src =
      static_cast<const char*>(part.data) + static_cast<ptrdiff_t>(index) * part.stride;
  if (part.type == IntType::kInt64) {
    int64_t v;
    std::memcpy(&v, src, sizeof v);
    return v;
  }
  int32_t v;
  std::memcpy(&v, src, sizeof v);
  return v;
}

}  // namespace

std::optional<Violation> gather(const Part* parts, size_t count, void* dst, IntType wire,
                                const Bounds* bounds) {
  char* out = static_cast<char*>(dst);
  for (size_t p = 0; p < count; ++p) {
    if (!copy_part(parts[p], out, wire, bounds)) {
      for (size_t i = 0; i < parts[p].count; ++i) {
        const int64_t v = id_at(parts[p], i);
        if (v < bounds->lo || v > bounds->hi)
          return Violation{parts[p].request, parts[p].first + i, v};
      }
      // No id is out of bounds any more: another thread has changed the ids. Name the request.
      return Violation{parts[p].request, parts[p].first, id_at(parts[p], 0)};
    }
    out += parts[p].count * size_of(wire);
  }
  return std::nullopt;
}

void convert(const void* src, IntType from, void* dst, IntType to, size_t count) {
  const Part part{src, count, static_cast<ptrdiff_t>(size_of(from)), from};
  copy_part(part, dst, to, nullptr);
}

}  // namespace pystage

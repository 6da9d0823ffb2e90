// Copies ragged ids into the wire format in one pass, which also does the range check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "device.h"

namespace pystage {

// Ids must lie in [lo, hi]. The check in gather() needs lo <= 0 <= hi and hi - lo < 2^63.
struct Bounds {
  int64_t lo;
  int64_t hi;
};

struct Part;

// Reads a part that is not plain memory (a Python list). Writes part.count ids to dst and returns
// whether all lie within the bounds (null: no check).
using ReadPart = bool (*)(const Part& part, void* dst, IntType wire, const Bounds* bounds);
// Returns the id at an index of such a part.
using ReadId = int64_t (*)(const Part& part, size_t index);

// One request's ids: strided memory, or an object that `read` can read.
struct Part {
  const void* data = nullptr;  // address of the first id, or the object for `read`
  size_t count = 0;
  ptrdiff_t stride = 0;  // bytes
  IntType type = IntType::kInt64;
  size_t request = 0;  // index of the request, for errors
  size_t first = 0;    // position of its first id in that request
  ReadPart read = nullptr;
  ReadId read_id = nullptr;
};

struct Violation {
  size_t request;
  size_t position;  // within the request
  int64_t value;
};

// Writes all parts to dst, one after another. Returns the first id outside the bounds, if any; the
// contents of dst are then arbitrary. Null bounds mean no check. A wire of kInt32 truncates ids
// that do not fit, so pass bounds.
std::optional<Violation> gather(const Part* parts, size_t count, void* dst, IntType wire,
                                const Bounds* bounds);

// Converts contiguous ids from one width to the other (truncating).
void convert(const void* src, IntType from, void* dst, IntType to, size_t count);

}  // namespace pystage

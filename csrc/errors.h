// The errors of the three layers. python.cpp maps each to the Python type of the same name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pystage {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A token id outside [0, vocab_size).
struct TokenRangeError : Error {
  TokenRangeError(size_t request, size_t position, int64_t value, int64_t vocab_size)
      : Error("token_ids[" + std::to_string(request) + "][" + std::to_string(position) + "] is " +
              std::to_string(value) + ", outside [0, " + std::to_string(vocab_size) +
              "); nothing was staged: reject the request or stage without vocab_size"),
        request(request),
        position(position),
        value(value),
        vocab_size(vocab_size) {}
  size_t request;
  size_t position;
  int64_t value;
  int64_t vocab_size;
};

// The pool's policy gave no slot for a request.
struct PoolExhaustedError : Error {
  using Error::Error;
};

// The request is larger than the pool's capacity, so no slot can ever fit it.
struct RequestTooLargeError : PoolExhaustedError {
  using PoolExhaustedError::PoolExhaustedError;
};

struct PoolClosedError : Error {
  using Error::Error;
};

// A pool or lease of the parent process was used after fork.
struct ForkedProcessError : Error {
  using Error::Error;
};

// resolve() was called inside a CUDA graph capture. Every replay would read a slot that has been
// reused since.
struct CaptureError : Error {
  using Error::Error;
};

// A device call failed; the message names the call, the device and the device's own error.
struct DeviceError : Error {
  using Error::Error;
};

}  // namespace pystage

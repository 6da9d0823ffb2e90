// The errors of the three layers. python.cpp gives each the Python type of the same name.
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

// No slot could be had within the pool's policy.
struct PoolExhaustedError : Error {
  using Error::Error;
};

// No slot could ever be had: the request is larger than the pool's capacity.
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

// resolve() inside a CUDA graph capture: every replay would read a slot long since reused.
struct CaptureError : Error {
  using Error::Error;
};

// A device call failed; the message names the call, the device and the device's own error.
struct DeviceError : Error {
  using Error::Error;
};

}  // namespace pystage

// Tests the CUDA device on a stub of the driver: which context its calls run in, what they leave
// behind, and the result of each call that fails. The Python tests cover what a GPU itself does.
// One file, because all cases use the same stub and the same helpers.
#include <doctest/doctest.h>

#include <functional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_device.h"
#include "cuda_stub.h"
#include "helpers.h"

namespace pystage {
namespace {

using testing::Ids;
using testing::LeasePtr;
using testing::Owner;

// A device that no other case has used. Never device 0, which the runtime makes current by itself.
int fresh_device() {
  static std::atomic<int> next{1};
  const int index = next++;
  REQUIRE(index < stub::kDevices);
  return index;
}

void in_thread(const std::function<void()>& work) { std::thread(work).join(); }

HostMemory pinned(Device& device, size_t bytes = 4096) {
  std::string why;
  const HostMemory memory = device.allocate(bytes, &why);
  CHECK(why.empty());
  CHECK(memory.pinned);
  return memory;
}

Transfer transfer_of(const HostMemory& memory, std::vector<int64_t>& out) {
  Transfer t;
  t.src = memory.host;
  t.src_device = memory.device;
  t.wire = IntType::kInt64;
  t.dst = out.data();
  t.count = out.size();
  return t;
}

void expect_nothing_live(int index) {
  const stub::Live live = stub::live(index);
  CHECK(live.host_blocks == 0);
  CHECK(live.events == 0);
  CHECK(live.streams == 0);
}

// One call of each method of Device, each as a separate step.
class Calls {
 public:
  explicit Calls(int index) : index_(index) {}

  struct Step {
    std::string name;
    std::function<void()> run;
  };
  std::vector<Step> steps() {
    return {
        {"make", [&] { device_ = &cuda_device(index_); }},
        {"allocate", [&] { memory_ = device_->allocate(8192, &why_); }},
        {"create_fence", [&] { fence_ = device_->create_fence(); }},
        {"stream_id", [&] { id_ = device_->stream_id(stream()); }},
        {"capturing", [&] { check(!device_->capturing(stream())); }},
        {"usable", [&] { check(device_->usable()); }},
        {"hold", [&] { hold_ = device_->hold(stream()); }},
        {"launch",
         [&] {
           Transfer t = transfer_of(memory_, out_);
           device_->launch(t, stream());
         }},
        {"launch by copy engine",
         [&] {
           Transfer t = transfer_of(memory_, out_);
           t.kind = TransferKind::kCopyEngine;
           device_->launch(t, stream());
         }},
        {"launch with a tail",
         [&] {
           Transfer t = transfer_of(memory_, out_);
           t.tail = std::make_shared<RelayTail>();
           device_->launch(t, stream());
         }},
        {"launch values",
         [&] {
           const ValuesPiece piece{out_.data(), 0, 2};
           device_->launch_values(out_.data() + 8, 32, &piece, 1, stream());
         }},
        {"launch rows",
         [&] {
           const RowWrite row{nullptr, 0, 0, 0, 3};
           device_->launch_rows(reinterpret_cast<int32_t*>(out_.data()), 8, &row, 1,
                                out_.data() + 8, stream());
         }},
        {"record", [&] { device_->record(fence_, stream()); }},
        {"query", [&] { check(!device_->query(fence_)); }},
        {"wait", [&] { device_->wait(other_, fence_); }},
        {"release",
         [&] {
           if (hold_) device_->release(hold_);
           hold_ = nullptr;
           stub::run_host_functions(stream_);
         }},
        {"synchronize", [&] { device_->synchronize(fence_); }},
        {"query again", [&] { check(device_->query(fence_)); }},
        {"destroy_fence", [&] { device_->destroy_fence(fence_); }},
        {"free", [&] { device_->free(memory_); }},
    };
  }
  const HostMemory& memory() const { return memory_; }
  const std::string& why() const { return why_; }

 private:
  CUstream stream() const { return stream_; }
  static void check(bool condition) { CHECK(condition); }  // errors are left to the caller

  int index_;
  CUstream stream_ = stub::make_stream(index_), other_ = stub::make_stream(index_);
  Device* device_ = nullptr;
  HostMemory memory_;
  std::string why_;
  FenceHandle fence_ = nullptr;
  void* hold_ = nullptr;
  uint64_t id_ = 0;
  std::vector<int64_t> out_ = std::vector<int64_t>(100);
};

// --- contexts ----------------------------------------------------------------------------------

TEST_CASE("every call, each from a thread without a context: none on another device") {
  const int index = fresh_device();
  const int before = stub::contexts();
  Calls calls(index);
  for (const auto& step : calls.steps()) {
    CAPTURE(step.name);
    in_thread([&] {
      step.run();
      CHECK(stub::current().empty());
      CHECK_FALSE(stub::thread_is_relaxed());
    });
  }
  CHECK(stub::has_context(index));
  CHECK_FALSE(stub::has_context(0));
  CHECK(stub::contexts() == before + 1);
  expect_nothing_live(index);
}

TEST_CASE("every call while another device is current: it stays so") {
  const int index = fresh_device(), current = fresh_device();
  Calls calls(index);
  in_thread([&] {
    stub::set_current(current);
    const std::string before = stub::current();
    for (const auto& step : calls.steps()) {
      CAPTURE(step.name);
      step.run();
      CHECK(stub::current() == before);
    }
  });
  CHECK_FALSE(stub::has_context(0));
  expect_nothing_live(index);
  expect_nothing_live(current);
}

TEST_CASE("a thread whose context was taken away goes on") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  CUstream stream = stub::make_stream(index);
  stub::set_current(index);
  const uint64_t id = device.stream_id(stream);
  stub::set_no_current();  // like a library that calls cuCtxSetCurrent(NULL)
  CHECK(device.stream_id(stream) == id);
  CHECK_FALSE(device.capturing(stream));
  CHECK(stub::current().empty());
}

TEST_CASE("nothing is pushed where the device is current already") {
  const int index = fresh_device();
  in_thread([&] {
    stub::set_current(index);
    Calls calls(index);
    const auto steps = calls.steps();
    stub::reset_calls();
    for (const auto& step : steps) step.run();
    CHECK(stub::calls("cuCtxPushCurrent") == 0);
    CHECK(stub::calls("cuCtxGetCurrent") > 0);
  });
}

TEST_CASE("default streams are those of the pool's device, whatever is current") {
  const int index = fresh_device(), current = fresh_device();
  Device& device = cuda_device(index);
  Device& foreign = cuda_device(current);
  in_thread([&] {
    for (const auto handle : {CUstream{}, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD}) {
      stub::set_current(index);
      const uint64_t id = device.stream_id(handle);
      stub::set_current(current);
      CHECK(device.stream_id(handle) == id);
      CHECK(foreign.stream_id(handle) != id);
      stub::set_no_current();
      CHECK(device.stream_id(handle) == id);
    }
  });
}

TEST_CASE("the per-thread default stream is each thread's own") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  uint64_t ids[2];
  std::thread first([&] { ids[0] = device.stream_id(CU_STREAM_PER_THREAD); });
  std::thread second([&] { ids[1] = device.stream_id(CU_STREAM_PER_THREAD); });
  first.join();
  second.join();
  CHECK(ids[0] != ids[1]);
}

TEST_CASE("a green context of the device stays current, with its own default stream") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  in_thread([&] {
    const uint64_t of_primary = device.stream_id(nullptr);
    stub::set_current(stub::green_context(index));
    const std::string before = stub::current();
    CHECK(device.stream_id(nullptr) != of_primary);
    CHECK(stub::current() == before);
  });
}

TEST_CASE("a pool of one device in threads without a context: growth, figures, fences, the end") {
  const int index = fresh_device();
  const int before = stub::contexts();
  CUstream stream = stub::make_stream(index);
  std::unique_ptr<Owner> pool;
  PoolOptions options;
  options.capacity_bytes = 4 << 20;
  options.reserve_bytes = 4096;
  in_thread([&] { pool = std::make_unique<Owner>(cuda_device(index), options); });
  Device& device = cuda_device(index);
  LeasePtr lease;
  in_thread([&] { lease = (*pool)->acquire(2 << 20); });  // grows the pool
  Ids out(64, -1);
  const Ids ids = testing::fresh_ids(64);
  testing::write(*lease, ids);
  stub::hold(stream);
  in_thread([&] {
    Transfer t;
    t.src = lease->data();
    t.src_device = lease->device_data();
    t.wire = IntType::kInt64;
    t.dst = out.data();
    t.count = out.size();
    lease->launch_transfer(t, stream);
  });
  in_thread([&] { lease = nullptr; });
  in_thread([&] { CHECK((*pool)->stats().in_flight_slots == 1); });  // queries the fence
  CHECK(out[0] == -1);
  stub::release(stream);
  in_thread([&] { CHECK((*pool)->stats().in_flight_slots == 0); });
  CHECK(out == ids);
  in_thread([&] { CHECK((*pool)->trim() > 0); });
  in_thread([&] { pool = nullptr; });
  CHECK_FALSE(device.capturing(stream));
  CHECK_FALSE(stub::has_context(0));
  CHECK(stub::contexts() == before + 1);
  expect_nothing_live(index);
}

// --- streams, fences, captures -----------------------------------------------------------------

TEST_CASE("kernels copy and convert, behind what the stream holds") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  CUstream stream = stub::make_stream(index);
  HostMemory memory = pinned(device);
  const FenceHandle fence = device.create_fence();
  const std::vector<int64_t> wide{-1, 2, 3, int64_t{1} << 20, 5};
  const std::vector<int32_t> narrow(wide.begin(), wide.end());
  auto transfer = [&](const auto& from, auto& to) {
    std::memcpy(memory.host, from.data(), from.size() * sizeof from[0]);
    Transfer t;
    t.src = memory.host;
    t.src_device = memory.device;
    t.wire = sizeof from[0] == 8 ? IntType::kInt64 : IntType::kInt32;
    t.out = sizeof to[0] == 8 ? IntType::kInt64 : IntType::kInt32;
    t.dst = to.data();
    t.count = to.size();
    device.launch(t, stream);
  };
  std::vector<int64_t> wide_out(5);
  std::vector<int32_t> narrow_out(5);
  transfer(narrow, wide_out);
  CHECK(wide_out == wide);
  transfer(wide, narrow_out);
  CHECK(narrow_out == narrow);
  std::fill(wide_out.begin(), wide_out.end(), 0);
  stub::hold(stream);
  transfer(wide, wide_out);
  device.record(fence, stream);
  CHECK_FALSE(device.query(fence));
  CHECK(wide_out[0] == 0);
  stub::release(stream);
  device.synchronize(fence);
  CHECK(device.query(fence));
  CHECK(wide_out == wide);
  device.destroy_fence(fence);
  device.free(memory);
}

TEST_CASE("what a copy engine cannot do is refused before any call") {
  Device& device = cuda_device(fresh_device());
  std::vector<int64_t> out(4);
  Transfer t;
  t.dst = out.data();
  t.count = out.size();
  t.kind = TransferKind::kCopyEngine;  // int32 to int64
  CHECK_THROWS_WITH_AS(device.launch(t, nullptr), doctest::Contains("copy engine can neither"),
                       DeviceError);
  t.kind = TransferKind::kKernel;
  t.out = IntType::kInt32;
  t.tail = std::make_shared<RelayTail>();
  CHECK_THROWS_WITH_AS(device.launch(t, nullptr), doctest::Contains("as int64"), DeviceError);
}

TEST_CASE("while another thread captures a graph, every call works that may") {
  const int index = fresh_device();
  Calls calls(index);
  stub::set_capture_elsewhere(true);
  for (const auto& step : calls.steps()) {
    CAPTURE(step.name);
    in_thread([&] {
      CHECK_NOTHROW(step.run());
      CHECK_FALSE(stub::thread_is_relaxed());
    });
  }
  stub::set_capture_elsewhere(false);
  CHECK(calls.memory().pinned);
  expect_nothing_live(index);
}

TEST_CASE("a stream that captures is told from one that runs") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  CUstream stream = stub::make_stream(index);
  stub::set_capturing(stream, true);
  CHECK(device.capturing(stream));
  stub::set_capturing(stream, false);
  CHECK_FALSE(device.capturing(stream));
}

// --- memory that cannot be pinned, mapped or trusted ---------------------------------------------

TEST_CASE("a platform that refuses pinned memory gets pageable memory, and why") {
  for (const CUresult code : {CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_NOT_SUPPORTED,
                              CUDA_ERROR_NOT_PERMITTED, CUDA_ERROR_OPERATING_SYSTEM}) {
    const int index = fresh_device();
    Device& device = cuda_device(index);
    stub::fail("cuMemHostAlloc", 1, code);
    std::string why;
    const HostMemory memory = device.allocate(8192, &why);
    CHECK(stub::clear_failure() == "cuMemHostAlloc");
    CHECK_FALSE(memory.pinned);
    CHECK(memory.fallback);
    CHECK(memory.device == nullptr);
    CHECK(why.find("cuMemHostAlloc of 8192 bytes failed") != std::string::npos);
    device.free(memory);
    device.free(pinned(device));  // a later allocation may succeed
  }
}

TEST_CASE("memory that cannot be mapped is for the copy engine") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  stub::fail("cuMemHostGetDevicePointer", 1, CUDA_ERROR_NOT_SUPPORTED);
  std::string why;
  const HostMemory memory = device.allocate(8192, &why);
  stub::clear_failure();
  CHECK(memory.pinned);
  CHECK_FALSE(memory.fallback);
  CHECK(memory.device == nullptr);
  device.free(memory);
  expect_nothing_live(index);
}

TEST_CASE("the probe runs once a device, beside whatever the device does") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  stub::set_current(index);
  CUstream busy = stub::make_stream(index);
  void* hold = device.hold(nullptr);  // the legacy stream, which a blocking stream waits for
  stub::reset_calls();
  HostMemory memory = pinned(device);
  CHECK(stub::calls("cuLaunchKernelEx") == 2);
  CHECK(stub::calls("cuStreamCreate") == 1);
  device.free(memory);
  device.free(pinned(device));
  CHECK(stub::calls("cuLaunchKernelEx") == 2);
  CHECK_FALSE(device.capturing(busy));
  device.release(hold);
  expect_nothing_live(index);
  stub::set_no_current();
}

TEST_CASE("a number below zero is no device, and the others stay as they are") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  CHECK_THROWS_AS(cuda_device(-1), DeviceError);
  CHECK(&cuda_device(index) == &device);
}

TEST_CASE("kernels that read stale bytes: pageable memory from the first, with the reason") {
  const int index = fresh_device();
  stub::set_stale_reads(index, true);
  Device& device = cuda_device(index);
  for (int i = 0; i < 2; ++i) {
    std::string why;
    const HostMemory memory = device.allocate(8192, &why);
    CHECK_FALSE(memory.pinned);
    CHECK(memory.fallback);
    CHECK(memory.device == nullptr);
    CHECK(why.find("stale bytes") != std::string::npos);
    CHECK(why.find(device.name()) != std::string::npos);
    device.free(memory);
  }
  expect_nothing_live(index);
  PoolOptions options;
  options.capacity_bytes = options.reserve_bytes = 8192;
  Owner pool(device, options);
  CHECK(pool->stats().pageable_bytes == 8192);
  CHECK(pool->why_pageable().find("stale bytes") != std::string::npos);
}

TEST_CASE("whether kernels read pinned memory is known without a pool, and asked once") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  stub::reset_calls();
  CHECK(device.kernels_read_pinned());
  CHECK(device.kernels_read_pinned());
  CHECK(stub::calls("cuMemHostAlloc") == 1);
  CHECK(stub::calls("cuLaunchKernelEx") == 2);
  expect_nothing_live(index);
  const int stale = fresh_device();
  stub::set_stale_reads(stale, true);
  CHECK_FALSE(cuda_device(stale).kernels_read_pinned());
  CHECK_FALSE(cuda_device(stale).kernels_read_pinned());
  CHECK(stub::calls("cuMemHostAlloc") == 2);
  expect_nothing_live(stale);
}

// --- calls that fail ---------------------------------------------------------------------------

// Calls whose failure raises no error. If a call that frees a resource fails, the resource is
// leaked. If cuCtxGetCurrent or cuCtxGetDevice fails, the context is pushed. usable() returns its
// answer and does not throw.
const std::set<std::string> kSilent{
    "cuMemFreeHost",   "cuEventDestroy",   "cuStreamDestroy",
    "cuMemGetInfo",    "cuCtxGetCurrent",  "cuCtxGetDevice",
    "cuCtxPopCurrent", "cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode"};

TEST_CASE("each call of the driver fails at each place: an error that names it, and no leak") {
  std::set<std::string> failed;
  int places = 0;
  for (int nth = 1;; ++nth) {
    const int index = fresh_device(), current = fresh_device();
    Calls calls(index);
    std::string hit;
    in_thread([&] {
      CAPTURE(nth);
      stub::set_current(current);
      const std::string before = stub::current();
      stub::fail("", nth, CUDA_ERROR_UNKNOWN);
      bool threw = false;
      for (const auto& step : calls.steps()) {
        CAPTURE(step.name);
        try {
          step.run();
        } catch (const DeviceError& error) {
          hit = stub::clear_failure();
          CAPTURE(hit);
          const std::string message = error.what();
          CHECK(message.find(hit) != std::string::npos);
          CHECK(message.find("cuda:" + std::to_string(index)) != std::string::npos);
          CHECK(message.find("(999)") != std::string::npos);
          CHECK_FALSE(threw);
          threw = true;
          CHECK_NOTHROW(step.run());  // again: the device must still be usable
        }
      }
      if (!threw) hit = stub::clear_failure();
      CAPTURE(hit);
      if (hit.empty()) return;
      const stub::Live live = stub::live(index);
      if (threw) {
        CHECK(live.host_blocks + live.events + live.streams == 0);
      } else {
        CHECK(kSilent.count(hit) == 1);
        CHECK(live.host_blocks + live.events + live.streams <= 1);
      }
      if (hit != "cuCtxPopCurrent") CHECK(stub::current() == before);
      if (threw || hit != "cuThreadExchangeStreamCaptureMode")
        CHECK_FALSE(stub::thread_is_relaxed());
    });
    CHECK_FALSE(stub::has_context(0));
    if (hit.empty()) break;
    failed.insert(hit);
    ++places;
  }
  for (const std::string& call : stub::driver_calls()) {
    CAPTURE(call);  // the exception cleans up after a failed constructor
    CHECK(failed.count(call) == (call == "cuDevicePrimaryCtxRelease" ? 0 : 1));
  }
  CHECK(places > 100);
}

TEST_CASE("a device that could not be made leaves no context, and can be made later") {
  for (const char* call : {"cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent",
                           "cudaGetFuncBySymbol", "cudaGetSymbolAddress", "cuFuncGetAttribute"}) {
    CAPTURE(call);
    const int index = fresh_device();
    stub::fail(call, 1, CUDA_ERROR_UNKNOWN);
    CHECK_THROWS_WITH_AS(cuda_device(index), doctest::Contains(call), DeviceError);
    CHECK(stub::clear_failure() == call);
    CHECK_FALSE(stub::has_context(index));
    CHECK_NOTHROW(cuda_device(index));
    CHECK(stub::has_context(index));
  }
}

TEST_CASE("a driver without a call, or no driver, is said to be so") {
  stub::fail("cudaGetDriverEntryPointByVersion", 1,
             static_cast<CUresult>(35));  // cudaErrorInsufficientDriver
  CHECK_THROWS_WITH_AS(cuda_device(fresh_device()), doctest::Contains("install a driver for CUDA"),
                       DeviceError);
  stub::clear_failure();
  CHECK_THROWS_AS(cuda_device(stub::kDevices), DeviceError);
}

TEST_CASE("the device is lost at each place of a pool's life: errors, then a pool that is dead") {
  for (int nth = 1;; ++nth) {
    const int index = fresh_device();
    Device& device = cuda_device(index);  // other failures in here: the case before
    CUstream stream = stub::make_stream(index);
    bool reached = false;
    in_thread([&] {
      CAPTURE(nth);
      bool lost = false;
      auto attempt = [&](const std::function<void()>& work) {
        try {
          work();
        } catch (const DeviceError&) {
          lost = true;
        }
      };
      stub::fail("", nth, CUDA_ERROR_LAUNCH_FAILED, /*lost=*/true);
      std::unique_ptr<Owner> pool;
      PoolOptions options;
      options.capacity_bytes = 1 << 20;
      options.reserve_bytes = 4096;
      options.timeout_s = 0;
      Ids out(16);
      attempt([&] { pool = std::make_unique<Owner>(device, options); });
      if (pool) {
        LeasePtr lease;
        attempt([&] { lease = (*pool)->acquire(1024); });
        attempt([&] { (*pool)->acquire(100 << 10); });
        if (lease) {
          Transfer t;
          t.src = lease->data();
          t.src_device = lease->device_data();
          t.wire = IntType::kInt64;
          t.dst = out.data();
          t.count = out.size();
          attempt([&] { lease->launch_transfer(t, stream); });
          lease = nullptr;
        }
        CHECK_NOTHROW((*pool)->stats());
        if (lost && !stub::live(index).host_blocks) attempt([&] { (*pool)->trim(); });
        CHECK_NOTHROW((*pool)->close());
        pool = nullptr;
      }
      if (lost) CHECK_THROWS_AS(device.stream_id(stream), DeviceError);  // the device is dead
      const std::string hit = stub::clear_failure();
      reached = !hit.empty();
      if (hit != "cuCtxPopCurrent") CHECK(stub::current().empty());
    });
    if (!reached) break;
  }
}

TEST_CASE("a lost device is told from one that lacks something") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  in_thread([&] {
    CHECK(device.usable());
    CHECK(stub::current().empty());
    expect_nothing_live(index);
    stub::fail("cuMemGetInfo", 1, CUDA_ERROR_OUT_OF_MEMORY);
    CHECK(device.usable());
    CHECK(stub::clear_failure() == "cuMemGetInfo");
    // 226 and 721 are CUDA_ERROR_CONTAINED and CUDA_ERROR_TENSOR_MEMORY_LEAK.
    for (const int code :
         {int{CUDA_ERROR_ASSERT}, 226, 721, int{CUDA_ERROR_MPS_CLIENT_TERMINATED}}) {
      CAPTURE(code);
      stub::fail("", 1, static_cast<CUresult>(code), /*lost=*/true);
      CHECK_FALSE(device.usable());
      stub::clear_failure();
      CHECK(device.usable());
    }
    CHECK(stub::current().empty());
  });
  CHECK_FALSE(stub::has_context(0));
}

TEST_CASE("values are those of the call, however late the stream comes to them") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  CUstream stream = stub::make_stream(index);
  for (const size_t words : {1, 62, 63, 252, 253, 254, 2044}) {
    CAPTURE(words);
    std::vector<int64_t> values = testing::fresh_ids(2 * words), first(2 * words), second(2);
    const std::vector<int64_t> expected = values;
    const ValuesPiece pieces[] = {{first.data(), 0, static_cast<uint32_t>(words)},
                                  {second.data(), static_cast<uint32_t>(words - 1), 1}};
    stub::hold(stream);
    device.launch_values(values.data(), 16 * words, pieces, 2, stream);
    std::fill(values.begin(), values.end(), 0);
    CHECK(first[0] == 0);
    stub::release(stream);
    CHECK(first == expected);
    CHECK(second == std::vector<int64_t>(expected.end() - 2, expected.end()));
  }
  const ValuesPiece piece{nullptr, 0, 1};
  CHECK_THROWS_WITH_AS(device.launch_values(nullptr, 32736, &piece, 1, stream),
                       doctest::Contains("in 1 pieces cannot be parameters"), DeviceError);
  CHECK_THROWS_WITH_AS(device.launch_values(nullptr, 8, &piece, 1, stream),
                       doctest::Contains("8 bytes"), DeviceError);
  device.launch_values(nullptr, 0, nullptr, 0, stream);  // nothing to do
}

TEST_CASE("rows are those of the call") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  CUstream stream = stub::make_stream(index);
  const Ids prefix{7, 8}, rest{20, 21, 22};
  for (const size_t count : {1, 40, 41, 168, 169, 1360}) {
    CAPTURE(count);
    std::vector<int32_t> table(4 * count, -1), expected(4 * count, -1);
    std::vector<RowWrite> rows(count);
    for (size_t i = 0; i < count; ++i) {
      rows[i] = {prefix.data(), static_cast<int32_t>(i), 2, 1, 2};
      const int32_t row[] = {7, 8, 21, 22};
      std::copy(row, row + 4, expected.begin() + static_cast<std::ptrdiff_t>(4 * i));
    }
    stub::hold(stream);
    device.launch_rows(table.data(), 4, rows.data(), count, rest.data(), stream);
    rows.assign(count, RowWrite{});
    stub::release(stream);
    CHECK(table == expected);
  }
  const std::vector<RowWrite> many(1361);
  CHECK_THROWS_WITH_AS(
      device.launch_rows(nullptr, 4, many.data(), many.size(), rest.data(), stream),
      doctest::Contains("1361 rows cannot be parameters"), DeviceError);
  device.launch_rows(nullptr, 4, nullptr, 0, rest.data(), stream);  // nothing to do
}

TEST_CASE("before CUDA 12.1 a launch takes 4 KiB of parameters") {
  stub::set_driver_version(12000);
  Device& device = cuda_device(fresh_device());
  stub::set_driver_version(13000);
  CHECK(device.most_values() == 4064);
  CHECK(device.most_rows() == 168);
  CHECK(cuda_device(fresh_device()).most_values() == 32736);
}

TEST_CASE("the driver ends before what it holds: nothing throws") {
  const int index = fresh_device();
  Device& device = cuda_device(index);
  const HostMemory memory = pinned(device);
  const FenceHandle fence = device.create_fence();
  stub::fail("", 1, CUDA_ERROR_DEINITIALIZED, /*lost=*/true);
  device.destroy_fence(fence);
  device.free(memory);
  CHECK_FALSE(stub::clear_failure().empty());
  device.destroy_fence(fence);
  device.free(memory);
  expect_nothing_live(index);
}

}  // namespace
}  // namespace pystage

// The driver and the runtime, stubbed. One file, because all calls work on the same state.
#include "cuda_stub.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "device.h"

// A stream's queue. A task that returns false stays at its head.
struct CUstream_st {
  CUcontext context = nullptr;
  unsigned long long id = 0;
  bool by_driver = false;
  bool held = false;
  bool run_host_functions = false;
  bool capturing = false;
  std::deque<std::function<bool()>> tasks;
};

struct CUevent_st {
  CUcontext context = nullptr;
  uint64_t recorded = 0;
  uint64_t done = 0;
};

struct CUctx_st {
  int device = 0;
  int references = 0;  // if this is a primary context
  bool primary = false;
  CUstream_st legacy;
  std::map<std::thread::id, CUstream_st> per_thread;
};

struct CUfunc_st {
  std::string name;  // mangled
  int device = 0;
};

namespace pystage::stub {
namespace {

struct Block {
  size_t bytes = 0;
  int device = 0;
  std::vector<char> first_seen;  // the bytes that a kernel first read
};

struct Variable {
  size_t bytes = 0;
  std::map<int, std::vector<char>> by_device;
};

struct World {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<CUctx_st> primaries = std::vector<CUctx_st>(kDevices);
  std::map<int, CUctx_st> greens;
  std::set<CUstream> streams;
  std::set<CUevent> events;
  std::map<char*, Block> blocks;
  std::map<std::pair<int, const void*>, CUfunc_st> functions;
  std::map<const void*, std::string> kernels;  // by host symbol
  std::map<const void*, Variable> variables;   // by host symbol
  std::set<int> stale;
  int driver_version = 13000;
  unsigned long long next_stream_id = 1;
  bool capture_elsewhere = false;

  std::map<std::string, int> calls;
  std::string fail_name, failed;
  int fail_after = 0;  // this many calls; 0: no call fails
  CUresult fail_code = CUDA_SUCCESS;
  bool fail_stays = false, lost = false;

  World() {
    for (int d = 0; d < kDevices; ++d) {
      primaries[d].device = d;
      primaries[d].primary = true;
    }
  }
};

World& world() {
  static auto* w = new World;
  return *w;
}

thread_local std::vector<CUcontext> t_contexts;
thread_local CUstreamCaptureMode t_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

using Lock = std::unique_lock<std::mutex>;

CUcontext current_context() { return t_contexts.empty() ? nullptr : t_contexts.back(); }

enum Needs : unsigned {
  kNothing = 0,
  kContext = 1,  // a current context
  kDevice = 2,   // a device that is not lost
  kSafe = 4,     // no capture in the global mode in another thread
};

// Every call begins with this. The lock is then held until the call ends.
CUresult enter(Lock& lock, const char* name, unsigned needs) {
  World& w = world();
  lock = Lock(w.mutex);
  ++w.calls[name];
  if (w.fail_after && (w.fail_name.empty() || w.fail_name == name) && --w.fail_after == 0) {
    w.failed = name;
    w.lost = w.fail_stays;
    return w.fail_code;
  }
  if (w.lost && (needs & kDevice)) return w.fail_code;
  if ((needs & kContext) && !current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if ((needs & kSafe) && w.capture_elsewhere && t_mode != CU_STREAM_CAPTURE_MODE_RELAXED)
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  return CUDA_SUCCESS;
}

#define ENTER(name, needs) \
  Lock lock;               \
  if (const CUresult entered_ = enter(lock, name, needs); entered_ != CUDA_SUCCESS) return entered_

// The runtime makes device 0 current in a thread that has no context.
cudaError_t enter_runtime(Lock& lock, const char* name) {
  const CUresult entered = enter(lock, name, kNothing);
  if (entered == CUDA_SUCCESS && !current_context()) {
    CUcontext primary = &world().primaries[0];
    ++primary->references;
    t_contexts.push_back(primary);
  }
  return static_cast<cudaError_t>(entered);
}

CUstream named(CUcontext context, CUstream stream) {
  World& w = world();
  auto numbered = [&](CUstream_st& s) {
    if (!s.id) s.id = w.next_stream_id++;
    s.context = context;
    return &s;
  };
  if (!stream || stream == CU_STREAM_LEGACY) return numbered(context->legacy);
  if (stream == CU_STREAM_PER_THREAD)
    return numbered(context->per_thread[std::this_thread::get_id()]);
  return w.streams.count(stream) ? stream : nullptr;
}

// The stream that a handle means in the calling thread. Null if it does not belong to the current
// context.
CUstream find_stream(CUstream handle) {
  CUstream stream = named(current_context(), handle);
  return stream && stream->context == current_context() ? stream : nullptr;
}

void pump() {
  World& w = world();
  auto pump_one = [](CUstream_st& s) {
    bool ran = false;
    while (!s.held && !s.tasks.empty() && s.tasks.front()()) {
      s.tasks.pop_front();
      ran = true;
    }
    return ran;
  };
  for (bool ran = true; ran;) {
    ran = false;
    auto pump_context = [&](CUctx_st& context) {
      ran |= pump_one(context.legacy);
      for (auto& [thread, stream] : context.per_thread) ran |= pump_one(stream);
    };
    for (CUctx_st& context : w.primaries)
      if (context.references) pump_context(context);
    for (auto& [device, context] : w.greens) pump_context(context);
    for (CUstream stream : w.streams) ran |= pump_one(*stream);
  }
  w.changed.notify_all();
}

void put(CUstream stream, std::function<bool()> task) {
  stream->tasks.push_back(std::move(task));
  pump();
}

Block* block_of(const char* address) {
  auto& blocks = world().blocks;
  auto it = blocks.upper_bound(const_cast<char*>(address));
  if (it == blocks.begin()) return nullptr;
  --it;
  return address < it->first + it->second.bytes ? &it->second : nullptr;
}

// The bytes that a kernel of the device reads at an address of host memory.
const char* seen_by_kernel(int device, const char* address) {
  World& w = world();
  Block* block = block_of(address);
  if (!block || !w.stale.count(device)) return address;
  auto it = std::prev(w.blocks.upper_bound(const_cast<char*>(address)));
  if (block->first_seen.empty()) block->first_seen.assign(it->first, it->first + block->bytes);
  return block->first_seen.data() + (address - it->first);
}

// Runs transfer_single<In, Out> or transfer_vectors<In, Out>, which it knows by the mangled names.
void run_transfer(const CUfunc_st& kernel, const char* src, char* dst, size_t count) {
  const size_t in_name = kernel.name.find("I", kernel.name.find("transfer_")) + 1;
  const bool wide_in = kernel.name[in_name] == 'l', wide_out = kernel.name[in_name + 1] == 'l';
  src = seen_by_kernel(kernel.device, src);
  for (size_t i = 0; i < count; ++i) {
    int64_t value = 0;
    if (wide_in) {
      std::memcpy(&value, src + i * 8, 8);
    } else {
      int32_t narrow;
      std::memcpy(&narrow, src + i * 4, 4);
      value = narrow;
    }
    const auto narrow = static_cast<int32_t>(value);
    if (wide_out)
      std::memcpy(dst + i * 8, &value, 8);
    else
      std::memcpy(dst + i * 4, &narrow, 4);
  }
}

[[noreturn]] void not_stubbed(const char* name) {
  std::fprintf(stderr, "%s is not part of the stub\n", name);
  std::abort();
}

}  // namespace

bool has_context(int device) {
  Lock lock(world().mutex);
  return world().primaries[device].references > 0;
}

int contexts() {
  Lock lock(world().mutex);
  const auto& all = world().primaries;
  return static_cast<int>(
      std::count_if(all.begin(), all.end(), [](const CUctx_st& c) { return c.references > 0; }));
}

void set_current(CUcontext context) { t_contexts = {context}; }
void set_no_current() { t_contexts.clear(); }
void set_current(int device) {
  Lock lock(world().mutex);
  CUcontext primary = &world().primaries[device];
  if (!primary->references) ++primary->references;
  t_contexts = {primary};
}

CUcontext green_context(int device) {
  Lock lock(world().mutex);
  CUctx_st& context = world().greens[device];
  context.device = device;
  return &context;
}

std::string current() {
  std::string text;
  for (const CUcontext context : t_contexts)
    text += (context->primary ? "primary " : "green ") + std::to_string(context->device) + ";";
  return text;
}

CUstream make_stream(int device) {
  Lock lock(world().mutex);
  auto* stream = new CUstream_st;
  stream->context = &world().primaries[device];
  stream->id = world().next_stream_id++;
  world().streams.insert(stream);
  return stream;
}

void hold(CUstream stream) {
  Lock lock(world().mutex);
  stream->held = true;
}

void release(CUstream stream) {
  Lock lock(world().mutex);
  stream->held = false;
  pump();
}

void run_host_functions(CUstream stream) {
  Lock lock(world().mutex);
  stream->run_host_functions = true;
  pump();
  stream->run_host_functions = false;
}

void set_capture_elsewhere(bool on) {
  Lock lock(world().mutex);
  world().capture_elsewhere = on;
}

void set_capturing(CUstream stream, bool on) {
  Lock lock(world().mutex);
  stream->capturing = on;
}

void set_driver_version(int version) {
  Lock lock(world().mutex);
  world().driver_version = version;
}

bool thread_is_relaxed() { return t_mode == CU_STREAM_CAPTURE_MODE_RELAXED; }

void set_stale_reads(int device, bool on) {
  Lock lock(world().mutex);
  if (on)
    world().stale.insert(device);
  else
    world().stale.erase(device);
}

Live live(int device) {
  World& w = world();
  Lock lock(w.mutex);
  Live live{};
  for (const auto& [address, block] : w.blocks) live.host_blocks += block.device == device;
  for (const CUevent event : w.events) live.events += event->context->device == device;
  for (const CUstream s : w.streams) live.streams += s->by_driver && s->context->device == device;
  return live;
}

int calls(const std::string& name) {
  Lock lock(world().mutex);
  return world().calls[name];
}

void reset_calls() {
  Lock lock(world().mutex);
  world().calls.clear();
}

void fail(const std::string& name, int nth, CUresult code, bool lost) {
  World& w = world();
  Lock lock(w.mutex);
  w.fail_name = name;
  w.fail_after = nth;
  w.fail_code = code;
  w.fail_stays = lost;
  w.lost = false;
  w.failed.clear();
}

std::string clear_failure() {
  World& w = world();
  Lock lock(w.mutex);
  w.fail_after = 0;
  w.lost = false;
  return std::exchange(w.failed, {});
}

}  // namespace pystage::stub

// --- the driver, under its own names: cuda.h checks the signatures ----------------------------

using namespace pystage::stub;

extern "C" {

CUresult cuInit(unsigned) {
  ENTER("cuInit", kNothing);
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  ENTER("cuDriverGetVersion", kNothing);
  *version = world().driver_version;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER("cuDeviceGet", kNothing);
  if (ordinal < 0 || ordinal >= kDevices) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  ENTER("cuDeviceGetAttribute", kNothing);
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER("cuDevicePrimaryCtxRetain", kSafe);
  *context = &world().primaries[device];
  ++(*context)->references;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  ENTER("cuDevicePrimaryCtxRelease", kNothing);
  --world().primaries[device].references;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  ENTER("cuCtxGetCurrent", kNothing);
  *context = current_context();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  ENTER("cuCtxGetDevice", kContext);
  *device = current_context()->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  ENTER("cuCtxPushCurrent", kNothing);
  if (!context || (context->primary && !context->references)) return CUDA_ERROR_INVALID_CONTEXT;
  t_contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  ENTER("cuCtxPopCurrent", kContext);
  *context = current_context();
  t_contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  ENTER("cuThreadExchangeStreamCaptureMode", kNothing);
  std::swap(*mode, t_mode);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction) {
  ENTER("cuFuncGetAttribute", kNothing);
  *value = 90;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** args, void**) {
  ENTER("cuLaunchKernelEx", kContext | kDevice);
  CUstream stream = find_stream(config->hStream);
  if (!stream || function->device != current_context()->device) return CUDA_ERROR_INVALID_HANDLE;
  if (function->name.find("transfer_mixed") != std::string::npos) return CUDA_SUCCESS;  // not run
  if (function->name.find("write_values") != std::string::npos) {
    const auto* pieces = static_cast<const pystage::ValuesPiece*>(args[0]);
    const size_t count = config->gridDimX;
    const auto* values = reinterpret_cast<const char*>(pieces + count);
    for (size_t i = 0; i < count; ++i) {  // copied during the launch, like parameters
      const char* first = values + pieces[i].first * 16;
      put(stream,
          [bytes = std::vector<char>(first, first + pieces[i].count * 16), dst = pieces[i].dst] {
            std::memcpy(dst, bytes.data(), bytes.size());
            return true;
          });
    }
    return CUDA_SUCCESS;
  }
  if (function->name.find("write_rows") != std::string::npos) {
    const auto* rows = static_cast<const pystage::RowWrite*>(args[0]);
    put(stream, [parameter = std::vector<pystage::RowWrite>(rows, rows + config->gridDimX),
                 table = *static_cast<int32_t**>(args[1]), stride = *static_cast<size_t*>(args[2]),
                 rest = *static_cast<const int64_t**>(args[3])] {
      for (const pystage::RowWrite& w : parameter)
        for (int32_t i = 0; i < w.prefix_count + w.count; ++i)
          table[static_cast<size_t>(w.row) * stride + i] = static_cast<int32_t>(
              i < w.prefix_count ? w.prefix[i] : rest[w.rest_at + i - w.prefix_count]);
      return true;
    });
    return CUDA_SUCCESS;
  }
  const char* src = *static_cast<const char**>(args[0]);
  char* dst = *static_cast<char**>(args[1]);
  const size_t count = *static_cast<size_t*>(args[2]);
  put(stream, [function, src, dst, count] {
    run_transfer(*function, src, dst, count);
    return true;
  });
  return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
  ENTER("cuLaunchHostFunc", kContext | kDevice);
  CUstream stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  put(stream, [stream, function, data] {
    if (stream->run_host_functions) function(data);
    return stream->run_host_functions;
  });
  return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
  ENTER("cuMemHostAlloc", kContext | kDevice | kSafe);
  if (flags != (CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP))
    return CUDA_ERROR_INVALID_VALUE;
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  world().blocks[static_cast<char*>(*memory)] = {bytes, current_context()->device, {}};
  return CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* mapped, void* memory, unsigned) {
  ENTER("cuMemHostGetDevicePointer", kContext | kDevice);
  *mapped = reinterpret_cast<CUdeviceptr>(memory);
  return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* memory) {
  ENTER("cuMemFreeHost", kContext | kDevice | kSafe);
  if (!world().blocks.erase(static_cast<char*>(memory))) return CUDA_ERROR_INVALID_VALUE;
  std::free(memory);
  return CUDA_SUCCESS;
}

static CUresult copy(const char* call, void* to, const void* from, size_t bytes, CUstream handle) {
  ENTER(call, kContext | kDevice);
  CUstream stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  put(stream, [to, from, bytes] {
    std::memcpy(to, from, bytes);
    return true;
  });
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return copy("cuMemcpyHtoDAsync", reinterpret_cast<void*>(to), from, bytes, stream);
}
CUresult cuMemGetInfo(size_t* free_bytes, size_t* all_bytes) {
  ENTER("cuMemGetInfo", kContext | kDevice | kSafe);
  *free_bytes = *all_bytes = size_t{1} << 30;
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy("cuMemcpyDtoHAsync", to, reinterpret_cast<const void*>(from), bytes, stream);
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  ENTER("cuEventCreate", kContext | kDevice | kSafe);
  if (flags != CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_VALUE;
  *event = new CUevent_st{current_context()};
  world().events.insert(*event);
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
  ENTER("cuEventDestroy", kContext | kDevice | kSafe);
  if (!world().events.erase(event)) return CUDA_ERROR_INVALID_HANDLE;
  delete event;
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream handle) {
  ENTER("cuEventRecord", kContext | kDevice);
  CUstream stream = find_stream(handle);
  if (!stream || !world().events.count(event) || event->context->device != stream->context->device)
    return CUDA_ERROR_INVALID_HANDLE;
  put(stream, [event, point = ++event->recorded] {
    if (world().events.count(event)) event->done = std::max(event->done, point);
    return true;
  });
  return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
  ENTER("cuEventQuery", kContext | kDevice | kSafe);
  if (!world().events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
  return event->done == event->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent event) {
  ENTER("cuEventSynchronize", kContext | kDevice | kSafe);
  if (!world().events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
  world().changed.wait(lock, [&, point = event->recorded] { return event->done >= point; });
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  ENTER("cuStreamCreate", kContext | kDevice | kSafe);
  if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  *stream = new CUstream_st;
  (*stream)->context = current_context();
  (*stream)->id = world().next_stream_id++;
  (*stream)->by_driver = true;
  world().streams.insert(*stream);
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
  ENTER("cuStreamDestroy", kContext | kDevice | kSafe);
  if (!world().streams.erase(stream)) return CUDA_ERROR_INVALID_HANDLE;
  delete stream;
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
  ENTER("cuStreamSynchronize", kContext | kDevice | kSafe);
  CUstream stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  world().changed.wait(lock, [&] { return stream->tasks.empty(); });
  return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
  ENTER("cuStreamWaitEvent", kContext | kDevice);
  CUstream stream = find_stream(handle);
  if (!stream || !world().events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
  put(stream, [event, point = event->recorded] {
    return !world().events.count(event) || event->done >= point;
  });
  return CUDA_SUCCESS;
}

CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
  ENTER("cuStreamGetId", kContext | kDevice);
  CUstream stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  *id = stream->id;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  ENTER("cuStreamIsCapturing", kContext | kDevice);
  CUstream stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  *status = stream->capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

}  // extern "C"

namespace pystage::stub {
namespace {

#define ENTRY(name) {#name, reinterpret_cast<void*>(&name)}
const std::map<std::string, void*> kEntries{
    ENTRY(cuInit),
    ENTRY(cuDriverGetVersion),
    ENTRY(cuDeviceGet),
    ENTRY(cuDeviceGetAttribute),
    ENTRY(cuDevicePrimaryCtxRetain),
    ENTRY(cuDevicePrimaryCtxRelease),
    ENTRY(cuCtxGetCurrent),
    ENTRY(cuCtxGetDevice),
    ENTRY(cuCtxPushCurrent),
    ENTRY(cuCtxPopCurrent),
    ENTRY(cuThreadExchangeStreamCaptureMode),
    ENTRY(cuFuncGetAttribute),
    ENTRY(cuLaunchKernelEx),
    ENTRY(cuLaunchHostFunc),
    ENTRY(cuMemHostAlloc),
    ENTRY(cuMemHostGetDevicePointer),
    ENTRY(cuMemFreeHost),
    ENTRY(cuMemGetInfo),
    ENTRY(cuMemcpyHtoDAsync),
    ENTRY(cuMemcpyDtoHAsync),
    ENTRY(cuEventCreate),
    ENTRY(cuEventDestroy),
    ENTRY(cuEventRecord),
    ENTRY(cuEventQuery),
    ENTRY(cuEventSynchronize),
    ENTRY(cuStreamCreate),
    ENTRY(cuStreamDestroy),
    ENTRY(cuStreamSynchronize),
    ENTRY(cuStreamWaitEvent),
    ENTRY(cuStreamGetId),
    ENTRY(cuStreamIsCapturing),
};
#undef ENTRY

}  // namespace

std::vector<std::string> driver_calls() {
  std::vector<std::string> names;
  for (const auto& [name, entry] : kEntries) names.push_back(name);
  return names;
}

}  // namespace pystage::stub

extern "C" {

// --- the runtime -----------------------------------------------------------------------------

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  Lock lock;
  const CUresult entered = enter(lock, "cudaGetDriverEntryPointByVersion", kNothing);
  if (entered != CUDA_SUCCESS) return static_cast<cudaError_t>(entered);
  const auto it = kEntries.find(symbol);
  *entry = it == kEntries.end() ? nullptr : it->second;
  *found = *entry ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* symbol) {
  Lock lock;
  if (const cudaError_t entered = enter_runtime(lock, "cudaGetFuncBySymbol")) return entered;
  World& w = world();
  const int device = current_context()->device;
  CUfunc_st& entry = w.functions[{device, symbol}];
  entry = {w.kernels.at(symbol), device};
  *function = &entry;
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  Lock lock;
  if (const cudaError_t entered = enter_runtime(lock, "cudaGetSymbolAddress")) return entered;
  Variable& variable = world().variables.at(symbol);
  auto& memory = variable.by_device[current_context()->device];
  memory.resize(variable.bytes);
  *address = memory.data();
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheStub"; }
const char* cudaGetErrorString(cudaError_t) { return "told to fail"; }

// The functions that nvcc's host code calls when the program starts.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* symbol, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  world().kernels[symbol] = name;
}
void __cudaRegisterVar(void**, char* symbol, char*, const char*, int, size_t bytes, int, int) {
  world().variables[symbol].bytes = bytes;
}
// The functions that it calls for <<<>>> and managed variables. pystage uses neither.
char __cudaInitModule(void**) { not_stubbed("__cudaInitModule"); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { not_stubbed("__cudaGetKernel"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  not_stubbed("__cudaLaunchKernel");
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  not_stubbed("cudaLaunchKernel");
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  not_stubbed("__cudaPopCallConfiguration");
}

}  // extern "C"

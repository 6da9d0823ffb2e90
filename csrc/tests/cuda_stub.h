// The parts of the CUDA driver and runtime that cuda_device.cu calls, for machines without a GPU:
// devices with contexts, pinned memory, streams and events, and kernels that run on the host. It
// records what was created in which context, lets a test keep streams pending, and makes calls fail
// on request.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <string>
#include <vector>

namespace pystage::stub {

constexpr int kDevices = 4096;  // each case uses new ones, because a Device is never destroyed

// --- contexts ----------------------------------------------------------------------------------

bool has_context(int device);  // its primary context
int contexts();                // devices that have a primary context
// Makes a device's primary context current in the calling thread. Creates it if needed.
void set_current(int device);
void set_no_current();
// Like cuCtxSetCurrent. A green context of a device has its own default streams.
void set_current(CUcontext context);
CUcontext green_context(int device);
// The context stack of the calling thread: the handles of all its contexts, in order.
std::string current();

// --- streams -----------------------------------------------------------------------------------

CUstream make_stream(int device);
// Work that is put on the stream from now on does not run until release().
void hold(CUstream stream);
void release(CUstream stream);
// Runs the host functions that the stream has reached, and the work after them.
void run_host_functions(CUstream stream);
// Acts as if another thread captured a graph in the global mode: calls that such a capture forbids
// fail in threads that did not relax their mode.
void set_capture_elsewhere(bool on);
// Acts as if the stream itself captured a graph.
void set_capturing(CUstream stream, bool on);
bool thread_is_relaxed();

// --- memory ------------------------------------------------------------------------------------

// If on, kernels of the device keep reading the bytes that mapped memory had when a kernel first
// read it.
void set_stale_reads(int device, bool on);

// Sets the driver version that devices made from now on see. 12040 is CUDA 12.4.
void set_driver_version(int version);

struct Live {
  int host_blocks;
  int events;
  int streams;  // those made through the driver, not by make_stream()
};
Live live(int device);

// --- calls -------------------------------------------------------------------------------------

std::vector<std::string> driver_calls();  // the names of all calls of the stub
int calls(const std::string& name);       // since reset_calls(), including failed calls
void reset_calls();

// The nth call of that name from now on (of any name, if empty) does nothing and returns the code.
// With `lost`, so do all later calls that need the device, as after a device fault.
void fail(const std::string& name, int nth, CUresult code, bool lost = false);
// Ends the failures. Returns the name of the call that failed first, empty if none did.
std::string clear_failure();

}  // namespace pystage::stub

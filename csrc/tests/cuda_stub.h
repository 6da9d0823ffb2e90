// The parts of the CUDA driver and runtime that cuda_device.cu calls, for machines without a GPU:
// devices with contexts, pinned memory, streams and events, kernels that run on the host. It keeps
// book of what was made where, lets a test keep streams pending, and fails calls on request.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <string>
#include <vector>

namespace pystage::stub {

constexpr int kDevices = 4096;  // each case takes fresh ones: a Device is never destroyed

// --- contexts ----------------------------------------------------------------------------------

bool has_context(int device);  // its primary one
int contexts();                // devices that have one
// The calling thread's current context: the primary one of a device, which is made where it is not.
void set_current(int device);
void set_no_current();
// As cuCtxSetCurrent. A green context of a device has default streams of its own.
void set_current(CUcontext context);
CUcontext green_context(int device);
// What the calling thread has current: the handles of all contexts on its stack, in order.
std::string current();

// --- streams -----------------------------------------------------------------------------------

CUstream make_stream(int device);
// Nothing put on the stream from now on runs until release().
void hold(CUstream stream);
void release(CUstream stream);
// Runs the host functions that the stream has come to, and what is behind them.
void run_host_functions(CUstream stream);
// As if another thread recorded a graph in the global mode: calls that such a capture forbids fail
// in threads that did not relax their mode.
void set_capture_elsewhere(bool on);
// As if the stream itself recorded one.
void set_capturing(CUstream stream, bool on);
bool thread_is_relaxed();

// --- memory ------------------------------------------------------------------------------------

// Kernels of the device go on reading what mapped memory held when one first read it.
void set_stale_reads(int device, bool on);

// What the driver says of itself to devices made from now on: 12040 is CUDA 12.4.
void set_driver_version(int version);

struct Live {
  int host_blocks;
  int events;
  int streams;  // made by the driver, not by make_stream()
};
Live live(int device);

// --- calls -------------------------------------------------------------------------------------

std::vector<std::string> driver_calls();  // the names of all that are here
int calls(const std::string& name);       // since reset_calls(), also those that failed
void reset_calls();

// The nth call from now of that name (of any name, if empty) does nothing and returns the code.
// lost: so do all later ones that need the device, as after a fault on it.
void fail(const std::string& name, int nth, CUresult code, bool lost = false);
// Ends that. Returns the call that failed first, empty if none did.
std::string clear_failure();

}  // namespace pystage::stub

// A device whose streams are ordered queues on worker threads. It is the default without a GPU, and
// the tests use it to look for races.
#pragma once

#include "device.h"

namespace pystage {

// The process's host device. Never destroyed: its threads outlive static destruction.
Device& host_device();

constexpr int kHostStreams = 64;      // numbered streams, made when first used
constexpr int kHostEagerStream = -1;  // pools use it for eager transfers

// The calling thread's current stream (number 0 until set).
StreamHandle host_current_stream();
void host_set_current_stream(int number);
int host_current_stream_number();
StreamHandle host_stream(int number);

// True while hold() keeps the stream's work pending.
bool host_stream_held(StreamHandle stream);

}  // namespace pystage

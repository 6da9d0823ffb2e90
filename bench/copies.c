/* Copies that run beside a model's forwards, like streamed weights, the load of an adapter, or KV
 * that is loaded back. The copying thread never takes Python's GIL. On a GPU it copies from pinned
 * memory on a stream of its own, on the host with memcpy. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

/* Functions of the CUDA runtime that torch has loaded. The caller looks them up. All return
 * cudaError_t. */
struct runtime {
  int (*set_device)(int);
  int (*stream_create)(void** stream, unsigned flags);
  int (*stream_destroy)(void* stream);
  int (*stream_synchronize)(void* stream);
  int (*event_create)(void** event, unsigned flags);
  int (*event_destroy)(void* event);
  int (*event_record)(void* event, void* stream);
  int (*event_synchronize)(void* event);
  int (*memcpy_async)(void* dst, const void* src, size_t bytes, int kind, void* stream);
};

enum { NON_BLOCKING = 1, BLOCKING_SYNC = 1, DISABLE_TIMING = 2, HOST_TO_DEVICE = 1, MOST = 64 };

static void rest(unsigned microseconds) {
  struct timespec time = {microseconds / 1000000, (long)(microseconds % 1000000) * 1000};
  nanosleep(&time, NULL);
}

#define TRY(call)              \
  do {                         \
    int error_ = (call);       \
    if (error_) return error_; \
  } while (0)

/* Keeps `depth` copies of `bytes` queued until *stop is set. With `pause_us`, it waits for these
 * copies and then pauses for that time before it queues the next `depth`. Counts finished copies in
 * *done. Returns 0, or the error of the first runtime call that failed. */
int copies(const struct runtime* cuda, int device, void* dst, const void* src, size_t bytes,
           int depth, unsigned pause_us, volatile int* stop, volatile uint64_t* done) {
  if (depth < 1 || depth > MOST) return -1;
  if (!cuda) {
    for (; !*stop; ++*done) {
      memcpy(dst, src, bytes);
      if (pause_us && *done % depth == 0) rest(pause_us);
    }
    return 0;
  }
  void* stream;
  void* events[MOST];
  TRY(cuda->set_device(device));
  TRY(cuda->stream_create(&stream, NON_BLOCKING));
  for (int i = 0; i < depth; ++i)
    TRY(cuda->event_create(&events[i], DISABLE_TIMING | BLOCKING_SYNC));
  uint64_t n = 0;
  for (; !*stop; ++n) {
    void* event = events[n % depth];
    if (n >= (uint64_t)depth) {
      TRY(cuda->event_synchronize(event));
      *done = n - depth + 1;
    }
    if (pause_us && n && n % depth == 0) {
      TRY(cuda->stream_synchronize(stream));
      rest(pause_us);
    }
    TRY(cuda->memcpy_async(dst, src, bytes, HOST_TO_DEVICE, stream));
    TRY(cuda->event_record(event, stream));
  }
  TRY(cuda->stream_synchronize(stream));
  *done = n;
  for (int i = 0; i < depth; ++i) TRY(cuda->event_destroy(events[i]));
  return cuda->stream_destroy(stream);
}

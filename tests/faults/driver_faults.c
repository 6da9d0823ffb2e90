// Makes pystage's driver calls fail on a GPU. Preloaded with LD_PRELOAD, it replaces the runtime's
// cudaGetDriverEntryPointByVersion, through which pystage finds the driver's functions. The
// replacement returns wrappers, which make the real call or fail. Calls from other code are passed
// on unchanged, so torch keeps working while pystage's calls fail.
//   cc -shared -fPIC -O1 -o driver_faults.so driver_faults.c -ldl -pthread
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kMost = 48 };
enum Mode { kOnce, kLost, kDrop };

// Every wrapped driver function takes at most six integers or pointers, which the calling
// conventions of x86-64 and AArch64 pass in registers. So one wrapper fits all functions.
typedef int (*Call)(intptr_t, intptr_t, intptr_t, intptr_t, intptr_t, intptr_t);

static struct {
  char name[48];
  Call real;
  long succeeded;
} g_calls[kMost];
static int g_count;

static pthread_mutex_t g_mutex = PTHREAD_MUTEX_INITIALIZER;
static char g_name[48], g_failed[48];
static int g_after, g_code, g_lost;
static enum Mode g_mode;

// If the device is lost, the calls that need it fail. Contexts can still be made current, and the
// capture mode belongs to the thread.
static int needs_device(const char* name) {
  return strncmp(name, "cuCtx", 5) && strcmp(name, "cuThreadExchangeStreamCaptureMode");
}

// Returns whether the call must not be made. It then returns *code.
static int intercept(const char* name, int* code) {
  int caught = 0;
  pthread_mutex_lock(&g_mutex);
  if (g_after > 0 && (!g_name[0] || !strcmp(g_name, name)) && --g_after == 0) {
    strcpy(g_failed, name);
    g_lost = g_mode == kLost;
    caught = 1;
  } else if (g_lost && needs_device(name)) {
    caught = 1;
  }
  *code = g_mode == kDrop ? 0 : g_code;
  pthread_mutex_unlock(&g_mutex);
  return caught;
}

static int call(int i, intptr_t a, intptr_t b, intptr_t c, intptr_t d, intptr_t e, intptr_t f) {
  int code;
  if (intercept(g_calls[i].name, &code)) return code;
  code = g_calls[i].real(a, b, c, d, e, f);
  if (code == 0) __atomic_add_fetch(&g_calls[i].succeeded, 1, __ATOMIC_RELAXED);
  return code;
}

#define WRAPPER(n)                                                                                 \
  static int wrapper_##n(intptr_t a, intptr_t b, intptr_t c, intptr_t d, intptr_t e, intptr_t f) { \
    return call(n, a, b, c, d, e, f);                                                              \
  }
// clang-format off
#define ALL(X) \
  X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) \
  X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) \
  X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31) X(32) X(33) X(34) X(35) \
  X(36) X(37) X(38) X(39) X(40) X(41) X(42) X(43) X(44) X(45) X(46) X(47)
// clang-format on
ALL(WRAPPER)
#define ADDRESS(n) wrapper_##n,
static const Call kWrappers[kMost] = {ALL(ADDRESS)};

static Call wrap(const char* name, Call real) {
  pthread_mutex_lock(&g_mutex);
  int i = 0;
  while (i < g_count && strcmp(g_calls[i].name, name)) ++i;
  if (i == kMost || strlen(name) >= sizeof g_calls[i].name) {
    fprintf(stderr, "driver_faults: no room for %s\n", name);
    abort();
  }
  if (i == g_count) {
    strcpy(g_calls[i].name, name);
    ++g_count;
  }
  g_calls[i].real = real;
  pthread_mutex_unlock(&g_mutex);
  return kWrappers[i];
}

static int find_runtime(struct dl_phdr_info* info, size_t size, void* path) {
  (void)size;
  const char* slash = strrchr(info->dlpi_name, '/');
  if (strncmp(slash ? slash + 1 : info->dlpi_name, "libcudart.so", 12)) return 0;
  *(const char**)path = info->dlpi_name;
  return 1;
}

// The runtime's own function. RTLD_NEXT does not find it where torch loads the runtime.
static void* of_runtime(const char* name) {
  const char* path = NULL;
  dl_iterate_phdr(find_runtime, &path);
  void* runtime = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : NULL;
  void* function = runtime ? dlsym(runtime, name) : NULL;
  if (!function) {
    fprintf(stderr, "driver_faults: no loaded libcudart.so has %s\n", name);
    abort();
  }
  return function;
}

static int is_pystage(void* address) {
  Dl_info info;
  return dladdr(address, &info) && info.dli_fname && strstr(info.dli_fname, "pystage/_C");
}

// --- replacements for functions of the runtime --------------------------------------------------

int cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version,
                                     unsigned long long flags, int* found) {
  int (*real)(const char*, void**, unsigned, unsigned long long, int*) =
      of_runtime("cudaGetDriverEntryPointByVersion");
  const int ours = is_pystage(__builtin_return_address(0));
  int code;
  if (ours && intercept("cudaGetDriverEntryPointByVersion", &code)) return code;
  code = real(name, entry, version, flags, found);
  if (ours && code == 0 && *entry) *entry = (void*)wrap(name, (Call)*entry);
  return code;
}

int cudaGetFuncBySymbol(void** function, const void* symbol) {
  int (*real)(void**, const void*) = of_runtime("cudaGetFuncBySymbol");
  int code;
  if (is_pystage(__builtin_return_address(0)) && intercept("cudaGetFuncBySymbol", &code))
    return code;
  return real(function, symbol);
}

int cudaGetSymbolAddress(void** address, const void* symbol) {
  int (*real)(void**, const void*) = of_runtime("cudaGetSymbolAddress");
  int code;
  if (is_pystage(__builtin_return_address(0)) && intercept("cudaGetSymbolAddress", &code))
    return code;
  return real(address, symbol);
}

// --- for the test, through ctypes ---------------------------------------------------------------

// The nth call of that name from now on (of any name, if empty) is not made and returns the code.
// kLost: later calls that need the device are not made either. kDrop: the call returns success.
void faults_arm(const char* name, int nth, int code, int mode) {
  pthread_mutex_lock(&g_mutex);
  strncpy(g_name, name, sizeof g_name - 1);
  g_after = nth;
  g_code = code;
  g_mode = (enum Mode)mode;
  g_lost = 0;
  g_failed[0] = 0;
  pthread_mutex_unlock(&g_mutex);
}

// The name of the call that was caught, empty if none was.
const char* faults_caught(void) { return g_failed; }

// Ends the failures. Returns the same as faults_caught().
const char* faults_clear(void) {
  pthread_mutex_lock(&g_mutex);
  g_after = g_lost = 0;
  pthread_mutex_unlock(&g_mutex);
  return g_failed;
}

long faults_succeeded(const char* name) {
  for (int i = 0; i < g_count; ++i)
    if (!strcmp(g_calls[i].name, name))
      return __atomic_load_n(&g_calls[i].succeeded, __ATOMIC_RELAXED);
  return 0;
}

int faults_count(void) { return g_count; }
const char* faults_name(int i) { return g_calls[i].name; }

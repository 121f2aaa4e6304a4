// Stands in for CUDA's driver: takes any image whose first byte is not 'x', has one kernel, "known",
// and keeps what it was last asked to launch.
#include <cstdint>
#include <cstring>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
int64_t last_launch[6];  // blocks, threads, shared bytes, stream, the first two addresses
int shared_bytes_allowed;
}  // namespace

FAKE_EXPORT int cuLibraryLoadData(void** library, const void* image, void*, void*, unsigned, void*,
                                  void*, unsigned) {
  *library = last_launch;
  return static_cast<const char*>(image)[0] == 'x' ? 200 : 0;
}

FAKE_EXPORT int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = library;
  return std::strcmp(name, "known") == 0 ? 0 : 500;
}

FAKE_EXPORT int cuKernelSetAttribute(int attribute, int value, void*, int) {
  if (attribute != 8) return 1;
  shared_bytes_allowed = value;
  return 0;
}

FAKE_EXPORT int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}

FAKE_EXPORT int cuLaunchKernel(void*, unsigned blocks, unsigned, unsigned, unsigned threads,
                               unsigned, unsigned, unsigned shared_bytes, void* stream,
                               void** parameters, void**) {
  if (shared_bytes > 48 * 1024 && static_cast<int>(shared_bytes) > shared_bytes_allowed) return 701;
  last_launch[0] = blocks;
  last_launch[1] = threads;
  last_launch[2] = shared_bytes;
  last_launch[3] = reinterpret_cast<int64_t>(stream);
  for (int i = 0; i < 2; ++i) {
    last_launch[4 + i] = reinterpret_cast<int64_t>(*static_cast<void**>(parameters[i]));
  }
  return 0;
}

FAKE_EXPORT const int64_t* fake_last_launch() { return last_launch; }

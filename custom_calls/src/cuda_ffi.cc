// The XLA FFI handler that launches a CUDA kernel on XLA's stream, and the entry that loads kernels.
//
// Kernels come as machine code that NVRTC made on this machine, so nothing of CUDA is needed to build
// this library: the driver's few functions are found at run time.
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "custom_calls.h"
#include "dynamic_library.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;

// CUDA's driver API, as far as it is used; cuda.h has the types.
using CudaResult = int;
using CudaStream = struct CudaStreamOpaque*;
using CudaLibrary = struct CudaLibraryOpaque*;
using CudaKernel = struct CudaKernelOpaque*;

struct Driver {
  CudaResult (*library_load_data)(CudaLibrary*, const void*, void*, void*, unsigned, void*, void*,
                                  unsigned) = nullptr;
  CudaResult (*library_get_kernel)(CudaKernel*, CudaLibrary, const char*) = nullptr;
  CudaResult (*kernel_set_attribute)(int, int, CudaKernel, int) = nullptr;
  CudaResult (*context_get_device)(int*) = nullptr;
  CudaResult (*launch_kernel)(CudaKernel, unsigned, unsigned, unsigned, unsigned, unsigned,
                              unsigned, unsigned, CudaStream, void**, void**) = nullptr;
  std::string missing;  // why it cannot be used, or nothing
};

constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr unsigned kDefaultSharedBytes = 48 * 1024;
// CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE and _END
void* const kParameterBuffer = reinterpret_cast<void*>(1);
void* const kParameterBytes = reinterpret_cast<void*>(2);
void* const kParametersEnd = nullptr;

Driver open_driver(const char* path) {
  Driver driver;
  DynamicLibrary library(path);
  library.find("cuLibraryLoadData", driver.library_load_data);
  library.find("cuLibraryGetKernel", driver.library_get_kernel);
  library.find("cuKernelSetAttribute", driver.kernel_set_attribute);
  library.find("cuCtxGetDevice", driver.context_get_device);
  library.find("cuLaunchKernel", driver.launch_kernel);
  driver.missing = library.problem();
  return driver;
}

// The kernels of this process by their names. They stay until it ends, since a compiled program
// may launch one at any time.
struct Kernels {
  std::mutex mutex;
  Driver driver;
  bool is_open = false;
  std::map<std::string, CudaKernel> by_name;
};

Kernels& kernels() {
  static Kernels* const all = new Kernels;
  return *all;
}

// The kernel gets the addresses of all arguments and results, each that many bytes further on as
// `offsets` says.
ffi::Error launch_handler(CudaStream stream, ffi::RemainingArgs arguments,
                          ffi::RemainingRets results, std::string_view kernel, int64_t blocks,
                          int64_t threads, int64_t shared_bytes,
                          ffi::Span<const int64_t> offsets) {
  const std::string name(kernel);
  CudaKernel function = nullptr;
  Driver driver;
  {
    Kernels& all = kernels();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.by_name.find(name);
    if (found != all.by_name.end()) function = found->second;
    driver = all.driver;
  }
  if (function == nullptr) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "gpt2_jax_cuda_launch: expected a kernel that was loaded, got " + name);
  }
  std::vector<char*> addresses;
  for (size_t i = 0; i < arguments.size(); ++i) {
    addresses.push_back(static_cast<char*>(arguments.get<ffi::AnyBuffer>(i)->untyped_data()));
  }
  for (size_t i = 0; i < results.size(); ++i) {
    addresses.push_back(static_cast<char*>((*results.get<ffi::AnyBuffer>(i))->untyped_data()));
  }
  if (offsets.size() != addresses.size()) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "gpt2_jax_cuda_launch: expected an offset for each of " +
                          std::to_string(addresses.size()) + " buffers, got " +
                          std::to_string(offsets.size()));
  }
  for (size_t i = 0; i < addresses.size(); ++i) addresses[i] += offsets[i];
  // In one block of memory, so that a kernel can take several of them as one array.
  size_t bytes = addresses.size() * sizeof(char*);
  void* parameters[] = {kParameterBuffer, addresses.data(), kParameterBytes, &bytes,
                        kParametersEnd};
  CudaResult failure = 0;
  if (shared_bytes > kDefaultSharedBytes) {
    int device = 0;
    failure = driver.context_get_device(&device);
    if (failure == 0) {
      failure = driver.kernel_set_attribute(kMaxDynamicSharedBytes, static_cast<int>(shared_bytes),
                                            function, device);
    }
  }
  if (failure == 0 && blocks > 0) {
    failure = driver.launch_kernel(function, static_cast<unsigned>(blocks), 1, 1,
                                   static_cast<unsigned>(threads), 1, 1,
                                   static_cast<unsigned>(shared_bytes), stream,
                                   nullptr, parameters);
  }
  if (failure != 0) {
    return ffi::Error(ffi::ErrorCode::kInternal, "gpt2_jax_cuda_launch: " + name +
                                                     ": expected to launch, got CUDA's error " +
                                                     std::to_string(failure));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gpt2_jax

const char* gpt2_jax_cuda_load(const char* driver, const char* name, const char* symbol,
                               const void* image) {
  using namespace gpt2_jax;
  static thread_local std::string problem;
  Kernels& all = kernels();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (!all.is_open) {
    all.driver = open_driver(driver);
    all.is_open = true;
  }
  problem = all.driver.missing;
  if (!problem.empty()) return problem.c_str();
  if (all.by_name.count(name) > 0) return nullptr;
  CudaLibrary library = nullptr;
  CudaKernel kernel = nullptr;
  CudaResult failure =
      all.driver.library_load_data(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (failure == 0) failure = all.driver.library_get_kernel(&kernel, library, symbol);
  if (failure != 0) {
    problem = std::string(symbol) + ": CUDA's error " + std::to_string(failure);
    return problem.c_str();
  }
  all.by_name[name] = kernel;
  return nullptr;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_cuda_launch, gpt2_jax::guarded<gpt2_jax::launch_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<gpt2_jax::CudaStream>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("kernel")
                                  .Attr<int64_t>("blocks")
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("shared_bytes")
                                  .Attr<xla::ffi::Span<const int64_t>>("offsets"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

// Apple's Accelerate: the only way that Apple documents to use its CPUs' matrix units (AMX, SME).
//
// Accelerate has threads of its own and distributes the matrix units among them, so it may be
// called from any thread. VECLIB_MAXIMUM_THREADS still applies.
#include "rungs/rungs.h"

#if defined(__APPLE__)

#include <dlfcn.h>

#include "rungs/cblas.h"

namespace gpt2_jax {
namespace {

constexpr char kPath[] = "/System/Library/Frameworks/Accelerate.framework/Accelerate";

// BLAS_THREADING of vecLib's thread_api.h.
using SetThreading = int (*)(unsigned);
using GetThreading = unsigned (*)();
constexpr unsigned kSingleThreaded = 1;

struct Accelerate {
  CblasSgemm sgemm = nullptr;
  // nullptr before macOS 15. The setting applies to the calling thread only.
  SetThreading set_threading = nullptr;
  GetThreading get_threading = nullptr;
  std::string problem;
};

Accelerate load() {
  Accelerate result;
  void* const library = dlopen(kPath, RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) {
    result.problem = std::string("it cannot be loaded: ") + dlerror();
    return result;
  }
  // The interface of macOS 13.3 and newer comes first, then the older one.
  for (const char* name : {"cblas_sgemm$NEWLAPACK", "cblas_sgemm"}) {
    result.sgemm = reinterpret_cast<CblasSgemm>(dlsym(library, name));
    if (result.sgemm != nullptr) break;
  }
  if (result.sgemm == nullptr) result.problem = std::string(kPath) + " has no cblas_sgemm";
  result.set_threading = reinterpret_cast<SetThreading>(dlsym(library, "BLASSetThreading"));
  result.get_threading = reinterpret_cast<GetThreading>(dlsym(library, "BLASGetThreading"));
  return result;
}

const Accelerate& accelerate() {
  static const Accelerate* const instance = new Accelerate(load());
  return *instance;
}

// Keeps Accelerate on the calling thread for this object's lifetime, then restores the setting.
// Never raises the number of threads above the user's setting.
class OneThread {
 public:
  explicit OneThread(bool wanted)
      : active_(wanted && accelerate().set_threading && accelerate().get_threading) {
    if (!active_) return;
    previous_ = accelerate().get_threading();
    accelerate().set_threading(kSingleThreaded);
  }
  ~OneThread() {
    if (active_) accelerate().set_threading(previous_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const bool active_;
  unsigned previous_ = 0;
};

}  // namespace

std::string accelerate_unavailable() { return accelerate().problem; }

void run_accelerate(const Matmul& matmul, Executor& executor) {
  const OneThread one_thread(executor.num_threads() == 1);
  cblas_matmul(matmul, accelerate().sgemm, executor);
}

}  // namespace gpt2_jax

#else

namespace gpt2_jax {

std::string accelerate_unavailable() { return "only macOS has it"; }

void run_accelerate(const Matmul&, Executor&) {}

}  // namespace gpt2_jax

#endif

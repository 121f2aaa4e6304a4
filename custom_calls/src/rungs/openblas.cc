// OpenBLAS, as the PyPI package scipy-openblas32 ships it: every name starts with scipy_.
#include <dlfcn.h>

#include <algorithm>
#include <mutex>

#include "custom_calls.h"
#include "rungs/cblas.h"
#include "rungs/rungs.h"

namespace gpt2_jax {
namespace {

using SetNumThreads = void (*)(int);
using GetNumThreads = int (*)();

struct OpenBlas {
  // Held for a whole product. OpenBLAS is meant to compute one threaded product at a time, but some
  // releases lock only against products of the same transposition (OpenBLAS issue 5836). No
  // deadlock: its holder waits for OpenBLAS's threads only, never for one of XLA's pool.
  std::mutex mutex;
  CblasSgemm sgemm = nullptr;
  SetNumThreads set_num_threads = nullptr;
  int threads = 0;      // the number that was set last
  int max_threads = 0;  // the number of CPUs, or OPENBLAS_NUM_THREADS
  std::string problem = "scipy-openblas32 is not installed: pip install scipy-openblas32";

  void load(const char* path) {
    void* const library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      problem = std::string("it cannot be loaded: ") + dlerror();
      return;
    }
    sgemm = reinterpret_cast<CblasSgemm>(dlsym(library, "scipy_cblas_sgemm"));
    set_num_threads =
        reinterpret_cast<SetNumThreads>(dlsym(library, "scipy_openblas_set_num_threads"));
    const auto get_num_threads =
        reinterpret_cast<GetNumThreads>(dlsym(library, "scipy_openblas_get_num_threads"));
    if (!sgemm || !set_num_threads || !get_num_threads) {
      problem = std::string(path) + " is not the OpenBLAS of scipy-openblas32";
      return;
    }
    threads = max_threads = get_num_threads();
    problem.clear();
  }
};

// Never destroyed: XLA's threads may still be computing while the process exits.
OpenBlas& openblas() {
  static OpenBlas* const instance = new OpenBlas;
  return *instance;
}

}  // namespace

std::string openblas_unavailable() {
  std::lock_guard<std::mutex> lock(openblas().mutex);
  return openblas().problem;
}

void run_openblas(const Matmul& matmul, Executor& executor) {
  OpenBlas& library = openblas();
  std::lock_guard<std::mutex> lock(library.mutex);
  const int threads = std::min(executor.num_threads(), library.max_threads);
  if (threads != library.threads) library.set_num_threads(library.threads = threads);
  cblas_matmul(matmul, library.sgemm, executor);
}

}  // namespace gpt2_jax

void gpt2_jax_use_openblas(const char* path) {
  std::lock_guard<std::mutex> lock(gpt2_jax::openblas().mutex);
  if (!gpt2_jax::openblas().problem.empty()) gpt2_jax::openblas().load(path);
}

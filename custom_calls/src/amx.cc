#include "amx.h"

#include <cerrno>
#include <cstring>

#include "kernels/kernel.h"
#include "matmul.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gpt2_jax {
namespace {

// The features that the kernel and its packing use.
constexpr CpuFeatures kNeeded = kAvx512Code | kAvx512bf16 | kAmxTile | kAmxBf16 | kAmxInt8;

int request_permission_of_linux() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>
  constexpr long kTileData = 18;               // the state component of the tile registers
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

}  // namespace

std::string amx_unavailable(CpuFeatures features, int (*request_permission)()) {
  if (amx_kernel(Precision::kBF16_BF16_F32) == nullptr) {
    return "this build has no AMX kernel: it needs x86-64 and a compiler that knows -mamx-bf16";
  }
  if (!has_all(features, kNeeded)) {
    return "needs CPU features that are not here, or masked by GPT2_JAX_CPU_FEATURES: " +
           cpu_feature_names(kNeeded & ~features);
  }
  const int error = request_permission();
  if (error != 0) {
    return std::string(
               "the operating system refuses the tile registers "
               "(arch_prctl(ARCH_REQ_XCOMP_PERM)): ") +
           std::strerror(error);
  }
  return "";
}

std::string amx_unavailable() {
  static const std::string reason = amx_unavailable(cpu_features(), request_permission_of_linux);
  return reason;
}

}  // namespace gpt2_jax

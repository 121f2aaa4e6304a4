// The mask of CPU features. ctest runs this with GPT2_JAX_CPU_FEATURES set and unset.
#include <cstdlib>
#include <string>

#include "adamw/adamw.h"
#include "check.h"
#include "cpu_features.h"
#include "kernels/kernel.h"
#include "rows/rows.h"

namespace gpt2_jax {
namespace {

void test_parsing() {
  std::string unknown;
  CHECK(parse_cpu_features("avx2,fma", &unknown) == (kAvx2 | kFma), "");
  CHECK(parse_cpu_features(" avx512f , neon,", &unknown) == (kAvx512f | kNeon), "");
  CHECK(parse_cpu_features("none", &unknown) == 0, "");
  CHECK(unknown.empty(), unknown);
  CHECK(parse_cpu_features("avx2,mmx,avx3", &unknown) == kAvx2, "");
  CHECK(unknown == "mmx,avx3", unknown);
  CHECK(cpu_feature_names(kFma | kAvx2) == "avx2,fma", cpu_feature_names(kFma | kAvx2));
}

void test_kernel_choice() {
  CHECK(std::string(best_kernel(0).name) == "f32_4x8_generic", best_kernel(0).name);
  // A feature alone is not enough for a kernel that needs two.
  CHECK(std::string(best_kernel(kAvx2).name) == "f32_4x8_generic", best_kernel(kAvx2).name);
#if defined(__x86_64__)
  CHECK(std::string(best_kernel(kAvx2 | kFma).name) == "f32_6x16_avx2", "");
  CHECK(std::string(best_kernel(kAvx2Code | kAvx512Code).name) == "f32_14x32_avx512", "");
#elif defined(__aarch64__)
  CHECK(std::string(best_kernel(kNeon).name) == "f32_8x12_neon", "");
#endif
}

void test_choice_of_loops() {
  for (const CpuFeatures features : {0u, ~0u & ~(kAvx512f | kFma), ~0u & ~(kAvx512f | kAvx2)}) {
    CHECK(&best_row_kernels(features) == &kRowKernelsGeneric, cpu_feature_names(features));
    CHECK(best_adamw_kernel(features) == adamw_generic, cpu_feature_names(features));
  }
#if defined(__x86_64__)
  for (const CpuFeature missing : {kAvx512f, kAvx512bw, kAvx512vl}) {
    CHECK(&best_row_kernels(~missing) == &kRowKernelsAvx2, cpu_feature_names(missing));
    CHECK(best_adamw_kernel(~missing) == adamw_avx2, cpu_feature_names(missing));
  }
  CHECK(&best_row_kernels(kAvx512Code) == &kRowKernelsAvx512, "");
  CHECK(best_adamw_kernel(kAvx512Code) == adamw_avx512, "");
#endif
}

void test_environment() {
  const char* mask = std::getenv("GPT2_JAX_CPU_FEATURES");
  const CpuFeatures allowed =
      mask == nullptr || *mask == '\0' ? ~0u : parse_cpu_features(mask, nullptr);
  CHECK(cpu_features() == (cpu_features_seen() & allowed), cpu_feature_names(cpu_features()));
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  using namespace gpt2_jax;
  test_parsing();
  test_kernel_choice();
  test_choice_of_loops();
  test_environment();
  return report("test_cpu_features");
}

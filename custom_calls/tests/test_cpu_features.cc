// The mask of CPU features. ctest runs this with GPT2_JAX_CPU_FEATURES set and unset.
#include <cstdlib>
#include <string>

#include "adamw/adamw.h"
#include "check.h"
#include "cpu_features.h"
#include "kernels/kernel.h"
#include "matmul.h"
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

std::string kernel_for(CpuFeatures features, Precision precision = Precision::kF32_F32_F32,
                       bool dot_products_pay = true) {
  return best_kernel(features, precision, dot_products_pay).name;
}

void test_kernel_choice() {
  CHECK(kernel_for(0) == "f32_4x8_generic", kernel_for(0));
  // A feature alone is not enough for a kernel that needs two.
  CHECK(kernel_for(kAvx2) == "f32_4x8_generic", kernel_for(kAvx2));
#if defined(__x86_64__)
  CHECK(kernel_for(kAvx2Code) == "f32_6x16_avx2", kernel_for(kAvx2Code));
  const CpuFeatures wide = kAvx2Code | kAvx512Code;
  CHECK(kernel_for(wide) == "f32_14x32_avx512", kernel_for(wide));
  CHECK(kernel_for(wide & ~kAvx512bw) == "f32_6x16_avx2", kernel_for(wide & ~kAvx512bw));
  CHECK(kernel_for(wide | kAvx512bf16) == "f32_14x32_avx512", "float32 is not rounded");
#if defined(GPT2_JAX_HAS_AMX)
  const Precision narrow = Precision::kBF16_BF16_F32;
  const std::string dot = kernel_for(wide | kAvx512bf16, narrow);
  CHECK(dot == "bf16_32x32_avx512bf16", dot);
  CHECK(kernel_for(wide, narrow) == "f32_14x32_avx512", kernel_for(wide, narrow));
  const std::string slow = kernel_for(wide | kAvx512bf16, narrow, false);
  CHECK(slow == "f32_14x32_avx512", slow);
#endif
#elif defined(__aarch64__)
  CHECK(kernel_for(kNeon) == "f32_8x12_neon", kernel_for(kNeon));
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

#include "registry.h"

#include "amx.h"
#include "operand.h"
#include "rungs/cblas.h"
#include "rungs/rungs.h"

namespace gpt2_jax {
namespace {

std::string always_available() { return ""; }

// Rungs that compute in float32 accept two precisions: float32 products of bfloat16 operands are
// exact, so one kernel serves both. The other precisions imitate float32 on hardware that
// multiplies only bfloat16 or bytes; in float32 they would be slower and less exact.
std::string refuse_split_precision(const Matmul& matmul) {
  if (matmul.precision == Precision::kF32_F32_F32 ||
      matmul.precision == Precision::kBF16_BF16_F32) {
    return "";
  }
  return std::string(name(matmul.precision)) +
         " splits float32 for units of bfloat16 or bytes; this implementation computes in float32: "
         "ask for F32_F32_F32 or BF16_BF16_F32";
}

std::string refuse_float32_products(const Matmul& matmul) {
  if (matmul.precision != Precision::kF32_F32_F32) return "";
  return "AMX multiplies bfloat16 and bytes, not F32_F32_F32: ask for BF16_BF16_F32, or for "
         "float32's precision from parts BF16_BF16_F32_X3, BF16_BF16_F32_X6 or S8_S8_S32_X6";
}

std::string refuse_split_precision_or_size(const Matmul& matmul) {
  const std::string reason = refuse_split_precision(matmul);
  return reason.empty() ? refuse_cblas(matmul) : reason;
}

}  // namespace

const std::vector<Implementation>& implementations() {
  static const std::vector<Implementation> ladder = {
      {"naive", always_available, refuse_split_precision, run_naive},
      {"blocked", always_available, refuse_split_precision, run_blocked},
      {"simd", always_available, refuse_split_precision, run_simd, /*sums_squares=*/true},
      {"threaded", always_available, refuse_split_precision, run_threaded, /*sums_squares=*/true},
      {"amx", amx_unavailable, refuse_float32_products, run_amx, /*sums_squares=*/true},
      {"accelerate", accelerate_unavailable, refuse_split_precision_or_size, run_accelerate,
       /*sums_squares=*/false, /*own_threads=*/true},
      {"openblas", openblas_unavailable, refuse_split_precision_or_size, run_openblas,
       /*sums_squares=*/false, /*own_threads=*/true},
  };
  return ladder;
}

void multiply(const Implementation& implementation, const Matmul& matmul, Executor& executor) {
  const bool nothing_to_multiply = matmul.m == 0 || matmul.n == 0 || matmul.k == 0;
  if (nothing_to_multiply) {
    for (int64_t i = 0; i < matmul.m; ++i) {
      for (int64_t j = 0; j < matmul.n; ++j) store_result(matmul, i, j, 0);
    }
  } else {
    implementation.run(matmul, executor);
  }
  if (matmul.sum_of_squares != nullptr && (nothing_to_multiply || !implementation.sums_squares)) {
    add_up_squares(matmul, executor);
  }
}

const Implementation* find_implementation(std::string_view name) {
  for (const Implementation& implementation : implementations()) {
    if (name == implementation.name) return &implementation;
  }
  return nullptr;
}

std::string implementation_names() {
  std::string names;
  for (const Implementation& implementation : implementations()) {
    if (!names.empty()) names += ", ";
    names += implementation.name;
  }
  return names;
}

}  // namespace gpt2_jax

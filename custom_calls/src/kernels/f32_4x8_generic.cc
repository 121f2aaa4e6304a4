// For any CPU: the compiler's own vectors of 4 floats, which are SSE2 on x86-64 and NEON on arm64.
// 8 of 16 registers hold sums.
#include <cstdint>

#include "kernels/kernel.h"

namespace gpt2_jax {
namespace {

typedef float Vector __attribute__((vector_size(16)));
// The same vector, for loads and stores at any alignment; may alias other types.
typedef float LooseVector __attribute__((vector_size(16), aligned(4), may_alias));

constexpr int kRows = 4;
constexpr int kVectors = 2;

}  // namespace

void f32_4x8_generic(int64_t depth, const float* a, const float* b, float* out, int64_t out_stride,
                     bool accumulate) {
  Vector sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < depth; ++p) {
    const LooseVector* row = reinterpret_cast<const LooseVector*>(b);
    const Vector b0 = row[0];
    const Vector b1 = row[1];
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] += a[i] * b0;
      sum[i][1] += a[i] * b1;
    }
    a += kRows;
    b += 4 * kVectors;
  }
  for (int i = 0; i < kRows; ++i) {
    LooseVector* row = reinterpret_cast<LooseVector*>(out + i * out_stride);
    for (int v = 0; v < kVectors; ++v) row[v] = accumulate ? row[v] + sum[i][v] : sum[i][v];
  }
}

}  // namespace gpt2_jax

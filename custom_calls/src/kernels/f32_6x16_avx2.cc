// AVX2 + FMA, 16 registers: 12 for sums, two for a row of b, one for a broadcast element of a.
#include <immintrin.h>

#include <cstdint>

#include "kernels/kernel.h"

namespace gpt2_jax {
namespace {

constexpr int kRows = 6;

}  // namespace

void f32_6x16_avx2(int64_t depth, const float* a, const float* b, float* out, int64_t out_stride,
                   bool accumulate) {
  __m256 left[kRows], right[kRows];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    // The tile is written at the end: ask for it now. The write then finds it in L1.
    __builtin_prefetch(out + i * out_stride, 1);
    __builtin_prefetch(out + i * out_stride + 15, 1);
    left[i] = _mm256_setzero_ps();
    right[i] = _mm256_setzero_ps();
  }
  for (int64_t p = 0; p < depth; ++p) {
    const __m256 b_left = _mm256_loadu_ps(b);
    const __m256 b_right = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m256 a_i = _mm256_broadcast_ss(a + i);
      left[i] = _mm256_fmadd_ps(a_i, b_left, left[i]);
      right[i] = _mm256_fmadd_ps(a_i, b_right, right[i]);
    }
    a += kRows;
    b += 16;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    float* row = out + i * out_stride;
    if (accumulate) {
      left[i] = _mm256_add_ps(_mm256_loadu_ps(row), left[i]);
      right[i] = _mm256_add_ps(_mm256_loadu_ps(row + 8), right[i]);
    }
    _mm256_storeu_ps(row, left[i]);
    _mm256_storeu_ps(row + 8, right[i]);
  }
}

}  // namespace gpt2_jax

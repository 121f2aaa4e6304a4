// AVX-512F, 32 registers: 28 for sums, two for a row of b, one for a broadcast element of a.
#include <immintrin.h>

#include <cstdint>

#include "kernels/kernel.h"

namespace gpt2_jax {
namespace {

constexpr int kRows = 14;

}  // namespace

void f32_14x32_avx512(int64_t depth, const float* a, const float* b, float* out, int64_t out_stride,
                      bool accumulate) {
  __m512 left[kRows], right[kRows];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    // The tile is written at the end: ask for it now. The write then finds it in L1.
    __builtin_prefetch(out + i * out_stride, 1);
    __builtin_prefetch(out + i * out_stride + 16, 1);
    __builtin_prefetch(out + i * out_stride + 31, 1);
    left[i] = _mm512_setzero_ps();
    right[i] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < depth; ++p) {
    const __m512 b_left = _mm512_loadu_ps(b);
    const __m512 b_right = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const __m512 a_i = _mm512_set1_ps(a[i]);
      left[i] = _mm512_fmadd_ps(a_i, b_left, left[i]);
      right[i] = _mm512_fmadd_ps(a_i, b_right, right[i]);
    }
    a += kRows;
    b += 32;
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    float* row = out + i * out_stride;
    if (accumulate) {
      left[i] = _mm512_add_ps(_mm512_loadu_ps(row), left[i]);
      right[i] = _mm512_add_ps(_mm512_loadu_ps(row + 16), right[i]);
    }
    _mm512_storeu_ps(row, left[i]);
    _mm512_storeu_ps(row + 16, right[i]);
  }
}

}  // namespace gpt2_jax

// AVX2 + FMA, 16 registers: 12 for sums, two for a row of b, one for a broadcast element of a.
#include <immintrin.h>

#include <cstdint>

#include "kernels/kernel.h"
#include "kernels/prefetch_lines.h"

namespace gpt2_jax {
namespace {

constexpr int kLeftLanes = 6, kRightLanes = 16;

template <int kRows>
void multiply_rows(const PanelBlock& block) {
  const float* a = reinterpret_cast<const float*>(block.left);
  const float* b = reinterpret_cast<const float*>(block.right);
  __m256 left[kRows], right[kRows];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) left[i] = right[i] = _mm256_setzero_ps();
  for (int64_t p = 0; p < block.depth; ++p) {
    const __m256 b_left = _mm256_loadu_ps(b);
    const __m256 b_right = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m256 a_i = _mm256_broadcast_ss(a + i);
      left[i] = _mm256_fmadd_ps(a_i, b_left, left[i]);
      right[i] = _mm256_fmadd_ps(a_i, b_right, right[i]);
    }
    a += kLeftLanes;
    b += kRightLanes;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    float* row = block.sums + i * kRightLanes;
    if (block.accumulate) {
      left[i] = _mm256_add_ps(_mm256_loadu_ps(row), left[i]);
      right[i] = _mm256_add_ps(_mm256_loadu_ps(row + 8), right[i]);
    }
    _mm256_storeu_ps(row, left[i]);
    _mm256_storeu_ps(row + 8, right[i]);
  }
}

// Only the rows that exist are computed.
template <int kRows>
void multiply_at_most(const PanelBlock& block) {
  if (block.left_lanes >= kRows) return multiply_rows<kRows>(block);
  if constexpr (kRows > 1) multiply_at_most<kRows - 1>(block);
}

}  // namespace

void multiply_f32_6x16_avx2(const PanelBlock& block) {
  prefetch_lines(*block.prefetch, block.prefetch->lines_per_block);
  multiply_at_most<kLeftLanes>(block);
}

}  // namespace gpt2_jax

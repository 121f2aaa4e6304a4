// NEON (arm64), 32 registers: 24 for sums, three for a row of b, two for a column of a.
#include <arm_neon.h>

#include <cstdint>

#include "kernels/kernel.h"
#include "kernels/prefetch_lines.h"

// The lane number must be a constant in the instruction, so the rows are written out one by one.
#define GPT2_JAX_ROW(row, a_half, lane)                         \
  sum[row][0] = vfmaq_laneq_f32(sum[row][0], b0, a_half, lane); \
  sum[row][1] = vfmaq_laneq_f32(sum[row][1], b1, a_half, lane); \
  sum[row][2] = vfmaq_laneq_f32(sum[row][2], b2, a_half, lane)

namespace gpt2_jax {

void multiply_f32_8x12_neon(const PanelBlock& block) {
  prefetch_lines(*block.prefetch, block.prefetch->lines_per_block);
  const float* a = reinterpret_cast<const float*>(block.left);
  const float* b = reinterpret_cast<const float*>(block.right);
  float32x4_t sum[8][3];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    sum[i][0] = sum[i][1] = sum[i][2] = vdupq_n_f32(0);
  }
  for (int64_t p = 0; p < block.depth; ++p) {
    const float32x4_t a_low = vld1q_f32(a);
    const float32x4_t a_high = vld1q_f32(a + 4);
    const float32x4_t b0 = vld1q_f32(b);
    const float32x4_t b1 = vld1q_f32(b + 4);
    const float32x4_t b2 = vld1q_f32(b + 8);
    GPT2_JAX_ROW(0, a_low, 0);
    GPT2_JAX_ROW(1, a_low, 1);
    GPT2_JAX_ROW(2, a_low, 2);
    GPT2_JAX_ROW(3, a_low, 3);
    GPT2_JAX_ROW(4, a_high, 0);
    GPT2_JAX_ROW(5, a_high, 1);
    GPT2_JAX_ROW(6, a_high, 2);
    GPT2_JAX_ROW(7, a_high, 3);
    a += 8;
    b += 12;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    float* row = block.sums + i * 12;
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) {
      if (block.accumulate) sum[i][v] = vaddq_f32(vld1q_f32(row + 4 * v), sum[i][v]);
      vst1q_f32(row + 4 * v, sum[i][v]);
    }
  }
}

}  // namespace gpt2_jax

// A 4 x 4 transposition in registers, with instructions that every CPU of the architecture has.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace gpt2_jax {

// to[j * to_stride + i] = from[i * from_stride + j]
inline void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(__x86_64__)
  __m128 row0 = _mm_loadu_ps(from);
  __m128 row1 = _mm_loadu_ps(from + from_stride);
  __m128 row2 = _mm_loadu_ps(from + 2 * from_stride);
  __m128 row3 = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(row0, row1, row2, row3);
  _mm_storeu_ps(to, row0);
  _mm_storeu_ps(to + to_stride, row1);
  _mm_storeu_ps(to + 2 * to_stride, row2);
  _mm_storeu_ps(to + 3 * to_stride, row3);
#elif defined(__aarch64__)
  const float32x4_t row0 = vld1q_f32(from);
  const float32x4_t row1 = vld1q_f32(from + from_stride);
  const float32x4_t row2 = vld1q_f32(from + 2 * from_stride);
  const float32x4_t row3 = vld1q_f32(from + 3 * from_stride);
  // Interleave rows 0 and 2, and 1 and 3; then interleave the results.
  const float32x4x2_t even = vzipq_f32(row0, row2);
  const float32x4x2_t odd = vzipq_f32(row1, row3);
  const float32x4x2_t first = vzipq_f32(even.val[0], odd.val[0]);
  const float32x4x2_t second = vzipq_f32(even.val[1], odd.val[1]);
  vst1q_f32(to, first.val[0]);
  vst1q_f32(to + to_stride, first.val[1]);
  vst1q_f32(to + 2 * to_stride, second.val[0]);
  vst1q_f32(to + 3 * to_stride, second.val[1]);
#else
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

}  // namespace gpt2_jax

// Vectors of four floats, with instructions that every CPU of the architecture has, as panels.inc
// asks for them. Internal linkage: each file that includes this is compiled with flags of its own.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace gpt2_jax {
namespace {

typedef float Vector __attribute__((vector_size(16)));
constexpr int kVectorLanes = 4;

inline void transpose(Vector (&row)[4]) {
#if defined(__x86_64__)
  __m128 row0 = (__m128)row[0], row1 = (__m128)row[1], row2 = (__m128)row[2],
         row3 = (__m128)row[3];
  _MM_TRANSPOSE4_PS(row0, row1, row2, row3);
  row[0] = (Vector)row0, row[1] = (Vector)row1, row[2] = (Vector)row2, row[3] = (Vector)row3;
#elif defined(__aarch64__)
  // Interleave rows 0 and 2, and 1 and 3; then interleave the results.
  const float32x4x2_t even = vzipq_f32((float32x4_t)row[0], (float32x4_t)row[2]);
  const float32x4x2_t odd = vzipq_f32((float32x4_t)row[1], (float32x4_t)row[3]);
  const float32x4x2_t first = vzipq_f32(even.val[0], odd.val[0]);
  const float32x4x2_t second = vzipq_f32(even.val[1], odd.val[1]);
  row[0] = (Vector)first.val[0], row[1] = (Vector)first.val[1];
  row[2] = (Vector)second.val[0], row[3] = (Vector)second.val[1];
#else
  float from[4][4];
  __builtin_memcpy(from, row, sizeof from);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) row[i][j] = from[j][i];
  }
#endif
}

template <int kCount>
inline Vector load_first(const float* from) {
  static_assert(kCount == 4, "");
  Vector values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}

// Four bfloat16, each in the upper half of its float's bits.
template <int kCount>
inline Vector load_first(const uint16_t* from) {
  static_assert(kCount == 4, "");
  typedef uint16_t Words __attribute__((vector_size(8)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  Words words;
  __builtin_memcpy(&words, from, sizeof words);
  return (Vector)(__builtin_convertvector(words, Bits) << 16);
}

template <int kCount>
inline void store_first(Vector values, float* to) {
  static_assert(kCount == 4, "");
  __builtin_memcpy(to, &values, sizeof values);
}

// `to` is a multiple of 16.
inline void stream(Vector values, float* to) {
#if defined(__x86_64__)
  _mm_stream_ps(to, (__m128)values);
#else
  __builtin_memcpy(to, &values, sizeof values);
#endif
}

}  // namespace
}  // namespace gpt2_jax

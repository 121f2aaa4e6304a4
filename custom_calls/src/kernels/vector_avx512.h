// AVX-512 registers: masks, transposition, partial loads and stores. Internal linkage: each file that
// includes this is compiled with flags of its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gpt2_jax {
namespace {

inline __mmask16 first16(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Transposes 16 x 16 dwords: exchanges dwords, then pairs of dwords, then quarters of registers.
inline void transpose(__m512i (&row)[16]) {
  __m512i pair[16], quad[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  // Quarter q of quad[4 g + j] will hold column 4 q + j of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    quad[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
    quad[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
    quad[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    quad[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    // even: quarters 0 and 2 of two registers; odd: quarters 1 and 3.
    const __m512i even_low = _mm512_shuffle_i32x4(quad[j], quad[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(quad[j], quad[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(quad[8 + j], quad[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(quad[8 + j], quad[12 + j], 0xdd);
    row[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    row[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    row[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    row[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// What panels.inc asks of an instruction set.
typedef float Vector __attribute__((vector_size(64)));
constexpr int kVectorLanes = 16;

inline void transpose(Vector (&rows)[16]) {
  __m512i registers[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) registers[i] = (__m512i)rows[i];
  transpose(registers);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = (Vector)registers[i];
}

// The first kCount floats; zeros after them.
template <int kCount>
inline Vector load_first(const float* from) {
  return (Vector)_mm512_maskz_loadu_ps(first16(kCount), from);
}

// The first kCount bfloat16, each in the upper half of its float's bits.
template <int kCount>
inline Vector load_first(const uint16_t* from) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(kCount), from));
  return (Vector)_mm512_slli_epi32(words, 16);
}

template <int kCount>
inline void store_first(Vector values, float* to) {
  _mm512_mask_storeu_ps(to, first16(kCount), (__m512)values);
}

// `to` is a multiple of 64.
inline void stream(Vector values, float* to) { _mm512_stream_ps(to, (__m512)values); }

}  // namespace
}  // namespace gpt2_jax

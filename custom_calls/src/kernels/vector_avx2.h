// AVX2 registers: transposition, partial loads and stores, as panels.inc asks for them. Internal
// linkage: each file that includes this is compiled with flags of its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gpt2_jax {
namespace {

typedef float Vector __attribute__((vector_size(32)));
constexpr int kVectorLanes = 8;

// Transposes 8 x 8: exchanges floats, then pairs of floats, then halves of registers.
inline void transpose(Vector (&row)[8]) {
  __m256 pair[8], quad[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps((__m256)row[i], (__m256)row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps((__m256)row[i], (__m256)row[i + 1]);
  }
  // Half h of quad[4 g + j] holds column 4 h + j of rows 4 g to 4 g + 3.
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    row[j] = (Vector)_mm256_permute2f128_ps(quad[j], quad[4 + j], 0x20);
    row[4 + j] = (Vector)_mm256_permute2f128_ps(quad[j], quad[4 + j], 0x31);
  }
}

// The first kCount floats, 6 or 8; zeros after them.
template <int kCount>
inline Vector load_first(const float* from) {
  static_assert(kCount == 6 || kCount == 8, "");
  if constexpr (kCount == 8) return (Vector)_mm256_loadu_ps(from);
  return (Vector)_mm256_maskload_ps(from, _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, 0, 0));
}

// The first kCount bfloat16, each in the upper half of its float's bits.
template <int kCount>
inline Vector load_first(const uint16_t* from) {
  static_assert(kCount == 6 || kCount == 8, "");
  __m128i words;
  if constexpr (kCount == 8) {
    words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  } else {
    int32_t last;
    __builtin_memcpy(&last, from + 4, 4);
    words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    words = _mm_insert_epi32(words, last, 2);
  }
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
}

template <int kCount>
inline void store_first(Vector values, float* to) {
  static_assert(kCount == 6 || kCount == 8, "");
  if constexpr (kCount == 8) {
    _mm256_storeu_ps(to, (__m256)values);
  } else {
    // Two stores: one under a mask takes many cycles on AMD's processors.
    _mm_storeu_ps(to, _mm256_castps256_ps128((__m256)values));
    const __m128 upper = _mm256_extractf128_ps((__m256)values, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 4), _mm_castps_si128(upper));
  }
}

// `to` is a multiple of 32.
inline void stream(Vector values, float* to) { _mm256_stream_ps(to, (__m256)values); }

}  // namespace
}  // namespace gpt2_jax

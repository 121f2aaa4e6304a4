// Packing as digits with AVX-512 (F, BW, VL).
//
// As in tiles_avx512.cc a tile is 16 registers of 16 dwords. Here the four bytes of a dword are
// four elements whose k are 16 apart. So the bytes of four loaded registers are combined by shifts
// and masks alone, without a shuffle.
#include <immintrin.h>

#include <cstdint>

#include "kernels/vector_avx512.h"
#include "kernels/tile_format.h"

namespace gpt2_jax {
namespace {

constexpr int kPerDword = 4;

template <bool kNarrow>
inline __m512 load(const void* data, int64_t index, __mmask16 mask) {
  if constexpr (kNarrow) {
    const __m256i words =
        _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  } else {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + index);
  }
}

// The larger of `largest` and the magnitudes of `values`, compared as bits: a NaN is the largest.
inline __m512i larger(__m512i largest, __m512 values) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  return _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(values), magnitude));
}

// The multipliers that turn the elements of 16 lanes into integers; sets the lanes' scales.
// `largest` has the bits of each lane's largest magnitude. The exponent is that of
// exponent_of_digits in tiles_portable.cc.
inline __m512 to_integers(__m512i largest, float* scales) {
  const __m512i bits = _mm512_add_epi32(largest, _mm512_set1_epi32(0x20000));
  const __m512i exponent = _mm512_min_epu32(
      _mm512_max_epu32(_mm512_srli_epi32(bits, 23), _mm512_set1_epi32(22)), _mm512_set1_epi32(255));
  const __m512i scale = _mm512_slli_epi32(_mm512_sub_epi32(exponent, _mm512_set1_epi32(1)), 23);
  const __mmask16 not_finite = _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32(0x7f800000));
  const __m512i nan = _mm512_set1_epi32(0x7fc00000);
  _mm512_storeu_si512(scales, _mm512_mask_mov_epi32(scale, not_finite, nan));
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(276), exponent), 23));
}

// The elements as integers: the first digit in bits 16 to 23, the last in bits 0 to 7.
inline __m512i digits_of(__m512 values, __m512 multiplier) {
  const __m512i raised = _mm512_set1_epi32(0x808080);
  const __m512i units = _mm512_cvtps_epi32(_mm512_mul_ps(values, multiplier));
  return _mm512_xor_si512(_mm512_add_epi32(units, raised), raised);
}

struct Dwords {
  __m512i digit[kMaxParts];
};

inline Dwords interleave(const __m512i (&of)[kPerDword]) {
  const __m512i outer = _mm512_set1_epi32(0x00ff00ff), last = _mm512_set1_epi32(0xff);
  const __m512i lower_half = _mm512_set1_epi32(0xffff);
  __m512i first_and_last[2], middle[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i even = of[2 * i], odd = of[2 * i + 1];
    first_and_last[i] = _mm512_or_si512(_mm512_and_si512(even, outer),
                                        _mm512_slli_epi32(_mm512_and_si512(odd, outer), 8));
    middle[i] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(even, 8), last),
                                _mm512_andnot_si512(outer, odd));
  }
  return {
      {_mm512_or_si512(_mm512_srli_epi32(first_and_last[0], 16),
                       _mm512_andnot_si512(lower_half, first_and_last[1])),
       _mm512_or_si512(_mm512_and_si512(middle[0], lower_half), _mm512_slli_epi32(middle[1], 16)),
       _mm512_or_si512(_mm512_and_si512(first_and_last[0], lower_half),
                       _mm512_slli_epi32(first_and_last[1], 16))}};
}

// One row of dwords for one step of 16 lanes.
//
//   kAlongK      lane `lane + row`, 64 k
//   not kAlongK  16 lanes, four k: row, row + 16, row + 32 and row + 48 of the step
template <bool kNarrow, bool kAlongK>
inline Dwords load_dwords(const PackSource& source, int64_t lanes, int64_t depth, int64_t lane,
                          int64_t k, int row, const float* multipliers, __m512 lanes_multiplier) {
  __m512i of[kPerDword];
#pragma GCC unroll 4
  for (int i = 0; i < kPerDword; ++i) {
    if constexpr (kAlongK) {
      const __mmask16 mask = lane + row < lanes ? first16(depth - k - 16 * i) : 0;
      const int64_t index = (lane + row) * source.lane_stride + k + 16 * i;
      of[i] = digits_of(load<kNarrow>(source.data, index, mask), _mm512_set1_ps(multipliers[row]));
    } else {
      const int64_t at = k + 16 * i + row;
      const __mmask16 mask = at < depth ? first16(lanes - lane) : 0;
      of[i] = digits_of(load<kNarrow>(source.data, lane + at * source.k_stride, mask),
                        lanes_multiplier);
    }
  }
  return interleave(of);
}

template <bool kNarrow, bool kAlongK>
inline __m512i largest_of(const PackSource& source, int64_t lanes, int64_t depth, int64_t lane) {
  __m512i largest = _mm512_setzero_si512();
  if constexpr (kAlongK) {
    alignas(64) uint32_t of_lane[kTileLanes] = {};
    for (int row = 0; row < kTileLanes && lane + row < lanes; ++row) {
      __m512i of_row = _mm512_setzero_si512();
      const int64_t index = (lane + row) * source.lane_stride;
      for (int64_t k = 0; k < depth; k += 16) {
        of_row = larger(of_row, load<kNarrow>(source.data, index + k, first16(depth - k)));
      }
      of_lane[row] = _mm512_reduce_max_epu32(of_row);
    }
    largest = _mm512_load_si512(of_lane);
  } else {
    const __mmask16 mask = first16(lanes - lane);
    for (int64_t k = 0; k < depth; ++k) {
      largest = larger(largest, load<kNarrow>(source.data, lane + k * source.k_stride, mask));
    }
  }
  return largest;
}

// kAlongK: memory runs along k, which is the order of left tiles. Otherwise it runs along the
// lanes, the order of right tiles. kTransposed: the tiles are for the other side.
template <bool kNarrow, bool kAlongK, bool kTransposed>
void pack(PackSource source, int64_t lanes, int64_t depth, unsigned char* packed) {
  const int64_t steps = (depth + kDigitDepth - 1) / kDigitDepth;
  const int64_t panel_bytes = steps * kDigitStepBytes + kScalesBytes;
  const int64_t all_lanes = (lanes + kPanelLanes - 1) / kPanelLanes * kPanelLanes;
  for (int64_t lane = 0; lane < all_lanes; lane += kTileLanes) {
    unsigned char* const panel = packed + lane / kPanelLanes * panel_bytes;
    const int64_t half = lane % kPanelLanes / kTileLanes;
    float* const scales =
        reinterpret_cast<float*>(panel + steps * kDigitStepBytes) + half * kTileLanes;
    const __m512 lanes_multiplier =
        to_integers(largest_of<kNarrow, kAlongK>(source, lanes, depth, lane), scales);
    alignas(64) float multipliers[kTileLanes];
    _mm512_store_ps(multipliers, lanes_multiplier);
    for (int64_t step = 0; step < steps; ++step) {
      unsigned char* const to = panel + step * kDigitStepBytes + half * kTileBytes;
      __m512i tile[kMaxParts][16];
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) {
        const Dwords dwords = load_dwords<kNarrow, kAlongK>(
            source, lanes, depth, lane, step * kDigitDepth, row, multipliers, lanes_multiplier);
#pragma GCC unroll 3
        for (int digit = 0; digit < kMaxParts; ++digit) {
          if constexpr (kTransposed) {
            tile[digit][row] = dwords.digit[digit];
          } else {
            _mm512_store_si512(to + digit * (2 * kTileBytes) + row * 64, dwords.digit[digit]);
          }
        }
      }
      if constexpr (kTransposed) {
#pragma GCC unroll 3
        for (int digit = 0; digit < kMaxParts; ++digit) {
          transpose(tile[digit]);
#pragma GCC unroll 16
          for (int row = 0; row < 16; ++row) {
            _mm512_store_si512(to + digit * (2 * kTileBytes) + row * 64, tile[digit][row]);
          }
        }
      }
    }
  }
}

template <bool kNarrow>
void pack_either(const PackSource& source, int64_t lanes, int64_t depth, Side side,
                 unsigned char* packed) {
  if (source.k_stride == 1) {
    side == Side::kLeft ? pack<kNarrow, true, false>(source, lanes, depth, packed)
                            : pack<kNarrow, true, true>(source, lanes, depth, packed);
  } else {
    side == Side::kRight ? pack<kNarrow, false, false>(source, lanes, depth, packed)
                             : pack<kNarrow, false, true>(source, lanes, depth, packed);
  }
}

}  // namespace

void pack_digits_avx512(const PackSource& source, int64_t lanes, int64_t depth, Side side, int,
                        unsigned char* packed) {
  source.narrow ? pack_either<true>(source, lanes, depth, side, packed)
                : pack_either<false>(source, lanes, depth, side, packed);
}

}  // namespace gpt2_jax

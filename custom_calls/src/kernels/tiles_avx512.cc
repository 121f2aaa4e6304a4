// Packing as bfloat16, and writing sums to the output, with AVX-512 (F, BW, VL, BF16).
//
// A tile is 16 registers of 16 dwords; a dword is a pair of k.
//
//   memory runs along   a register is loaded for   it is a row of
//   k                   each lane                  a left tile
//   the lanes           each pair of k             a right tile
//
// For a tile of the other side the 16 registers are transposed.
#include <immintrin.h>

#include <cstdint>

#include "kernels/vector_avx512.h"
#include "kernels/tile_format.h"

namespace gpt2_jax {
namespace {

__mmask32 first32(int64_t count) {
  return count >= 32 ? 0xffffffff : count <= 0 ? 0 : static_cast<__mmask32>((1u << count) - 1);
}

// One row of a tile for each part.
template <int kParts>
struct Rows {
  __m512i part[kParts];
};

// Splits 16 + 16 float32 into parts of bfloat16, `low` in the lower half of a register. Each part
// is made from the remainder that the parts before it leave.
template <int kParts>
inline Rows<kParts> split(__m512 low, __m512 high) {
  Rows<kParts> rows;
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    rows.part[part] = words;
    const __m512i low_words = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
    const __m512i high_words = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(low_words, 16)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(high_words, 16)));
  }
  return rows;
}

// Cuts 16 pairs into three parts; `even` is the lower word of a pair. Done by masks, subtractions
// and shifts: conversions and shuffles would all wait for one execution port.
inline Rows<3> cut(__m512 even, __m512 odd) {
  const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  Rows<3> rows;
#pragma GCC unroll 3
  for (int part = 0; part < 3; ++part) {
    const __m512i even_part = _mm512_and_si512(_mm512_castps_si512(even), upper_half);
    const __m512i odd_part = _mm512_and_si512(_mm512_castps_si512(odd), upper_half);
    rows.part[part] = _mm512_or_si512(_mm512_srli_epi32(even_part, 16), odd_part);
    even = _mm512_sub_ps(even, _mm512_castsi512_ps(even_part));
    odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(odd_part));
  }
  return rows;
}

// Loads up to 32 elements of one lane along k; zeros after the first `count`.
template <bool kNarrow, int kParts>
inline Rows<kParts> load_lane(const void* data, int64_t index, int64_t count) {
  if constexpr (kNarrow) {
    const uint16_t* from = static_cast<const uint16_t*>(data) + index;
    return {{_mm512_maskz_loadu_epi16(first32(count), from)}};
  } else if constexpr (kParts == 3) {
    const float* from = static_cast<const float*>(data) + index;
    const __m512 low = _mm512_maskz_loadu_ps(first16(count), from);
    const __m512 high = _mm512_maskz_loadu_ps(first16(count - 16), from + 16);
    const __m512i evens =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    return cut(_mm512_permutex2var_ps(low, evens, high), _mm512_permutex2var_ps(low, odds, high));
  } else {
    const float* from = static_cast<const float*>(data) + index;
    return split<kParts>(_mm512_maskz_loadu_ps(first16(count), from),
                         _mm512_maskz_loadu_ps(first16(count - 16), from + 16));
  }
}

// Loads one k of up to 16 lanes, paired with the next k if there is one; zeros after the first
// `lanes`.
template <bool kNarrow, int kParts>
inline Rows<kParts> load_pair(const void* data, int64_t index, int64_t k_stride, int64_t lanes,
                              bool has_next) {
  const __mmask16 mask = first16(lanes);
  const __mmask16 next_mask = has_next ? mask : 0;
  if constexpr (kNarrow) {
    const uint16_t* from = static_cast<const uint16_t*>(data) + index;
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next_mask, from + k_stride));
    return {{_mm512_or_si512(even, _mm512_slli_epi32(odd, 16))}};
  } else if constexpr (kParts == 3) {
    const float* from = static_cast<const float*>(data) + index;
    return cut(_mm512_maskz_loadu_ps(mask, from),
               _mm512_maskz_loadu_ps(next_mask, from + k_stride));
  } else {
    const float* from = static_cast<const float*>(data) + index;
    Rows<kParts> rows = split<kParts>(_mm512_maskz_loadu_ps(mask, from),
                                      _mm512_maskz_loadu_ps(next_mask, from + k_stride));
    // Words 0-15 belong to one k, 16-31 to the next: interleave them.
    const __m512i in_turn =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      rows.part[part] = _mm512_permutexvar_epi16(in_turn, rows.part[part]);
    }
    return rows;
  }
}

template <int kParts>
inline void store(const Rows<kParts>& rows, unsigned char* to) {
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    _mm512_store_si512(to + part * (2 * kTileBytes), rows.part[part]);
  }
}

// Sizes of a packed block, and the offset of a lane's tile in its first step.
struct Layout {
  int64_t step_bytes, panel_bytes;

  int64_t offset(int64_t lane) const {
    return lane / kPanelLanes * panel_bytes + lane / kTileLanes % 2 * kTileBytes;
  }
};

// Packs left tiles when memory runs along k: lane by lane.
template <bool kNarrow, int kParts>
void pack_lanes(PackSource source, int64_t lanes, int64_t all_lanes, int64_t depth, Layout layout,
                unsigned char* packed) {
  for (int64_t lane = 0; lane < all_lanes; ++lane) {
    unsigned char* to = packed + layout.offset(lane) + lane % kTileLanes * 64;
    const int64_t index = lane * source.lane_stride;
    const int64_t whole = lane < lanes ? depth / kTileDepth * kTileDepth : 0;
    for (int64_t k = 0; k < whole; k += kTileDepth, to += layout.step_bytes) {
      store(load_lane<kNarrow, kParts>(source.data, index + k, kTileDepth), to);
    }
    for (int64_t k = whole; k < depth; k += kTileDepth, to += layout.step_bytes) {
      store(load_lane<kNarrow, kParts>(source.data, index + k, lane < lanes ? depth - k : 0), to);
    }
  }
}

// Packs right tiles when memory runs along the lanes: one pair of k after another.
template <bool kNarrow, int kParts>
void pack_pairs(PackSource source, int64_t lanes, int64_t all_lanes, int64_t depth, Layout layout,
                unsigned char* packed) {
  const int64_t all_depth = (depth + kTileDepth - 1) / kTileDepth * kTileDepth;
  for (int64_t k = 0; k < all_depth; k += 2) {
    unsigned char* to = packed + k / kTileDepth * layout.step_bytes + k % kTileDepth / 2 * 64;
    const int64_t index = k * source.k_stride;
    const int64_t whole = k + 1 < depth ? lanes / kTileLanes * kTileLanes : 0;
    for (int64_t lane = 0; lane < whole; lane += kTileLanes) {
      store(
          load_pair<kNarrow, kParts>(source.data, index + lane, source.k_stride, kTileLanes, true),
          to + layout.offset(lane));
    }
    for (int64_t lane = whole; lane < all_lanes; lane += kTileLanes) {
      const int64_t count = k < depth ? lanes - lane : 0;
      store(load_pair<kNarrow, kParts>(source.data, index + lane, source.k_stride, count,
                                       k + 1 < depth),
            to + layout.offset(lane));
    }
  }
}

// pack_tile (below) for three parts: transposes once as float32, then cuts. That is less work than
// transposing each part.
template <bool kAlongK, bool kWhole>
inline void pack_tile_in_three(PackSource source, int64_t lane, int64_t k, int64_t lanes,
                               int64_t depth, unsigned char* to) {
  if constexpr (kWhole) {
    lanes = kTileLanes;
    depth = kTileDepth;
  }
  // The two registers to be transposed for each row:
  //
  //   kAlongK      k 0-15 and k 16-31 of a lane
  //   not kAlongK  the even and the odd k of 16 lanes
  __m512i half[2][16];
  const float* const from =
      static_cast<const float*>(source.data) + lane * source.lane_stride + k * source.k_stride;
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m512 row;
      if constexpr (kAlongK) {
        const __mmask16 mask = i < lanes ? first16(depth - 16 * part) : 0;
        row = _mm512_maskz_loadu_ps(mask, from + i * source.lane_stride + 16 * part);
      } else {
        const __mmask16 mask = 2 * i + part < depth ? first16(lanes) : 0;
        row = _mm512_maskz_loadu_ps(mask, from + (2 * i + part) * source.k_stride);
      }
      half[part][i] = _mm512_castps_si512(row);
    }
    transpose(half[part]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i even = kAlongK ? half[i / 8][2 * (i % 8)] : half[0][i];
    const __m512i odd = kAlongK ? half[i / 8][2 * (i % 8) + 1] : half[1][i];
    store(cut(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)), to + i * 64);
  }
}

// Packs one transposed tile, from element (lane, k) on. `lanes` and `depth` are those left in the
// source; they are ignored when the tile is whole.
template <bool kNarrow, int kParts, bool kAlongK, bool kWhole>
inline void pack_tile(PackSource source, int64_t lane, int64_t k, int64_t lanes, int64_t depth,
                      unsigned char* to) {
  if constexpr (kParts == 3) {
    return pack_tile_in_three<kAlongK, kWhole>(source, lane, k, lanes, depth, to);
  }
  if constexpr (kWhole) {
    lanes = kTileLanes;
    depth = kTileDepth;
  }
  __m512i tile[kParts][16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    Rows<kParts> rows;
    if constexpr (kAlongK) {
      rows = load_lane<kNarrow, kParts>(source.data, (lane + i) * source.lane_stride + k,
                                        i < lanes ? depth : 0);
    } else {
      rows =
          load_pair<kNarrow, kParts>(source.data, lane + (k + 2 * i) * source.k_stride,
                                     source.k_stride, 2 * i < depth ? lanes : 0, 2 * i + 1 < depth);
    }
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) tile[part][i] = rows.part[part];
  }
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    transpose(tile[part]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm512_store_si512(to + part * (2 * kTileBytes) + i * 64, tile[part][i]);
    }
  }
}

// Packs tile by tile and transposes each: right tiles when memory runs along k, else left tiles.
template <bool kNarrow, int kParts, bool kAlongK>
void pack_transposed(PackSource source, int64_t lanes, int64_t all_lanes, int64_t depth,
                     Layout layout, unsigned char* packed) {
  for (int64_t lane = 0; lane < all_lanes; lane += kTileLanes) {
    unsigned char* to = packed + layout.offset(lane);
    for (int64_t k = 0; k < depth; k += kTileDepth, to += layout.step_bytes) {
      const bool whole = lanes - lane >= kTileLanes && depth - k >= kTileDepth;
      const auto pack_one = whole ? pack_tile<kNarrow, kParts, kAlongK, true>
                                  : pack_tile<kNarrow, kParts, kAlongK, false>;
      pack_one(source, lane, k, lanes - lane, depth - k, to);
    }
  }
}

// PackSource and Layout are passed by value, so that the compiler knows that stores to `packed` do
// not change them.
template <bool kNarrow, int kParts>
void pack(PackSource source, int64_t lanes, int64_t depth, Side side, unsigned char* packed) {
  const int64_t steps = (depth + kTileDepth - 1) / kTileDepth;
  const int64_t all_lanes = (lanes + kPanelLanes - 1) / kPanelLanes * kPanelLanes;
  const int64_t step_bytes = kParts * 2 * kTileBytes;
  const Layout layout = {step_bytes, steps * step_bytes};
  if (source.k_stride == 1) {
    side == Side::kLeft
        ? pack_lanes<kNarrow, kParts>(source, lanes, all_lanes, depth, layout, packed)
        : pack_transposed<kNarrow, kParts, true>(source, lanes, all_lanes, depth, layout, packed);
  } else {
    side == Side::kRight
        ? pack_pairs<kNarrow, kParts>(source, lanes, all_lanes, depth, layout, packed)
        : pack_transposed<kNarrow, kParts, false>(source, lanes, all_lanes, depth, layout, packed);
  }
}

// Writes one row of up to 16 sums to the output. Returns the output's new elements.
inline __m512 finish_row(const OutputBlock& result, __m512 value, int64_t row, int column,
                         __mmask16 mask) {
  if (result.bias != nullptr) {
    value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, result.bias + column));
  }
  const int64_t index = row * result.leading_dimension + column;
  if (result.narrow) {
    uint16_t* to = static_cast<uint16_t*>(result.out) + index;
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
    return value;
  }
  float* to = static_cast<float*>(result.out) + index;
  if (result.accumulate) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), value);
  if (result.stream && mask == 0xffff && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    _mm512_stream_ps(to, value);
  } else {
    _mm512_mask_storeu_ps(to, mask, value);
  }
  return value;
}

}  // namespace

void pack_tiles_avx512(const PackSource& source, int64_t lanes, int64_t depth, Side side,
                       int parts, unsigned char* packed) {
  if (source.narrow) return pack<true, 1>(source, lanes, depth, side, packed);
  if (parts == 1) return pack<false, 1>(source, lanes, depth, side, packed);
  if (parts == 2) return pack<false, 2>(source, lanes, depth, side, packed);
  pack<false, 3>(source, lanes, depth, side, packed);
}

void finish_tiles_avx512(const OutputBlock& result, const float* sums, int rows, int columns) {
  __m512 squares = _mm512_setzero_ps();
  for (int row = 0; row < rows; row += kTileLanes) {
    for (int column = 0; column < columns; column += kTileLanes) {
      const __mmask16 mask = first16(columns - column);
      const int count = rows - row < kTileLanes ? rows - row : kTileLanes;
      const int left = (result.transposed ? column : row) / kTileLanes;
      const int right = (result.transposed ? row : column) / kTileLanes;
      const int64_t from = (left * 2 + right) * kTileLanes * kTileLanes;
      if (!result.transposed) {
        for (int i = 0; i < count; ++i) {
          const __m512 value = finish_row(result, _mm512_load_ps(sums + from + i * kTileLanes),
                                          row + i, column, mask);
          squares = _mm512_mask3_fmadd_ps(value, value, squares, mask);
        }
        continue;
      }
      __m512i tile[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        tile[i] = _mm512_castps_si512(_mm512_load_ps(sums + from + i * kTileLanes));
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i >= count) continue;
        const __m512 value =
            finish_row(result, _mm512_castsi512_ps(tile[i]), row + i, column, mask);
        squares = _mm512_mask3_fmadd_ps(value, value, squares, mask);
      }
    }
  }
  if (result.squares != nullptr) *result.squares = _mm512_reduce_add_ps(squares);
}

void add_digits_avx512(const int32_t* sums, const float* left_scales, const float* right_scales,
                       int left_tiles, int right_tiles, bool accumulate, float* total) {
  const __m512 low_order = _mm512_set1_ps(0x1p-8f), unit = _mm512_set1_ps(0x1p-18f);
  for (int tile = 0; tile < 4; ++tile) {
    if (tile / 2 >= left_tiles || tile % 2 >= right_tiles) continue;
    const __m512 right = _mm512_loadu_ps(right_scales + tile % 2 * kTileLanes);
    for (int row = 0; row < kTileLanes; ++row) {
      const int at = (tile * kTileLanes + row) * kTileLanes;
      const __m512i first = _mm512_slli_epi32(_mm512_load_si512(sums + at), 8);
      const __m512i first_two = _mm512_add_epi32(first, _mm512_load_si512(sums + kBlockSums + at));
      const __m512 third = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 2 * kBlockSums + at));
      const __m512 sum = _mm512_fmadd_ps(third, low_order, _mm512_cvtepi32_ps(first_two));
      const __m512 left = _mm512_set1_ps(left_scales[tile / 2 * kTileLanes + row]);
      // Multiply by one scale after the other: the product of both could overflow or underflow.
      const __m512 scaled = _mm512_mul_ps(sum, _mm512_mul_ps(left, unit));
      const __m512 value = accumulate ? _mm512_fmadd_ps(scaled, right, _mm512_load_ps(total + at))
                                      : _mm512_mul_ps(scaled, right);
      _mm512_store_ps(total + at, value);
    }
  }
}

void add_tiles_avx512(const float* sums, int left_tiles, int right_tiles, float* total) {
  for (int tile = 0; tile < 4; ++tile) {
    if (tile / 2 >= left_tiles || tile % 2 >= right_tiles) continue;
    const int first = tile * kTileLanes * kTileLanes;
    for (int i = first; i < first + kTileLanes * kTileLanes; i += 16) {
      _mm512_store_ps(total + i,
                      _mm512_add_ps(_mm512_load_ps(total + i), _mm512_load_ps(sums + i)));
    }
  }
}

}  // namespace gpt2_jax

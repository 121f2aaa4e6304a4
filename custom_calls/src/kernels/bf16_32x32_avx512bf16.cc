// Dot products of pairs of bfloat16 (AVX512_BF16's vdpbf16ps), over panels of tiles: a left row is a
// lane, so one pair of it is broadcast; a right row is one pair of 16 lanes. Eight left lanes at a
// time: 16 of 32 registers hold sums, two a right row, one a broadcast pair.
//
// The instruction treats denormal operands and results as zeros.
#include <immintrin.h>

#include <cstdint>

#include "kernels/prefetch_lines.h"
#include "kernels/tile_format.h"

namespace gpt2_jax {
namespace {

constexpr int kRows = 8, kPairs = kTileDepth / 2, kStepBytes = 2 * kTileBytes;

inline __m512bh pairs(const void* from) { return (__m512bh)_mm512_load_si512(from); }

inline __m512bh broadcast_pair(const unsigned char* from) {
  int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// Left lanes [first, first + kRows) by kRights tiles of right lanes.
template <int kRights>
void multiply_rows(const PanelBlock& block, int first) {
  const int64_t steps = (block.depth + kTileDepth - 1) / kTileDepth;
  const unsigned char* left =
      block.left + first / kTileLanes * kTileBytes + first % kTileLanes * 64;
  const unsigned char* right = block.right;
  // [left tile][right tile][row][column]
  float* const sums = block.sums + first / kTileLanes * 2 * (kTileLanes * kTileLanes) +
                      first % kTileLanes * kTileLanes;
  __m512 sum[kRows][kRights];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int tile = 0; tile < kRights; ++tile) {
      const float* const from = sums + tile * kTileLanes * kTileLanes + i * kTileLanes;
      sum[i][tile] = block.accumulate ? _mm512_load_ps(from) : _mm512_setzero_ps();
    }
  }
  for (int64_t step = 0; step < steps; ++step, left += kStepBytes, right += kStepBytes) {
    for (int pair = 0; pair < kPairs; ++pair) {
      __m512bh row[kRights];
#pragma GCC unroll 2
      for (int tile = 0; tile < kRights; ++tile) row[tile] = pairs(right + tile * kTileBytes + pair * 64);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512bh lane = broadcast_pair(left + i * 64 + pair * 4);
#pragma GCC unroll 2
        for (int tile = 0; tile < kRights; ++tile) {
          sum[i][tile] = _mm512_dpbf16_ps(sum[i][tile], lane, row[tile]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int tile = 0; tile < kRights; ++tile) {
      _mm512_store_ps(sums + tile * kTileLanes * kTileLanes + i * kTileLanes, sum[i][tile]);
    }
  }
}

}  // namespace

void multiply_bf16_32x32_avx512bf16(const PanelBlock& block) {
  prefetch_lines(*block.prefetch, block.prefetch->lines_per_block);
  for (int first = 0; first < block.left_lanes; first += kRows) {
    block.right_lanes > kTileLanes ? multiply_rows<2>(block, first)
                                   : multiply_rows<1>(block, first);
  }
}

}  // namespace gpt2_jax

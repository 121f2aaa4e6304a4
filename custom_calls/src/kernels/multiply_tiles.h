// The block product on any kind of tile registers. Of the 8 registers 4 hold sums, 2 hold one step
// of the left panel and 2 one step of the right panel. One pass is then 4 multiplications for 4
// loads; three passes are 12 multiplications for 8 loads.
//
// The template parameter Tiles is the instruction set, as static functions: zero<tile>(),
// load<tile>(rows of 64 bytes), store<tile>(rows), multiply<sums, left, right>(). Everything here has
// internal linkage: each file that includes it is compiled with flags of its own.
#pragma once

#include <cstdint>

#include "kernels/prefetch_lines.h"
#include "kernels/tile_format.h"

namespace gpt2_jax {
namespace {

// Tile numbers: 0 to 3 are the sums, [left][right]; the operands follow.
constexpr int kLeftTile = 4;
constexpr int kRightTile = 6;

template <typename Tiles, int kLefts, int kRights>
void multiply_block(const TileBlock& block) {
  unsigned char* const sums = static_cast<unsigned char*>(block.sums);
  if (block.accumulate) {
    Tiles::template load<0>(sums);
    if constexpr (kRights == 2) Tiles::template load<1>(sums + kTileBytes);
    if constexpr (kLefts == 2) Tiles::template load<2>(sums + 2 * kTileBytes);
    if constexpr (kLefts == 2 && kRights == 2) Tiles::template load<3>(sums + 3 * kTileBytes);
  } else {
    Tiles::template zero<0>();
    if constexpr (kRights == 2) Tiles::template zero<1>();
    if constexpr (kLefts == 2) Tiles::template zero<2>();
    if constexpr (kLefts == 2 && kRights == 2) Tiles::template zero<3>();
  }
  Prefetch prefetch = *block.prefetch;
  const int64_t lines_of_step = (block.prefetched_lines + block.steps - 1) / block.steps;
  const unsigned char* left = block.left;
  const unsigned char* right = block.right;
  for (int64_t step = 0; step < block.steps; ++step) {
    int left_part = -1, right_part = -1;
    for (int pass = 0; pass < block.num_passes; ++pass) {
      if (block.passes[pass].right_part != right_part) {
        right_part = block.passes[pass].right_part;
        const unsigned char* tiles = right + right_part * (2 * kTileBytes);
        Tiles::template load<kRightTile>(tiles);
        if constexpr (kRights == 2) Tiles::template load<kRightTile + 1>(tiles + kTileBytes);
      }
      if (block.passes[pass].left_part != left_part) {
        left_part = block.passes[pass].left_part;
        const unsigned char* tiles = left + left_part * (2 * kTileBytes);
        Tiles::template load<kLeftTile>(tiles);
        if constexpr (kLefts == 2) Tiles::template load<kLeftTile + 1>(tiles + kTileBytes);
      }
      Tiles::template multiply<0, kLeftTile, kRightTile>();
      if constexpr (kRights == 2) Tiles::template multiply<1, kLeftTile, kRightTile + 1>();
      if constexpr (kLefts == 2) Tiles::template multiply<2, kLeftTile + 1, kRightTile>();
      if constexpr (kLefts == 2 && kRights == 2) {
        Tiles::template multiply<3, kLeftTile + 1, kRightTile + 1>();
      }
    }
    left += block.left_step;
    right += block.right_step;
    prefetch_lines(prefetch, lines_of_step);
  }
  *block.prefetch = prefetch;
  Tiles::template store<0>(sums);
  if constexpr (kRights == 2) Tiles::template store<1>(sums + kTileBytes);
  if constexpr (kLefts == 2) Tiles::template store<2>(sums + 2 * kTileBytes);
  if constexpr (kLefts == 2 && kRights == 2) Tiles::template store<3>(sums + 3 * kTileBytes);
}

template <typename Tiles>
void multiply_tiles(const TileBlock& block) {
  if (block.left_tiles == 2) {
    block.right_tiles == 2 ? multiply_block<Tiles, 2, 2>(block)
                           : multiply_block<Tiles, 2, 1>(block);
  } else {
    block.right_tiles == 2 ? multiply_block<Tiles, 1, 2>(block)
                           : multiply_block<Tiles, 1, 1>(block);
  }
}

// The products of parts that a precision keeps, ordered so that each shares a part with the one
// before it. Returns their number.
inline int choose_passes(int left_parts, int right_parts, TilePass* passes) {
  static constexpr TilePass kThree[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
  static constexpr TilePass kTwo[] = {{1, 0}, {0, 0}, {0, 1}};
  const bool three = left_parts == 3 || right_parts == 3;
  int count = 0;
  for (int i = 0; i < (three ? 6 : 3); ++i) {
    const TilePass pass = three ? kThree[i] : kTwo[i];
    if (pass.left_part < left_parts && pass.right_part < right_parts) passes[count++] = pass;
  }
  return count;
}

inline TileBlock tiles_of(const PanelBlock& panels, int step_depth, int step_bytes_of_part) {
  TileBlock block = {};
  block.left = panels.left, block.right = panels.right;
  block.left_step = panels.left_parts * step_bytes_of_part;
  block.right_step = panels.right_parts * step_bytes_of_part;
  block.left_tiles = panels.left_lanes > kTileLanes ? 2 : 1;
  block.right_tiles = panels.right_lanes > kTileLanes ? 2 : 1;
  block.steps = (panels.depth + step_depth - 1) / step_depth;
  block.prefetch = panels.prefetch;
  block.prefetched_lines = panels.prefetch->lines_per_block;
  return block;
}

// The product of panels of bfloat16 parts, by `multiply`. With three parts a sum is rounded six times
// in each step. So each block of k then has its own sums, which begin at zero, and they are added to
// the old ones at the end.
inline void multiply_parts(const PanelBlock& panels, void (*multiply)(const TileBlock&),
                           AddTiles add) {
  TilePass passes[6];
  TileBlock block = tiles_of(panels, kTileDepth, 2 * kTileBytes);
  block.num_passes = choose_passes(panels.left_parts, panels.right_parts, passes);
  block.passes = passes;
  const bool three = panels.left_parts == kMaxParts || panels.right_parts == kMaxParts;
  if (!three || !panels.accumulate) {
    block.sums = panels.sums;
    block.accumulate = panels.accumulate;
    return multiply(block);
  }
  alignas(64) float own[kBlockSums];
  block.sums = own;
  multiply(block);
  add(own, block.left_tiles, block.right_tiles, panels.sums);
}

// The products of digits, in order of their order: order i begins at kFirstOfOrder[i].
constexpr TilePass kDigitPasses[] = {{0, 0}, {0, 1}, {1, 0}, {0, 2}, {1, 1}, {2, 0}};
constexpr int kFirstOfOrder[] = {0, 1, 3, 6};

// The product of panels of digits, by `multiply`.
inline void multiply_digits(const PanelBlock& panels, void (*multiply)(const TileBlock&),
                            AddDigits add) {
  TileBlock block = tiles_of(panels, kDigitDepth, 2 * kTileBytes);
  alignas(64) int32_t sums[kDigitOrders * kBlockSums];
  block.prefetched_lines = (block.prefetched_lines + kDigitOrders - 1) / kDigitOrders;
  for (int order = 0; order < kDigitOrders; ++order) {
    block.passes = kDigitPasses + kFirstOfOrder[order];
    block.num_passes = kFirstOfOrder[order + 1] - kFirstOfOrder[order];
    block.sums = sums + order * kBlockSums;
    multiply(block);
  }
  const int64_t scales = block.steps * kDigitStepBytes;
  add(sums, reinterpret_cast<const float*>(panels.left + scales),
      reinterpret_cast<const float*>(panels.right + scales), block.left_tiles, block.right_tiles,
      panels.accumulate, panels.sums);
}

}  // namespace
}  // namespace gpt2_jax

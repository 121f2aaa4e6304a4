// The block product on any kind of tile registers. Of the 8 registers 4 hold sums, 2 hold one step
// of the left panel and 2 one step of the right panel. One pass is then 4 multiplications for 4
// loads; three passes are 12 multiplications for 8 loads.
//
// The template parameter Tiles is the instruction set, as static functions: zero<tile>(),
// load<tile>(rows of 64 bytes), store<tile>(rows), multiply<sums, left, right>(),
// prefetch(address). Everything here has internal linkage: each file that includes it is compiled
// with flags of its own.
#pragma once

#include <cstdint>

#include "kernels/tile_kernel.h"

namespace gpt2_jax {
namespace {

// Tile numbers: 0 to 3 are the sums, [left][right]; the operands follow.
constexpr int kLeftTile = 4;
constexpr int kRightTile = 6;

template <typename Tiles>
void prefetch_step(TilePrefetch& prefetch) {
  for (int64_t i = 0; i < prefetch.lines_per_step && prefetch.rows > 0; ++i) {
    Tiles::prefetch(prefetch.row + prefetch.done);
    prefetch.done += 64;
    if (prefetch.done < prefetch.row_bytes) continue;
    prefetch.done = 0;
    prefetch.row += prefetch.row_stride;
    --prefetch.rows;
  }
}

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
  TilePrefetch prefetch = *block.prefetch;
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
    prefetch_step<Tiles>(prefetch);
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

}  // namespace
}  // namespace gpt2_jax

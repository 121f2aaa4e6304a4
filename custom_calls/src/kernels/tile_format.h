// The format that kernels on tiles share: panels of bfloat16 tiles or of digits. A matrix unit
// multiplies tiles, as Intel's AMX does.
//
// Included by kernel files, so it defines no inline functions; kernel.h says why.
//
// A tile is 16 rows of 64 bytes.
//
//               bfloat16                               digits
//   left tile   16 lanes x 32 k; a row is a lane       16 lanes x 64 k; a row is a lane
//   right tile  32 k x 16 lanes; a row is one pair     64 k x 16 lanes; a row is one group of 4 k
//               of k of every lane                     of every lane
//   sums        16 x 16 float32                        16 x 16 int32, exact
//
// One multiplication adds the product of a left and a right tile to a tile of sums.
//
// bfloat16: a float32 operand may be split into parts, bfloat16 each, that add up to it: high,
// middle, low.
//
// Digits: an element is an integer times its lane's unit. The integer has three digits of 8 bits,
// which are the element's parts. The unit is a power of two, chosen for each lane in each block of
// k so that the lane's largest magnitude there is an integer from 0x3f8000 to 0x7f0000: then no
// digit exceeds 127. In both kinds of tile, byte b of a lane's dword j belongs to k = 16 b + j of
// the step.
//
// A panel is 32 lanes by any number of steps, of 32 k (bfloat16) or 64 k (digits). It is stored
// step by step, within a step part by part, and a part is two tiles: lanes 0-15 and 16-31. A panel
// of digits ends with 32 float32, the lanes' scales: 2^21 units each, or NaN for a lane with an
// element that is not finite. Lanes and k beyond the operand are zeros.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"

namespace gpt2_jax {

constexpr int kTileLanes = 16;
constexpr int kTileDepth = 32;
constexpr int kDigitDepth = 64;
constexpr int kPanelLanes = 2 * kTileLanes;
constexpr int kTileBytes = 1024;
constexpr int kMaxParts = 3;
constexpr int kBlockSums = kPanelLanes * kPanelLanes;
// The order of a product of digits i and j is i + j, counted from 0; each order has its own sums.
// An order's sums weigh 2^8 times as much as those of the next.
constexpr int kDigitOrders = 3;
constexpr int kDigitStepBytes = kMaxParts * 2 * kTileBytes;
constexpr int kScalesBytes = kPanelLanes * 4;
// The largest block of k for which sums of the first order (products up to 2^14), times 2^8, fit an
// int32.
constexpr int kMaxDigitDepth = 256;

// The product of one part of the left operand with one of the right; part 0 is the high one. A pass
// loads only the parts that the pass before it did not use.
struct TilePass {
  int left_part, right_part;
};

// One block product: sums = or += left panel . right panel. Of each panel 1 or 2 tiles of lanes are
// used.
struct TileBlock {
  const unsigned char *left, *right;
  int64_t left_step, right_step;  // bytes from step to step
  int left_tiles, right_tiles;
  int64_t steps;
  const TilePass* passes;  // done in every step, in this order
  int num_passes;
  // 2 x 2 tiles of 16 x 16 sums: [left tile][right tile][row][column]. float32 for bfloat16 tiles,
  // int32 for digits.
  void* sums;
  bool accumulate;
  Prefetch* prefetch;
  int64_t prefetched_lines;  // of it, at most, beside this block
};

// Packs as bfloat16: panels of ceil(depth / 32) steps. Each part is made from the remainder that the
// parts before it leave.
//
//   parts   each part is                          a denormal part
//   1, 2    rounded to nearest even               becomes zero
//   3       cut off after 8 bits: together they   is kept
//           hold all 24 bits of a float32
//
// NaNs stay NaNs. A narrow source has one part, itself.
void pack_tiles_portable(const PackSource&, int64_t, int64_t, Side, int, unsigned char*);
void pack_tiles_avx512(const PackSource&, int64_t, int64_t, Side, int, unsigned char*);

// Packs as digits: panels of ceil(depth / 64) steps and the scales; depth is at most
// kMaxDigitDepth. An element is rounded to the nearest integer of units, ties to even. The digits of
// a lane with an infinity or a NaN are unspecified.
void pack_digits_portable(const PackSource&, int64_t, int64_t, Side, int, unsigned char*);
void pack_digits_avx512(const PackSource&, int64_t, int64_t, Side, int, unsigned char*);

// The way out of a block of sums, with bfloat16 rounded as operands are. At most 32 rows and columns.
void finish_tiles_portable(const OutputBlock&, const float*, int, int);
void finish_tiles_avx512(const OutputBlock&, const float*, int, int);

// total += sums, for the tiles of a block that are used.
using AddTiles = void (*)(const float* sums, int left_tiles, int right_tiles, float* total);
void add_tiles_portable(const float*, int, int, float*);
void add_tiles_avx512(const float*, int, int, float*);

// total = or += the value of a block, for the tiles that are used: its integer sums times the scales
// of their lanes. `sums` holds kBlockSums for each of the kDigitOrders orders, the heaviest first.
using AddDigits = void (*)(const int32_t* sums, const float* left_scales, const float* right_scales,
                           int left_tiles, int right_tiles, bool accumulate, float* total);
void add_digits_portable(const int32_t*, const float*, const float*, int, int, bool, float*);
void add_digits_avx512(const int32_t*, const float*, const float*, int, int, bool, float*);

// AMX's instructions on one block of tiles, and on whole panels.
void configure_amx();
void release_amx();
void multiply_tiles_amx(const TileBlock&);
void multiply_digits_amx(const TileBlock&);
void multiply_parts_panels_amx(const PanelBlock&);
void multiply_digits_panels_amx(const PanelBlock&);

}  // namespace gpt2_jax

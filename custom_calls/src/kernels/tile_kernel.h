// The contract of a matrix unit that multiplies tiles of bfloat16 or of bytes, as Intel's AMX does:
// packing operands into tiles, multiplying tiles, and writing the sums to the output ("finish").
// schedule_tiles.h says how they are used.
//
// Included by kernel files, so it defines no inline functions; kernel.h says why.
//
// A tile is 16 rows of 64 bytes. Lanes are rows of op(a) or columns of op(b).
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

// A part of an operand: its elements (lane, k) from some first lane and first k on.
struct TileSource {
  const void* data;
  int64_t lane_stride, k_stride;  // elements; one of the two is 1
  bool narrow;                    // stored as bfloat16, not float32
};

// The kind of tile that an operand is packed into.
enum class TileSide { kLeft, kRight };

// Packs lanes x depth as bfloat16 into ceil(lanes / 32) panels of ceil(depth / 32) steps. Each part
// is made from the remainder that the parts before it leave.
//
//   parts   each part is                          a denormal part
//   1, 2    rounded to nearest even               becomes zero
//   3       cut off after 8 bits: together they   is kept
//           hold all 24 bits of a float32
//
// NaNs stay NaNs. A narrow source has one part, itself.
using PackTiles = void (*)(const TileSource& source, int64_t lanes, int64_t depth, TileSide side,
                           int parts, unsigned char* packed);

// Packs lanes x depth as digits into panels of ceil(depth / 64) steps and the scales; depth is at
// most kMaxDigitDepth. An element is rounded to the nearest integer of units, ties to even. The
// digits of a lane with an infinity or a NaN are unspecified.
using PackDigits = void (*)(const TileSource& source, int64_t lanes, int64_t depth, TileSide side,
                            unsigned char* packed);

// The product of one part of the left operand with one of the right; part 0 is the high one. A pass
// loads only the parts that the pass before it did not use.
struct TilePass {
  int left_part, right_part;
};

// Memory to prefetch during a multiplication: `lines_per_step` cache lines in each step.
struct TilePrefetch {
  const char* row = nullptr;
  int64_t row_bytes = 0, row_stride = 0;
  int64_t rows = 0;
  int64_t done = 0;  // bytes of the row at `row` that were prefetched already
  int64_t lines_per_step = 0;
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
  TilePrefetch* prefetch;
};

// The place of a finished block in the output.
struct TileResult {
  void* out;
  int64_t leading_dimension;  // elements
  bool narrow;                // out is bfloat16; sums are rounded as operands are
  bool accumulate;            // out += sums; only when out is float32
  const float* bias;          // bias of the block's first column, or nullptr
  bool transposed;            // the sums' rows are out's columns
  bool stream;                // write whole cache lines to memory, bypassing the caches
  float* squares;             // set to the sum of the squares of a float32 out's new elements, or
                              // nullptr
};

// Writes a block of sums to the output. rows and columns (at most 32 each) count out's.
using FinishTiles = void (*)(const TileResult& result, const float* sums, int rows, int columns);

// total += sums; kBlockSums elements each.
using AddTiles = void (*)(const float* sums, float* total);

// total = or += the value of a block: its integer sums times the scales of their lanes. `sums`
// holds kBlockSums for each of the kDigitOrders orders, the heaviest order first.
using AddDigits = void (*)(const int32_t* sums, const float* left_scales, const float* right_scales,
                           bool accumulate, float* total);

// How the schedule cuts the product. Only panel_bytes can change a result's bits.
struct TileBlockSizes {
  int64_t panel_bytes;   // one packed panel in one block of k; to fit a part of L1
  int64_t item_lanes;    // lanes that a work item packs; with the item's sums to fit a part of L2
  int64_t shared_lanes;  // lanes of the shared operand in a work item; to fit the rest of L2
  int64_t shared_bytes;  // of the shared operand, packed at a time; to fit a part of L3
  int64_t sums_bytes;    // at most, of sums waiting for the next block of k; to fit a part of L3
  int64_t stream_bytes;  // an output larger than this is written to memory, bypassing the caches
};

struct TileKernel {
  const char* name;
  // Called before and after each work item, on its thread.
  void (*configure)();
  void (*release)();
  void (*multiply)(const TileBlock& block);
  PackTiles pack;
  FinishTiles finish;
  AddTiles add;
  void (*multiply_digits)(const TileBlock& block);
  PackDigits pack_digits;
  AddDigits add_digits;
  TileBlockSizes blocks;
};

// nullptr when this build has no AMX kernel.
const TileKernel* amx_kernel();

// Each is defined in a file for its instruction set.
void pack_tiles_portable(const TileSource&, int64_t, int64_t, TileSide, int, unsigned char*);
void pack_tiles_avx512(const TileSource&, int64_t, int64_t, TileSide, int, unsigned char*);
void finish_tiles_portable(const TileResult&, const float*, int, int);
void finish_tiles_avx512(const TileResult&, const float*, int, int);
void add_tiles_portable(const float*, float*);
void add_tiles_avx512(const float*, float*);
void pack_digits_portable(const TileSource&, int64_t, int64_t, TileSide, unsigned char*);
void pack_digits_avx512(const TileSource&, int64_t, int64_t, TileSide, unsigned char*);
void add_digits_portable(const int32_t*, const float*, const float*, bool, float*);
void add_digits_avx512(const int32_t*, const float*, const float*, bool, float*);
void configure_amx();
void release_amx();
void multiply_tiles_amx(const TileBlock&);
void multiply_digits_amx(const TileBlock&);

}  // namespace gpt2_jax

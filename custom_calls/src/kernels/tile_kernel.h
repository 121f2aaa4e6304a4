// The contract of a matrix unit that multiplies tiles of bfloat16 or of bytes, as Intel's AMX does:
// what its packing, its multiplication and its way out compute. See schedule_tiles.h for how they
// are used.
//
// Like kernel.h, for files with instruction sets of their own: nothing that defines inline
// functions.
//
// A tile is 16 rows of 64 bytes. One multiplication adds to a tile of 16 x 16 float32 sums the
// product of a left tile (16 lanes x 32 k: row = lane, 32 bfloat16 along k) and a right tile
// (32 k x 16 lanes: row = pair of k, 16 pairs along the lanes). A float32 operand may be split into
// parts, bfloat16 each, that add up to it: high, middle, low.
//
// Or one multiplication adds to 16 x 16 int32 sums, which are exact, the product of tiles of signed
// bytes with 64 k. Then an element is an integer of three digits of 8 bits, its parts, times the
// unit of its lane in a block of k: the power of two with which the lane's largest magnitude there
// is an integer from 0x3f8000 to 0x7f0000, so that no digit is beyond 127. Byte b of a lane's dword
// j is of k = 16 b + j in the step, on both sides.
//
// A panel is 32 lanes by any number of steps of 32 or 64 k. Its bytes: step by step, in a step part
// by part, in a part its two tiles, lanes 0-15 and 16-31; of digits, then 32 float32: each lane's
// scale, 2^21 units, or NaN for a lane that is not finite. What is missing at its ends is zero.
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
// Products of digits are of the first, second and third order, 2^8 apart; each has sums of its own.
constexpr int kDigitOrders = 3;
constexpr int kDigitStepBytes = kMaxParts * 2 * kTileBytes;
constexpr int kScalesBytes = kPanelLanes * 4;
// k of which the sums of the first order, of 2^14 each, times 2^8 are an int32.
constexpr int kMaxDigitDepth = 256;

// The elements (lane, k) of an operand, from some first lane and first k on.
struct TileSource {
  const void* data;
  int64_t lane_stride, k_stride;  // elements; one of the two is 1
  bool narrow;                    // stored as bfloat16, not float32
};

// Which tile an operand is packed for.
enum class TileSide { kLeft, kRight };

// Packs lanes x depth into ceil(lanes / 32) panels of ceil(depth / 32) steps, each part from what
// the parts before it left. One or two are rounded to nearest even, denormals to zero. Three are
// cut off: 8 bits each hold a float32's 24 to the last one. NaNs stay NaNs. A narrow source has one
// part.
using PackTiles = void (*)(const TileSource& source, int64_t lanes, int64_t depth, TileSide side,
                           int parts, unsigned char* packed);

// Packs lanes x depth, at most kMaxDigitDepth, into panels of ceil(depth / 64) steps of digits and
// the scales. An element is rounded to the nearest integer, ties to even; one with an infinity or a
// NaN in its lane has any digits.
using PackDigits = void (*)(const TileSource& source, int64_t lanes, int64_t depth, TileSide side,
                            unsigned char* packed);

// One product of parts: 0 is high. A pass over them loads a part only when it is not loaded yet.
struct TilePass {
  int left_part, right_part;
};

// Memory to be asked for while the tiles work: `lines_per_step` cache lines in each step.
struct TilePrefetch {
  const char* row = nullptr;
  int64_t row_bytes = 0, row_stride = 0;
  int64_t rows = 0;
  int64_t done = 0;  // bytes of the first row
  int64_t lines_per_step = 0;
};

// sums (+)= left panel . right panel, where a panel may have 1 or 2 tiles of lanes in use.
struct TileBlock {
  const unsigned char *left, *right;
  int64_t left_step, right_step;  // bytes from step to step
  int left_tiles, right_tiles;
  int64_t steps;
  const TilePass* passes;  // of every step, in order
  int num_passes;
  // 2 x 2 tiles of 16 x 16, each in one piece: [left tile][right tile][row][column]. Float32, of
  // digits int32.
  void* sums;
  bool accumulate;
  TilePrefetch* prefetch;
};

// Where a finished block goes: from its first element on.
struct TileResult {
  void* out;
  int64_t leading_dimension;  // elements
  bool narrow;                // out is bfloat16: rounded as operands are
  bool accumulate;            // out += sums; only when it is float32
  const float* bias;          // of the block's first column, or nullptr
  bool transposed;            // the sums' rows are out's columns
  bool stream;                // whole cache lines go to memory past the caches
  float* squares;  // for the sum of the squares of what is in a float32 out then, or nullptr
};

// rows and columns, at most 32 each, are out's.
using FinishTiles = void (*)(const TileResult& result, const float* sums, int rows, int columns);

// total += sums, of kBlockSums each.
using AddTiles = void (*)(const float* sums, float* total);

// total (+)= the sums of kDigitOrders, the first first, times the scales of their lanes.
using AddDigits = void (*)(const int32_t* sums, const float* left_scales, const float* right_scales,
                           bool accumulate, float* total);

// How the schedule cuts the product. Only panel_bytes can change a result's bits.
struct TileBlockSizes {
  int64_t panel_bytes;   // of one packed panel in one block of k: a part of L1
  int64_t item_lanes;    // packed and multiplied by a work item: with its sums a part of L2
  int64_t shared_lanes;  // of the operand packed for all, that an item multiplies with: the rest
  int64_t shared_bytes;  // of that operand packed at a time: a part of L3
  int64_t sums_bytes;    // of the sums that wait for the next block of k, at most: a part of L3
  int64_t stream_bytes;  // an output larger than this is written past the caches
};

struct TileKernel {
  const char* name;
  // Around the work of one item, on its thread.
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

// nullptr where this build has none.
const TileKernel* amx_kernel();

// Defined one a file.
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

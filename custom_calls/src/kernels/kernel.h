// The contract of a kernel of matrix products: how operands are packed into panels, how two panels
// are multiplied, and how finished sums go to the output. schedule.h says how they are used;
// tile_format.h adds what only the kernels on tiles share.
//
// Kernel files are compiled with the flags of their instruction set. They must include nothing that
// defines inline functions with external linkage (no C++ library headers beyond <cstdint>): the
// linker keeps one copy of each such function, and that copy could contain instructions that this
// CPU lacks.
#pragma once

#include <cstdint>

namespace gpt2_jax {

enum class Precision : uint8_t;  // matmul.h

// Lanes are rows of op(a) or columns of op(b). A panel is some lanes of an operand by a block of k,
// packed as the kernel reads it. The product of a left and a right panel is a block of float32 sums:
// left lanes x right lanes.
enum class Side { kLeft, kRight };

// A part of an operand: its elements (lane, k) from some first lane and first k on.
struct PackSource {
  const void* data;
  int64_t lane_stride, k_stride;  // elements; one of the two is 1
  bool narrow;                    // stored as bfloat16, not float32
  bool rounded = false;           // float32 elements count as rounded to bfloat16
};

// Packs lanes x depth into panels that follow one another; Kernel::panel_bytes each, on whole cache
// lines. Lanes of the last panel beyond the source are zeros. `parts`: into how many parts each
// element is split, for kernels that do so.
using Pack = void (*)(const PackSource& source, int64_t lanes, int64_t depth, Side side, int parts,
                      unsigned char* packed);

// Memory to prefetch beside the multiplications: at most `lines_per_block` cache lines in each.
struct Prefetch {
  const char* row = nullptr;
  int64_t row_bytes = 0, row_stride = 0;
  int64_t rows = 0;
  int64_t done = 0;  // bytes of the row at `row` that were prefetched already
  int64_t lines_per_block = 0;
};

// The product of two panels: sums = or += left . right.
struct PanelBlock {
  const unsigned char *left, *right;
  int left_lanes, right_lanes;  // that exist; the sums of others are unspecified
  int left_parts, right_parts;
  int64_t depth;  // k in the panels, at least 1
  float* sums;    // whose order is the kernel's own; 64-byte aligned
  bool accumulate;
  Prefetch* prefetch;
};

// Multiplies one block. Each call adds up its own products before it adds them to old sums, or it
// continues the old sums in order of k: which of the two depends on the kernel alone.
using Multiply = void (*)(const PanelBlock& block);

// The place of a finished block in the output.
struct OutputBlock {
  void* out;
  int64_t leading_dimension;  // elements
  bool narrow;                // out is bfloat16
  bool accumulate;            // out += sums; only when out is float32
  const float* bias;          // bias of the block's first column, or nullptr
  bool transposed;            // the left lanes are out's columns
  bool stream;                // write whole cache lines to memory, bypassing the caches
  float* squares;             // set to the sum of the squares of a float32 out's new elements, or
                              // nullptr
};

// Writes a block of sums to the output. rows and columns count out's.
using Finish = void (*)(const OutputBlock& block, const float* sums, int rows, int columns);

// How the schedule cuts the product. Only panel_bytes can change a result's bits.
struct BlockSizes {
  int64_t panel_bytes;   // the larger panel in one block of k; to fit a part of L1
  int64_t item_lanes;    // lanes that a work item packs for itself
  int64_t shared_lanes;  // lanes of the shared operand in a work item
  int64_t cached_lanes;  // lanes of it that are multiplied with all of the item's lanes in turn: to
                         // fit L2 with those
  int64_t shared_bytes;  // of the shared operand, packed at a time; to fit a part of L3
  int64_t cached_bytes;  // of that, multiplied by all items before the next; to fit L2
  int64_t sums_bytes;    // at most, of sums waiting for the next block of k; to fit a part of L3
  int64_t stream_bytes;  // an output larger than this is written to memory, bypassing the caches
};

struct Kernel {
  const char* name;        // <type>_<left lanes>x<right lanes>_<instruction set>
  uint32_t features;       // CpuFeatures it needs
  int left_lanes, right_lanes;  // of a panel
  int step_depth;          // a panel holds whole steps of so many k
  int element_bytes;       // of one part of a packed element
  int trailer_bytes;       // of a panel after its last step
  int max_depth;           // of a block of k
  // True when a left panel is a copy of memory that runs along k, and a right panel of memory that
  // runs along the lanes; false when either panel is a copy of memory that runs along the lanes.
  bool left_runs_along_k;
  // Called before and after each work item, on its thread; or nullptr.
  void (*configure)();
  void (*release)();
  Pack pack;
  Multiply multiply;
  Finish finish;
  BlockSizes blocks;
};

// Kernels of this build, best first.
struct KernelTable {
  const Kernel* begin_;
  const Kernel* end_;
  const Kernel* begin() const { return begin_; }
  const Kernel* end() const { return end_; }
};
// Those that multiply float32; the last needs no feature.
KernelTable kernels();
// Those that multiply pairs of bfloat16; there may be none.
KernelTable dot_kernels();

// The best one for these features and a precision, F32_F32_F32 or BF16_BF16_F32. `dot_products_pay`:
// whether pairs of bfloat16 are multiplied faster than float32 (cpu_features.h).
const Kernel& best_kernel(uint32_t features, Precision precision, bool dot_products_pay);
// The same for this CPU and GPT2_JAX_CPU_FEATURES.
const Kernel& best_kernel(Precision precision);

// The AMX kernel for a precision; nullptr when this build has none.
const Kernel* amx_kernel(Precision precision);

// Each is defined in a file of its own.
void multiply_f32_4x8_generic(const PanelBlock&);
void multiply_f32_6x16_avx2(const PanelBlock&);
void multiply_f32_14x32_avx512(const PanelBlock&);
void multiply_f32_8x12_neon(const PanelBlock&);
void multiply_bf16_32x32_avx512bf16(const PanelBlock&);

// Packing into panels of float32, step by step (panel[p * lanes + lane]), and the way out of sums
// stored row by row; each for the panels of one kernel.
void pack_f32_4x8(const PackSource&, int64_t, int64_t, Side, int, unsigned char*);
void pack_f32_6x16(const PackSource&, int64_t, int64_t, Side, int, unsigned char*);
void pack_f32_14x32(const PackSource&, int64_t, int64_t, Side, int, unsigned char*);
void pack_f32_8x12(const PackSource&, int64_t, int64_t, Side, int, unsigned char*);
void finish_f32_4x8(const OutputBlock&, const float*, int, int);
void finish_f32_6x16(const OutputBlock&, const float*, int, int);
void finish_f32_14x32(const OutputBlock&, const float*, int, int);
void finish_f32_8x12(const OutputBlock&, const float*, int, int);

}  // namespace gpt2_jax

// The micro-kernel contract, and the table of the kernels compiled in.
//
// Kernel files are compiled with the flags of their instruction set. They must include nothing that
// defines inline functions (no C++ library headers beyond <cstdint>): the linker keeps one copy of
// each such function, and that copy could contain instructions that this CPU lacks.
#pragma once

#include <cstdint>

namespace gpt2_jax {

// Computes one mr x nr tile over `depth` steps of k:
//
//   sum(i, j) = sum over p of a[p * mr + i] * b[p * nr + j]    (in order of p, in float32)
//   out[i * out_stride + j] = accumulate ? out[...] + sum(i, j) : sum(i, j)
//
// a and b are packed panels; the block that holds them begins at a multiple of 64 bytes. out may
// have any alignment that a float may have. depth >= 1.
using MicroKernel = void (*)(int64_t depth, const float* a, const float* b, float* out,
                             int64_t out_stride, bool accumulate);

// How the schedule cuts the product. Chosen so that a panel of b stays in L1, an item's block of a
// in L2, and the packed blocks in L3. Only `depth` can change a result's bits.
struct BlockSizes {
  int64_t depth;   // k per block
  int64_t item_m;  // rows of one work item, a multiple of mr
  int64_t item_n;  // columns of one work item, a multiple of nr
  int64_t pack_m;  // rows packed at a time, a multiple of mr
  int64_t pack_n;  // columns packed at a time, a multiple of nr
};

struct Kernel {
  const char* name;   // <type>_<mr>x<nr>_<instruction set>
  uint32_t features;  // CpuFeatures it needs
  int mr, nr;
  MicroKernel run;
  BlockSizes blocks;
};

// The largest mr * nr in the table.
constexpr int kMaxTile = 14 * 32;

// All kernels of this build, best first; the last needs no feature.
struct KernelTable {
  const Kernel* begin_;
  const Kernel* end_;
  const Kernel* begin() const { return begin_; }
  const Kernel* end() const { return end_; }
};
KernelTable kernels();

// The best one for these features.
const Kernel& best_kernel(uint32_t features);

// Each is defined in a file of its own.
void f32_4x8_generic(int64_t, const float*, const float*, float*, int64_t, bool);
void f32_6x16_avx2(int64_t, const float*, const float*, float*, int64_t, bool);
void f32_14x32_avx512(int64_t, const float*, const float*, float*, int64_t, bool);
void f32_8x12_neon(int64_t, const float*, const float*, float*, int64_t, bool);

}  // namespace gpt2_jax

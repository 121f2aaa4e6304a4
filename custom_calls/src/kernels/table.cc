// The one table of micro-kernels and their block sizes.
#include "cpu_features.h"
#include "kernels/kernel.h"
#include "kernels/tile_kernel.h"
#include "pack.h"

namespace gpt2_jax {
namespace {

constexpr Kernel kKernels[] = {
// clang-format off
//   name                features        mr  nr  function           depth item_m item_n pack_m pack_n
#if defined(__x86_64__)
    {"f32_14x32_avx512", kAvx512f,       14, 32, f32_14x32_avx512, {384,  168,   256,   1008,  3072}},
    {"f32_6x16_avx2",    kAvx2Code,       6, 16, f32_6x16_avx2,    {384,  96,    256,   960,   3072}},
#elif defined(__aarch64__)
    {"f32_8x12_neon",    kNeon,           8, 12, f32_8x12_neon,    {384,  128,   240,   1024,  3072}},
#endif
    {"f32_4x8_generic",  0,               4,  8, f32_4x8_generic,  {256,  128,   256,   1024,  3072}},
    // clang-format on
};

constexpr bool sizes_fit() {
  for (const Kernel& kernel : kKernels) {
    if (kernel.mr * kernel.nr > kMaxTile) return false;
    if (!is_panel_width(kernel.mr) || !is_panel_width(kernel.nr)) return false;
    if (kernel.blocks.item_m % kernel.mr || kernel.blocks.pack_m % kernel.mr) return false;
    if (kernel.blocks.item_n % kernel.nr || kernel.blocks.pack_n % kernel.nr) return false;
  }
  return true;
}
static_assert(sizes_fit(), "a tile's sides can be packed, and block sizes are multiples of them");

#if defined(GPT2_JAX_HAS_AMX)
// A packed panel of 24 KiB leaves half of Sapphire Rapids' L1 for the other operand. With digits
// both panels are read three times, and 16 KiB of sums lie beside them, so some reads come from L2.
constexpr TileKernel kAmx = {"32x32_amx",
                             configure_amx,
                             release_amx,
                             multiply_tiles_amx,
                             pack_tiles_avx512,
                             finish_tiles_avx512,
                             add_tiles_avx512,
                             multiply_digits_amx,
                             pack_digits_avx512,
                             add_digits_avx512,
                             {/*panel_bytes=*/24 << 10, /*item_lanes=*/128, /*shared_lanes=*/512,
                              /*shared_bytes=*/4 << 20, /*sums_bytes=*/16 << 20,
                              /*stream_bytes=*/4 << 20}};
#endif

}  // namespace

KernelTable kernels() { return {kKernels, kKernels + sizeof(kKernels) / sizeof(kKernels[0])}; }

const Kernel& best_kernel(uint32_t features) {
  const Kernel* kernel = kernels().begin();
  while (kernel->features & ~features) ++kernel;
  return *kernel;
}

const TileKernel* amx_kernel() {
#if defined(GPT2_JAX_HAS_AMX)
  return &kAmx;
#else
  return nullptr;
#endif
}

}  // namespace gpt2_jax

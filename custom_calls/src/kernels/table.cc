// The one table of kernels and their block sizes.
#include "cpu_features.h"
#include "kernels/kernel.h"
#include "kernels/tile_format.h"
#include "matmul.h"

namespace gpt2_jax {
namespace {

constexpr int kAnyDepth = 1 << 30;

// The kernels that multiply float32 have panels of float32, in steps of 16 k so that a panel is whole
// cache lines.
constexpr Kernel float32_kernel(const char* name, uint32_t features, int left_lanes,
                                int right_lanes, Pack pack, Multiply multiply, Finish finish,
                                const BlockSizes& blocks) {
  return {name, features, left_lanes, right_lanes, /*step_depth=*/16,
          /*element_bytes=*/4, /*trailer_bytes=*/0, kAnyDepth, /*left_runs_along_k=*/false,
          nullptr, nullptr, pack, multiply, finish, blocks};
}

// 24 KiB for a panel leave a part of 32 KiB of L1 for the panels that pass by.
constexpr BlockSizes kFloat32Blocks = {/*panel_bytes=*/24 << 10, /*item_lanes=*/96,
                                       /*shared_lanes=*/4096, /*cached_lanes=*/132,
                                       /*shared_bytes=*/16 << 20, /*cached_bytes=*/1 << 20,
                                       /*sums_bytes=*/16 << 20,
                                       /*stream_bytes=*/4 << 20};
#if defined(__x86_64__)
constexpr BlockSizes kAvx512Blocks = {/*panel_bytes=*/48 << 10, /*item_lanes=*/96,
                                      /*shared_lanes=*/4096, /*cached_lanes=*/256,
                                      /*shared_bytes=*/16 << 20, /*cached_bytes=*/1 << 20,
                                       /*sums_bytes=*/16 << 20,
                                      /*stream_bytes=*/4 << 20};
#endif

constexpr Kernel kKernels[] = {
#if defined(__x86_64__)
    float32_kernel("f32_14x32_avx512", kAvx512Code, 14, 32, pack_f32_14x32,
                   multiply_f32_14x32_avx512, finish_f32_14x32, kAvx512Blocks),
    float32_kernel("f32_6x16_avx2", kAvx2Code, 6, 16, pack_f32_6x16, multiply_f32_6x16_avx2,
                   finish_f32_6x16, kFloat32Blocks),
#elif defined(__aarch64__)
    float32_kernel("f32_8x12_neon", kNeon, 8, 12, pack_f32_8x12, multiply_f32_8x12_neon,
                   finish_f32_8x12, kFloat32Blocks),
#endif
    float32_kernel("f32_4x8_generic", 0, 4, 8, pack_f32_4x8, multiply_f32_4x8_generic,
                   finish_f32_4x8, kFloat32Blocks),
};

#if defined(GPT2_JAX_HAS_AMX)
constexpr BlockSizes kDotBlocks = {/*panel_bytes=*/16 << 10, /*item_lanes=*/128,
                                   /*shared_lanes=*/4096, /*cached_lanes=*/512,
                                   /*shared_bytes=*/16 << 20, /*cached_bytes=*/1 << 20,
                                       /*sums_bytes=*/16 << 20,
                                   /*stream_bytes=*/4 << 20};
constexpr Kernel kDotKernels[] = {
    {"bf16_32x32_avx512bf16", kAvx512Code | kAvx512bf16, kPanelLanes, kPanelLanes, kTileDepth,
     /*element_bytes=*/2, /*trailer_bytes=*/0, kAnyDepth, /*left_runs_along_k=*/true, nullptr,
     nullptr, pack_tiles_avx512, multiply_bf16_32x32_avx512bf16, finish_tiles_avx512, kDotBlocks}};

constexpr CpuFeatures kAmxCode = kAvx512Code | kAvx512bf16 | kAmxTile;

// A packed panel of 24 KiB leaves half of Sapphire Rapids' L1 for the other operand. With digits
// both panels are read three times, and 16 KiB of sums lie beside them, so some reads come from L2.
constexpr BlockSizes kAmxBlocks = {/*panel_bytes=*/24 << 10, /*item_lanes=*/128,
                                   /*shared_lanes=*/512, /*cached_lanes=*/512,
                                   /*shared_bytes=*/4 << 20, /*cached_bytes=*/4 << 20,
                                   /*sums_bytes=*/16 << 20,
                                   /*stream_bytes=*/4 << 20};
constexpr Kernel kAmxParts = {"bf16_32x32_amx", kAmxCode | kAmxBf16, kPanelLanes, kPanelLanes,
                              kTileDepth, /*element_bytes=*/2, /*trailer_bytes=*/0, kAnyDepth,
                              /*left_runs_along_k=*/true, configure_amx, release_amx,
                              pack_tiles_avx512, multiply_parts_panels_amx, finish_tiles_avx512,
                              kAmxBlocks};
constexpr Kernel kAmxDigits = {"s8_32x32_amx", kAmxCode | kAmxInt8, kPanelLanes, kPanelLanes,
                               kDigitDepth, /*element_bytes=*/1, kScalesBytes, kMaxDigitDepth,
                               /*left_runs_along_k=*/true, configure_amx, release_amx,
                               pack_digits_avx512, multiply_digits_panels_amx, finish_tiles_avx512,
                               kAmxBlocks};
#endif

}  // namespace

KernelTable kernels() { return {kKernels, kKernels + sizeof(kKernels) / sizeof(kKernels[0])}; }

KernelTable dot_kernels() {
#if defined(GPT2_JAX_HAS_AMX)
  return {kDotKernels, kDotKernels + sizeof(kDotKernels) / sizeof(kDotKernels[0])};
#else
  return {nullptr, nullptr};
#endif
}

const Kernel& best_kernel(uint32_t features, Precision precision, bool dot_products_pay) {
  if (precision == Precision::kBF16_BF16_F32 && dot_products_pay) {
    for (const Kernel& kernel : dot_kernels()) {
      if (has_all(features, kernel.features)) return kernel;
    }
  }
  const Kernel* kernel = kernels().begin();
  while (!has_all(features, kernel->features)) ++kernel;
  return *kernel;
}

const Kernel& best_kernel(Precision precision) {
  return best_kernel(cpu_features(), precision, dot_products_pay());
}

const Kernel* amx_kernel([[maybe_unused]] Precision precision) {
#if defined(GPT2_JAX_HAS_AMX)
  return precision == Precision::kS8_S8_S32_X6 ? &kAmxDigits : &kAmxParts;
#else
  return nullptr;
#endif
}

}  // namespace gpt2_jax

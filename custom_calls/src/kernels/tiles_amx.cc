// Intel AMX: the tile instructions themselves.
#include <immintrin.h>

#include <cstdint>

#include "kernels/multiply_tiles.h"

// A tile's number is part of the instruction, so the intrinsics want a literal: one case a number.
#define GPT2_JAX_TILE_CASES(CASE) CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)

namespace gpt2_jax {
namespace {

// The configuration that LDTILECFG reads: palette 1, every tile 16 rows of 64 bytes. It is a static
// object: the intrinsic does not tell the compiler that it reads all of it.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64, "LDTILECFG reads 64 bytes");
constexpr TileConfiguration kConfiguration;

// The instructions that bfloat16 and digits share.
struct AmxRegisters {
  template <int kTile>
  static void zero() {
    switch (kTile) {
#define GPT2_JAX_CASE(tile) \
  case tile:                \
    _tile_zero(tile);       \
    break;
      GPT2_JAX_TILE_CASES(GPT2_JAX_CASE)
#undef GPT2_JAX_CASE
    }
  }

  template <int kTile>
  static void load(const void* rows) {
    switch (kTile) {
#define GPT2_JAX_CASE(tile)      \
  case tile:                     \
    _tile_loadd(tile, rows, 64); \
    break;
      GPT2_JAX_TILE_CASES(GPT2_JAX_CASE)
#undef GPT2_JAX_CASE
    }
  }

  template <int kTile>
  static void store(void* rows) {
    switch (kTile) {
#define GPT2_JAX_CASE(tile)       \
  case tile:                      \
    _tile_stored(tile, rows, 64); \
    break;
      GPT2_JAX_TILE_CASES(GPT2_JAX_CASE)
#undef GPT2_JAX_CASE
    }
  }
};

// The number of the sums' tile determines the operands' tiles.
#define GPT2_JAX_MULTIPLY(instruction)                                         \
  template <int kSums, int kLeft, int kRight>                                  \
  static void multiply() {                                                     \
    static_assert(kSums == 2 * (kLeft - kLeftTile) + kRight - kRightTile, ""); \
    switch (kSums) {                                                           \
      case 0:                                                                  \
        instruction(0, 4, 6);                                                  \
        break;                                                                 \
      case 1:                                                                  \
        instruction(1, 4, 7);                                                  \
        break;                                                                 \
      case 2:                                                                  \
        instruction(2, 5, 6);                                                  \
        break;                                                                 \
      case 3:                                                                  \
        instruction(3, 5, 7);                                                  \
        break;                                                                 \
    }                                                                          \
  }

struct AmxTiles : AmxRegisters {
  GPT2_JAX_MULTIPLY(_tile_dpbf16ps)
};

struct AmxDigits : AmxRegisters {
  GPT2_JAX_MULTIPLY(_tile_dpbssd)
};

#undef GPT2_JAX_MULTIPLY

}  // namespace

void configure_amx() { _tile_loadconfig(&kConfiguration); }

void release_amx() { _tile_release(); }

// The load intrinsics do not say that they read memory.
void multiply_tiles_amx(const TileBlock& block) {
  __asm__ volatile("" ::: "memory");
  multiply_tiles<AmxTiles>(block);
}

void multiply_digits_amx(const TileBlock& block) {
  __asm__ volatile("" ::: "memory");
  multiply_tiles<AmxDigits>(block);
}

void multiply_parts_panels_amx(const PanelBlock& block) {
  multiply_parts(block, multiply_tiles_amx, add_tiles_avx512);
}

void multiply_digits_panels_amx(const PanelBlock& block) {
  multiply_digits(block, multiply_digits_amx, add_digits_avx512);
}

}  // namespace gpt2_jax

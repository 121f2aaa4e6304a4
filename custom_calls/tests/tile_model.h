// The tile instructions in plain C++, as Intel's manual defines them, for machines without them.
//
// TDPBF16PS: for each sum, the products of even k and those of odd k are added up apart, each by
// fused multiply-additions in the order of k that begin at zero. The two results are added, and
// then added to the sum in the tile. Every operation rounds to nearest even, treats denormal
// operands as zeros, and replaces a denormal result by a zero of the same sign.
//
// TDPBSSD: 64 products of signed bytes are added to an int32.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "bfloat16.h"
#include "kernels/multiply_tiles.h"

namespace gpt2_jax {

inline float flush_denormal(float value) {
  return std::fabs(value) < FLT_MIN ? std::copysign(0.0f, value) : value;
}

// The tile registers, separate for each thread. Using them unconfigured ends the program, as the
// CPU would.
class TileModel {
 public:
  static void configure() {
    registers().configured = true;
    std::memset(registers().bytes, 0, sizeof(registers().bytes));
  }
  static void release() { registers().configured = false; }
  static bool configured() { return registers().configured; }

  template <int kTile>
  static void zero() {
    std::memset(tile(kTile), 0, kTileBytes);
  }
  template <int kTile>
  static void load(const void* rows) {
    std::memcpy(tile(kTile), rows, kTileBytes);
  }
  template <int kTile>
  static void store(void* rows) {
    std::memcpy(rows, tile(kTile), kTileBytes);
  }
  template <int kSums, int kLeft, int kRight>
  static void multiply() {
    float left[16][32], right[16][32], sums[16][16];
    load_words(kLeft, left);
    load_words(kRight, right);
    std::memcpy(sums, tile(kSums), kTileBytes);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 16; ++column) {
        float even = 0, odd = 0;
        for (int pair = 0; pair < 16; ++pair) {
          const float* l = &left[row][2 * pair];
          const float* r = &right[pair][2 * column];
          even = flush_denormal(std::fma(l[0], r[0], even));
          odd = flush_denormal(std::fma(l[1], r[1], odd));
        }
        float& sum = sums[row][column];
        sum = flush_denormal(flush_denormal(sum) + flush_denormal(even + odd));
      }
    }
    std::memcpy(tile(kSums), sums, kTileBytes);
  }

 protected:
  static void* tile(int number) {
    if (!registers().configured) std::abort();
    return registers().bytes[number];
  }

 private:
  struct Registers {
    bool configured = false;
    alignas(64) unsigned char bytes[8][kTileBytes];
  };
  static Registers& registers() {
    thread_local Registers instance;
    return instance;
  }
  static void load_words(int number, float (&values)[16][32]) {
    uint16_t words[16][32];
    std::memcpy(words, tile(number), kTileBytes);
    for (int row = 0; row < 16; ++row) {
      for (int word = 0; word < 32; ++word) {
        values[row][word] = flush_denormal(bfloat16_to_float(words[row][word]));
      }
    }
  }
};

class DigitModel : public TileModel {
 public:
  template <int kSums, int kLeft, int kRight>
  static void multiply() {
    int8_t left[16][64], right[16][64];
    int32_t sums[16][16];
    std::memcpy(left, tile(kLeft), kTileBytes);
    std::memcpy(right, tile(kRight), kTileBytes);
    std::memcpy(sums, tile(kSums), kTileBytes);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 16; ++column) {
        for (int k = 0; k < 64; ++k) {
          sums[row][column] += left[row][k] * right[k / 4][4 * column + k % 4];
        }
      }
    }
    std::memcpy(tile(kSums), sums, kTileBytes);
  }
};

inline void multiply_on_model(const TileBlock& block) { multiply_tiles<TileModel>(block); }
inline void multiply_digits_on_model(const TileBlock& block) { multiply_tiles<DigitModel>(block); }

// The same for whole panels.
inline void multiply_parts_panels_on_model(const PanelBlock& block) {
  multiply_parts(block, multiply_on_model, add_tiles_portable);
}
inline void multiply_digits_panels_on_model(const PanelBlock& block) {
  multiply_digits(block, multiply_digits_on_model, add_digits_portable);
}

}  // namespace gpt2_jax

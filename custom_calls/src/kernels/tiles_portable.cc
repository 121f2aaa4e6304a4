// Packing and finishing element by element: the reference that the fast versions are compared with.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bfloat16.h"
#include "kernels/tile_format.h"

namespace gpt2_jax {
namespace {

float element(const PackSource& source, int64_t lane, int64_t k) {
  const int64_t index = lane * source.lane_stride + k * source.k_stride;
  return source.narrow ? bfloat16_to_float(static_cast<const uint16_t*>(source.data)[index])
                       : static_cast<const float*>(source.data)[index];
}

// Sets `words` to the parts of element (lane, k) of the source.
void split(const PackSource& source, int64_t lane, int64_t k, int parts, uint16_t* words) {
  float rest = element(source, lane, k);
  if (source.narrow) {
    words[0] = upper_half(rest);
    return;
  }
  for (int part = 0; part < parts; ++part) {
    words[part] = parts == kMaxParts ? upper_half(rest) : float_to_bfloat16_without_denormals(rest);
    rest -= bfloat16_to_float(words[part]);
  }
}

// The exponent, biased as in a float32, of 2^22 units of a lane. `largest` has the bits of the
// lane's largest magnitude. The result is that magnitude's own exponent, or the next one when a
// digit would otherwise exceed 127. It is at least 22, so that 1 / unit = 2^(149 - exponent) is a
// float32.
uint32_t exponent_of_digits(uint32_t largest) {
  return std::min<uint32_t>(std::max<uint32_t>((largest + 0x20000) >> 23, 22), 255);
}

}  // namespace

void pack_tiles_portable(const PackSource& source, int64_t lanes, int64_t depth, Side side,
                         int parts, unsigned char* packed) {
  const int64_t all_lanes = (lanes + kPanelLanes - 1) / kPanelLanes * kPanelLanes;
  const int64_t steps = (depth + kTileDepth - 1) / kTileDepth;
  for (int64_t lane = 0; lane < all_lanes; ++lane) {
    const int64_t tile = lane / kTileLanes % 2, row = lane % kTileLanes;
    for (int64_t k = 0; k < steps * kTileDepth; ++k) {
      const int64_t word = k % kTileDepth;
      const int64_t at = side == Side::kLeft ? row * kTileDepth + word
                                                 : word / 2 * kTileDepth + row * 2 + word % 2;
      uint16_t words[kMaxParts] = {};
      if (lane < lanes && k < depth) split(source, lane, k, parts, words);
      for (int part = 0; part < parts; ++part) {
        const int64_t tile_number =
            ((lane / kPanelLanes * steps + k / kTileDepth) * parts + part) * 2 + tile;
        std::memcpy(packed + tile_number * kTileBytes + at * 2, &words[part], 2);
      }
    }
  }
}

void pack_digits_portable(const PackSource& source, int64_t lanes, int64_t depth, Side side, int,
                          unsigned char* packed) {
  const int64_t steps = (depth + kDigitDepth - 1) / kDigitDepth;
  const int64_t all_lanes = (lanes + kPanelLanes - 1) / kPanelLanes * kPanelLanes;
  const int64_t panel_bytes = steps * kDigitStepBytes + kScalesBytes;
  for (int64_t lane = 0; lane < all_lanes; ++lane) {
    unsigned char* const panel = packed + lane / kPanelLanes * panel_bytes;
    uint32_t largest = 0;
    for (int64_t k = 0; k < depth && lane < lanes; ++k) {
      largest = std::max(largest, bits_of(element(source, lane, k)) & 0x7fffffff);
    }
    const int exponent = static_cast<int>(exponent_of_digits(largest));
    const float scale = largest < 0x7f800000 ? std::ldexp(1.0f, exponent - 128)
                                             : std::numeric_limits<float>::quiet_NaN();
    std::memcpy(panel + steps * kDigitStepBytes + lane % kPanelLanes * 4, &scale, 4);
    for (int64_t k = 0; k < steps * kDigitDepth; ++k) {
      const float value = lane < lanes && k < depth ? element(source, lane, k) : 0;
      const float units = std::nearbyint(value * std::ldexp(1.0f, 149 - exponent));
      const int32_t integer = std::fabs(units) < 1 << 23 ? static_cast<int32_t>(units) : 0;
      // Adding 128 to each digit makes them bytes from 0 to 255; the xor below subtracts it again.
      const uint32_t raised = static_cast<uint32_t>(integer) + 0x808080;
      const int64_t dword = k % kTileLanes, row = lane % kTileLanes;
      const int64_t at = (side == Side::kLeft ? row * 16 + dword : dword * 16 + row) * 4 +
                         k % kDigitDepth / kTileLanes;
      for (int part = 0; part < kMaxParts; ++part) {
        const int64_t tile =
            (k / kDigitDepth * kMaxParts + part) * 2 + lane % kPanelLanes / kTileLanes;
        panel[tile * kTileBytes + at] =
            static_cast<unsigned char>((raised >> (16 - 8 * part)) ^ 0x80);
      }
    }
  }
}

void finish_tiles_portable(const OutputBlock& result, const float* sums, int rows, int columns) {
  float squares = 0;
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      const int left = result.transposed ? column : row;
      const int right = result.transposed ? row : column;
      const int tile = left / kTileLanes * 2 + right / kTileLanes;
      const int at = (tile * kTileLanes + left % kTileLanes) * kTileLanes + right % kTileLanes;
      float value = sums[at];
      if (result.bias != nullptr) value += result.bias[column];
      const int64_t index = row * result.leading_dimension + column;
      if (result.narrow) {
        static_cast<uint16_t*>(result.out)[index] = float_to_bfloat16_without_denormals(value);
        continue;
      }
      float& element = static_cast<float*>(result.out)[index];
      element = result.accumulate ? element + value : value;
      squares += element * element;
    }
  }
  if (result.squares != nullptr) *result.squares = squares;
}

void add_tiles_portable(const float* sums, int left_tiles, int right_tiles, float* total) {
  for (int i = 0; i < kBlockSums; ++i) {
    const int tile = i / (kTileLanes * kTileLanes);
    if (tile / 2 < left_tiles && tile % 2 < right_tiles) total[i] += sums[i];
  }
}

void add_digits_portable(const int32_t* sums, const float* left_scales, const float* right_scales,
                         int left_tiles, int right_tiles, bool accumulate, float* total) {
  for (int i = 0; i < kBlockSums; ++i) {
    const int tile = i / (kTileLanes * kTileLanes), row = i / kTileLanes % kTileLanes;
    if (tile / 2 >= left_tiles || tile % 2 >= right_tiles) continue;
    const int left = tile / 2 * kTileLanes + row;
    const int right = tile % 2 * kTileLanes + i % kTileLanes;
    const int32_t first_two = sums[i] * 256 + sums[kBlockSums + i];
    const float sum = std::fma(static_cast<float>(sums[2 * kBlockSums + i]), 0x1p-8f,
                               static_cast<float>(first_two));
    // Multiply by one scale after the other: the product of both could overflow or underflow.
    const float scaled = sum * (left_scales[left] * 0x1p-18f);
    total[i] =
        accumulate ? std::fma(scaled, right_scales[right], total[i]) : scaled * right_scales[right];
  }
}

}  // namespace gpt2_jax

// Into tiles and out of them, element by element: what the fast versions are compared with.
#include <algorithm>

#include "bfloat16.h"
#include "kernels/tile_kernel.h"

namespace gpt2_jax {
namespace {

// The parts of the element (lane, k) of the source.
void split(const TileSource& source, int64_t lane, int64_t k, int parts, uint16_t* words) {
  const int64_t index = lane * source.lane_stride + k * source.k_stride;
  if (source.narrow) {
    words[0] = static_cast<const uint16_t*>(source.data)[index];
    return;
  }
  float rest = static_cast<const float*>(source.data)[index];
  for (int part = 0; part < parts; ++part) {
    words[part] = parts == kMaxParts ? upper_half(rest) : float_to_bfloat16_without_denormals(rest);
    rest -= bfloat16_to_float(words[part]);
  }
}

}  // namespace

void pack_tiles_portable(const TileSource& source, int64_t lanes, int64_t depth, TileSide side,
                         int parts, unsigned char* packed) {
  const int64_t all_lanes = (lanes + kPanelLanes - 1) / kPanelLanes * kPanelLanes;
  const int64_t steps = (depth + kTileDepth - 1) / kTileDepth;
  for (int64_t lane = 0; lane < all_lanes; ++lane) {
    const int64_t tile = lane / kTileLanes % 2, row = lane % kTileLanes;
    for (int64_t k = 0; k < steps * kTileDepth; ++k) {
      const int64_t word = k % kTileDepth;
      const int64_t at = side == TileSide::kLeft ? row * kTileDepth + word
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

void finish_tiles_portable(const TileResult& result, const float* sums, int rows, int columns) {
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

void add_tiles_portable(const float* sums, float* total) {
  for (int i = 0; i < kBlockSums; ++i) total[i] += sums[i];
}

}  // namespace gpt2_jax

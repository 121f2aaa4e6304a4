#include "pack.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "operand.h"
#include "transpose_4x4.h"

namespace gpt2_jax {
namespace {

// Memory runs along the lanes: copy step by step.
template <int kWidth, typename Load>
void copy_panel(const typename Load::Stored* source, int64_t k_stride, int64_t depth,
                float* panel) {
  for (int64_t p = 0; p < depth; ++p) {
    for (int lane = 0; lane < kWidth; ++lane) {
      panel[p * kWidth + lane] = Load::load(source[p * k_stride + lane]);
    }
  }
}

// Memory runs along k: transpose in squares of 4 x 4, and the rest one element at a time.
template <int kWidth>
void transpose_panel(const float* source, int64_t lane_stride, int64_t depth, float* panel) {
  constexpr int kSquares = kWidth / 4 * 4;  // lanes covered by squares
  const int64_t square_depth = depth / 4 * 4;
  for (int64_t p = 0; p < square_depth; p += 4) {
    for (int lane = 0; lane < kSquares; lane += 4) {
      transpose_4x4(source + lane * lane_stride + p, lane_stride, panel + p * kWidth + lane,
                    kWidth);
    }
    for (int64_t q = p; q < p + 4; ++q) {
      for (int lane = kSquares; lane < kWidth; ++lane) {
        panel[q * kWidth + lane] = source[lane * lane_stride + q];
      }
    }
  }
  for (int64_t p = square_depth; p < depth; ++p) {
    for (int lane = 0; lane < kWidth; ++lane) {
      panel[p * kWidth + lane] = source[lane * lane_stride + p];
    }
  }
}

// The same for elements that need conversion: first converts a chunk of each lane, in memory order.
template <int kWidth, typename Load>
void convert_and_transpose_panel(const typename Load::Stored* source, int64_t lane_stride,
                                 int64_t depth, float* panel) {
  constexpr int64_t kChunk = 64;  // 32 lanes of it are 8 KiB, a part of L1
  alignas(64) float lanes[kWidth * kChunk];
  for (int64_t p = 0; p < depth; p += kChunk) {
    const int64_t length = std::min(kChunk, depth - p);
    for (int lane = 0; lane < kWidth; ++lane) {
      for (int64_t q = 0; q < length; ++q) {
        lanes[lane * kChunk + q] = Load::load(source[lane * lane_stride + p + q]);
      }
    }
    transpose_panel<kWidth>(lanes, kChunk, length, panel + p * kWidth);
  }
}

// One full panel; one of the strides is 1.
template <int kWidth, typename Load>
void pack_full_panel(const typename Load::Stored* source, int64_t lane_stride, int64_t k_stride,
                     int64_t depth, float* panel) {
  if (lane_stride == 1) {
    copy_panel<kWidth, Load>(source, k_stride, depth, panel);
  } else if constexpr (std::is_same_v<Load, LoadFloat32>) {
    transpose_panel<kWidth>(source, lane_stride, depth, panel);
  } else {
    convert_and_transpose_panel<kWidth, Load>(source, lane_stride, depth, panel);
  }
}

template <typename Load>
void pack_ragged_panel(const typename Load::Stored* source, int64_t lane_stride, int64_t k_stride,
                       int64_t lanes, int64_t depth, int width, float* panel) {
  for (int64_t p = 0; p < depth; ++p) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      panel[p * width + lane] = Load::load(source[lane * lane_stride + p * k_stride]);
    }
    for (int64_t lane = lanes; lane < width; ++lane) panel[p * width + lane] = 0;
  }
}

template <typename Load>
using PackFull = void (*)(const typename Load::Stored*, int64_t, int64_t, int64_t, float*);

constexpr size_t kWidths = sizeof(kPanelWidths) / sizeof(kPanelWidths[0]);

// pack_full_panel for one of kPanelWidths.
template <typename Load, size_t... kIndices>
PackFull<Load> full_panel_packer(int width, std::index_sequence<kIndices...>) {
  PackFull<Load> found = nullptr;
  ((width == kPanelWidths[kIndices] ? void(found = pack_full_panel<kPanelWidths[kIndices], Load>)
                                    : void()),
   ...);
  return found;
}

template <typename Load>
void pack_panels(const typename Load::Stored* source, int64_t lane_stride, int64_t k_stride,
                 int64_t lanes, int64_t depth, int width, float* packed) {
  const auto pack_full = full_panel_packer<Load>(width, std::make_index_sequence<kWidths>());
  for (int64_t lane = 0; lane < lanes; lane += width, packed += width * depth) {
    if (lanes - lane >= width) {
      pack_full(source + lane * lane_stride, lane_stride, k_stride, depth, packed);
    } else {
      pack_ragged_panel<Load>(source + lane * lane_stride, lane_stride, k_stride,
                              std::min<int64_t>(lanes - lane, width), depth, width, packed);
    }
  }
}

template <typename Load>
void pack_lanes(const MatrixView<Load>& view, int64_t lane_stride, int64_t k_stride,
                const PackRange& range, int width, float* packed) {
  pack_panels<Load>(view.data + range.first_lane * lane_stride + range.first_k * k_stride,
                    lane_stride, k_stride, range.lanes, range.depth, width, packed);
}

}  // namespace

void pack_a(const Matmul& matmul, const PackRange& range, int width, float* packed) {
  visit_operand(matmul.a, matmul.precision, [&](auto view) {
    pack_lanes(view, view.row_stride, view.column_stride, range, width, packed);
  });
}

void pack_b(const Matmul& matmul, const PackRange& range, int width, float* packed) {
  visit_operand(matmul.b, matmul.precision, [&](auto view) {
    pack_lanes(view, view.column_stride, view.row_stride, range, width, packed);
  });
}

}  // namespace gpt2_jax

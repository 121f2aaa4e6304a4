// Packing: copies an operand into panels, which a micro-kernel reads in order.
//
// A panel is `width` lanes (rows of op(a), columns of op(b)) by `depth` steps of k, stored step by
// step: panel[p * width + lane]. Packing also transposes, converts to float32 and rounds to
// bfloat16.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace gpt2_jax {

// The widths of panel that can be packed: mr and nr of every kernel are among them.
constexpr int kPanelWidths[] = {4, 6, 8, 12, 14, 16, 32};

constexpr bool is_panel_width(int width) {
  for (const int known : kPanelWidths) {
    if (width == known) return true;
  }
  return false;
}

// Which lanes and which k to pack.
struct PackRange {
  int64_t first_lane, lanes;
  int64_t first_k, depth;
};

// Packs `range` of op(a) (lanes are rows) into ceil(lanes / width) panels at `packed`. Lanes of the
// last panel beyond the range are zeros.
void pack_a(const Matmul& matmul, const PackRange& range, int width, float* packed);

// The same for op(b), whose lanes are columns.
void pack_b(const Matmul& matmul, const PackRange& range, int width, float* packed);

}  // namespace gpt2_jax

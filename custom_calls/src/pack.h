// Packing: copies an operand into panels, which a micro-kernel reads in order.
//
// A panel is `width` lanes (rows of op(a), columns of op(b)) by `depth` steps of k, stored step by
// step: panel[p * width + lane]. Packing also transposes, converts to float32 and rounds to
// bfloat16.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace gpt2_jax {

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

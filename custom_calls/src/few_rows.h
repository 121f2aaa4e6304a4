// Products of few rows with a weight, as generating text makes them: one row for each text.
//
// Such a product takes as long as reading op(b). Packing would read it, write it, and read it
// again. Here each column of op(b) is read once, from where it lies, and multiplied with all rows of
// op(a).
#pragma once

#include "executor.h"
#include "matmul.h"

namespace gpt2_jax {

// With more rows packing pays, as memory no longer limits the product.
constexpr int64_t kFewRows = 8;

// True for a product of 1 to kFewRows rows whose op(b) has k along memory and is not to be rounded.
bool has_few_rows(const Matmul& matmul);

// Computes a product that has_few_rows, in float32. A precision that splits float32 asks for no more
// than that. The bits do not depend on the number of threads. Throws std::bad_alloc.
void few_rows_matmul(const Matmul& matmul, Executor& executor);

}  // namespace gpt2_jax

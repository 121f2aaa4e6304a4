// The packed product: how blocks of op(a) and op(b) are packed, and how the work is cut into items.
#pragma once

#include "executor.h"
#include "kernels/kernel.h"
#include "matmul.h"

namespace gpt2_jax {

// Computes the product with one micro-kernel, in precision F32_F32_F32 or BF16_BF16_F32. The bits
// of the result depend on the kernel and the problem, never on the executor: work items cut only m
// and n, and each sums over k in order. Throws std::bad_alloc.
void packed_matmul(const Matmul& matmul, const Kernel& kernel, Executor& executor);

}  // namespace gpt2_jax

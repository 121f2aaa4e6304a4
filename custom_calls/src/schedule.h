// The packed product, by any kernel: which operand all threads share, which one each work item packs
// for itself, and in which order.
#pragma once

#include "executor.h"
#include "kernels/kernel.h"
#include "matmul.h"

namespace gpt2_jax {

// Computes the product with one kernel, in a precision that the kernel has; m, n and k are at least
// 1. Sets sum_of_squares if it is not nullptr. The bits of the result depend on the kernel and the
// problem, never on the executor: work items cut only m and n, and each sums over k in order. Throws
// std::bad_alloc.
//
// Lanes are rows of op(a) and columns of op(b).
//
//   shared operand    the one with fewer lanes: GPT-2's activations. All threads pack it together.
//   streamed operand  the other: GPT-2's weights. Read once, from where it lies. Each work item
//                     packs its own lanes block by block of k and multiplies them with every shared
//                     panel while they are in the caches; meanwhile the next block is prefetched.
//
// So threads wait for one another twice in a product: after the shared operand was packed, and at the
// end. Only when that operand does not fit BlockSizes::shared_bytes is this repeated for its parts.
//
// Either op(a) or op(b) becomes the left panels, whichever needs fewer transpositions. With op(b) on
// the left the kernel computes the transposed product, which is transposed back when it is stored.
void packed_matmul(const Matmul& matmul, const Kernel& kernel, Executor& executor);

}  // namespace gpt2_jax

// The product on tiles: which operand all threads share, which one each work item packs for itself,
// and in which order.
#pragma once

#include "executor.h"
#include "kernels/tile_kernel.h"
#include "matmul.h"

namespace gpt2_jax {

// Computes the product with one tile kernel, in any precision but F32_F32_F32. The bits of the
// result depend on the kernel and the problem, never on the executor: work items cut only m and n,
// and each sums over k in order. A bfloat16 operand has one part (itself) in the bfloat16
// precisions and three digits in S8_S8_S32_X6. Throws std::bad_alloc.
//
// Lanes are rows of op(a) and columns of op(b).
//
//   shared operand    the one with fewer lanes: GPT-2's activations. All threads pack it together.
//   streamed operand  the other: GPT-2's weights. Read once, from where it lies. Each work item
//                     packs its own lanes block by block of k and multiplies them with every shared
//                     panel while they are in the caches; meanwhile the next block is prefetched.
//
// Either op(a) or op(b) becomes the left tiles, whichever needs fewer transpositions. With op(b) on
// the left the tiles compute the transposed product, which is transposed back when it is stored.
void tile_matmul(const Matmul& matmul, const TileKernel& kernel, Executor& executor);

}  // namespace gpt2_jax

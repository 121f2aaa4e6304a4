// The product on tiles: which operand is packed for all, which by each item, and in which order.
#pragma once

#include "executor.h"
#include "kernels/tile_kernel.h"
#include "matmul.h"

namespace gpt2_jax {

// Computes the product with one tile kernel. The bits of the result depend on the kernel and the
// problem alone, never on the executor: items cut m and n only, and each sums its k in order.
// Any precision but F32_F32_F32; a bfloat16 operand is its own only part in those of bfloat16, and
// has three digits in S8_S8_S32_X6. Throws std::bad_alloc.
//
// The operand with fewer lanes (rows of op(a), columns of op(b)), GPT-2's activations, is packed by
// all threads together and shared. The other, its weights, is read once, straight from where it
// lies: each item packs its own lanes block by block, while the tiles work asks for the next block,
// and multiplies them with every shared panel while they are in the caches. Which of op(a) and
// op(b) is packed for left tiles is chosen for the fewest transpositions; when it is op(b), the
// tiles compute the transpose and it is turned on the way out.
void tile_matmul(const Matmul& matmul, const TileKernel& kernel, Executor& executor);

}  // namespace gpt2_jax

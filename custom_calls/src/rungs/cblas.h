// A product by another library's cblas_sgemm, found at run time.
#pragma once

#include <string>

#include "executor.h"
#include "matmul.h"

namespace gpt2_jax {

// cblas_sgemm with 32-bit sizes; its enumerations travel as int.
using CblasSgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k,
                            float alpha, const float* a, int lda, const float* b, int ldb,
                            float beta, float* c, int ldc);

// Why no such function can take this product; empty when it can.
std::string refuse_cblas(const Matmul& matmul);

// One call of `sgemm` on the calling thread: no copy is made of a float32 operand or result. What
// is not float32, or is to be rounded to bfloat16, goes through float32 copies that the executor's
// threads make; a product of the rounded operands is exact in float32. Throws std::bad_alloc.
void cblas_matmul(const Matmul& matmul, CblasSgemm sgemm, Executor& executor);

}  // namespace gpt2_jax

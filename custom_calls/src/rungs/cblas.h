// A product computed by another library's cblas_sgemm, which is found at run time.
#pragma once

#include <string>

#include "executor.h"
#include "matmul.h"

namespace gpt2_jax {

// cblas_sgemm with 32-bit sizes; its enumerations are passed as int.
using CblasSgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k,
                            float alpha, const float* a, int lda, const float* b, int ldb,
                            float beta, float* c, int ldc);

// The reason why cblas_sgemm cannot take this product; empty when it can.
std::string refuse_cblas(const Matmul& matmul);

// Calls `sgemm` once, on the calling thread. A float32 operand or result is used in its place.
// bfloat16 ones, and float32 operands that the precision rounds to bfloat16, go through float32
// copies, which the executor's threads make. Products of bfloat16 numbers are exact in float32, so
// the copies lose nothing. Throws std::bad_alloc.
void cblas_matmul(const Matmul& matmul, CblasSgemm sgemm, Executor& executor);

}  // namespace gpt2_jax

#include "operand.h"
#include "rungs/rungs.h"

namespace gpt2_jax {

void run_naive(const Matmul& matmul, Executor&) {
  visit_operand(matmul.a, matmul.precision, [&](auto a) {
    visit_operand(matmul.b, matmul.precision, [&](auto b) {
      for (int64_t i = 0; i < matmul.m; ++i) {
        for (int64_t j = 0; j < matmul.n; ++j) {
          float sum = 0;
          for (int64_t p = 0; p < matmul.k; ++p) sum += a.at(i, p) * b.at(p, j);
          store_result(matmul, i, j, sum);
        }
      }
    });
  });
}

}  // namespace gpt2_jax

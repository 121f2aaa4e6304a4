#include "few_rows.h"
#include "kernels/kernel.h"
#include "rungs/rungs.h"
#include "schedule.h"

namespace gpt2_jax {

void run_amx(const Matmul& matmul, Executor& executor) {
  if (has_few_rows(matmul)) return few_rows_matmul(matmul, executor);
  packed_matmul(matmul, *amx_kernel(matmul.precision), executor);
}

}  // namespace gpt2_jax

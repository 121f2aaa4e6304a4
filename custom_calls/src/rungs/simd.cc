#include "executor.h"
#include "few_rows.h"
#include "kernels/kernel.h"
#include "rungs/rungs.h"
#include "schedule.h"

namespace gpt2_jax {

void run_simd(const Matmul& matmul, Executor&) {
  InlineExecutor this_thread;
  if (has_few_rows(matmul)) return few_rows_matmul(matmul, this_thread);
  packed_matmul(matmul, best_kernel(matmul.precision), this_thread);
}

}  // namespace gpt2_jax

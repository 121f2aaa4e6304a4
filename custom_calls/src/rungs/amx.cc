#include "few_rows.h"
#include "kernels/tile_kernel.h"
#include "rungs/rungs.h"
#include "schedule_tiles.h"

namespace gpt2_jax {

void run_amx(const Matmul& matmul, Executor& executor) {
  if (has_few_rows(matmul)) return few_rows_matmul(matmul, executor);
  tile_matmul(matmul, *amx_kernel(), executor);
}

}  // namespace gpt2_jax

#include "kernels/kernel.h"
#include "rungs/rungs.h"
#include "schedule.h"

namespace gpt2_jax {

void run_amx(const Matmul& matmul, Executor& executor) {
  packed_matmul(matmul, *amx_kernel(matmul.precision), executor);
}

}  // namespace gpt2_jax

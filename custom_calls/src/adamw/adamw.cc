#include "adamw/adamw.h"

#include <algorithm>
#include <vector>

#include "cpu_features.h"
#include "executor.h"
#include "rows/rows.h"

namespace gpt2_jax {
namespace {

// Elements of one work item: 256 KiB of each buffer, so that taking one costs nothing.
constexpr int64_t kBlock = 1 << 16;

AdamWKernel best_kernel() {
#if defined(__x86_64__)
  const CpuFeatures features = cpu_features();
  constexpr CpuFeatures kAvx512 = kAvx512f | kAvx512bw | kAvx512vl;
  if ((features & kAvx512) == kAvx512) return adamw_avx512;
  if ((features & kAvx2) && (features & kFma)) return adamw_avx2;
#endif
  return adamw_generic;
}

}  // namespace

void adamw_update(const AdamWUpdate& update, const AdamWConstants& constants, Executor& executor) {
  const AdamWKernel kernel = best_kernel();
  const int64_t blocks = (update.count + kBlock - 1) / kBlock;
  parallel_for(executor, blocks, [&](int64_t block) {
    const int64_t begin = block * kBlock;
    const int64_t end = std::min(update.count, begin + kBlock);
    for (int64_t s = 0; s < update.num_spans; ++s) {
      const DecaySpan& span = update.spans[s];
      const int64_t start = std::max(begin, span.start);
      const int64_t stop = std::min(end, span.stop);
      if (start >= stop) continue;
      kernel(stop - start, constants, span.weight_decay, update.gradients + start,
             update.params + start, update.m + start, update.v + start);
    }
  });
}

double sum_of_squares(const float* values, int64_t count, Executor& executor) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<double> sums(static_cast<size_t>(blocks));
  parallel_for(executor, blocks, [&](int64_t block) {
    const int64_t begin = block * kBlock;
    const int64_t end = std::min(count, begin + kBlock);
    sums[static_cast<size_t>(block)] = row_kernels().sum_of_squares(end - begin, values + begin);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace gpt2_jax

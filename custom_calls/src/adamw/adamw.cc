#include "adamw/adamw.h"

#include <algorithm>

#include "cpu_features.h"
#include "executor.h"

namespace gpt2_jax {
namespace {

// Elements of one work item: 256 KiB of each buffer, so that the cost of taking an item is
// negligible.
constexpr int64_t kBlock = 1 << 16;

}  // namespace

AdamWKernel best_adamw_kernel([[maybe_unused]] uint32_t features) {
#if defined(__x86_64__)
  if (has_all(features, kAvx512Code)) return adamw_avx512;
  if (has_all(features, kAvx2Code)) return adamw_avx2;
#endif
  return adamw_generic;
}

void adamw_update(const AdamWUpdate& update, const AdamWConstants& constants, Executor& executor) {
  const AdamWKernel kernel = best_adamw_kernel(cpu_features());
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

}  // namespace gpt2_jax

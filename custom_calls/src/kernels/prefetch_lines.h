// Prefetching the memory that the schedule names, beside a multiplication. Internal linkage: each
// file that includes this is compiled with flags of its own.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"

namespace gpt2_jax {
namespace {

// Prefetches the next `lines` cache lines into L2.
inline void prefetch_lines(Prefetch& prefetch, int64_t lines) {
  for (int64_t i = 0; i < lines && prefetch.rows > 0; ++i) {
    __builtin_prefetch(prefetch.row + prefetch.done, 0, 2);
    prefetch.done += 64;
    if (prefetch.done < prefetch.row_bytes) continue;
    prefetch.done = 0;
    prefetch.row += prefetch.row_stride;
    --prefetch.rows;
  }
}

}  // namespace
}  // namespace gpt2_jax

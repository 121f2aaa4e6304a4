// Asking for memory that a pass over a long stream will need: the processor's own prefetching ends
// with a page of 4 KiB.
//
// Like kernel.h, for files with instruction sets of their own: internal linkage, no library.
#pragma once

#include <cstdint>

namespace gpt2_jax {
namespace {

constexpr int64_t kPrefetched = 256;      // elements asked for at a time, and used before the next
constexpr int64_t kPrefetchAhead = 1024;  // elements

// Those kPrefetchAhead elements further on in a stream that is read from `values` on; past its end
// nothing happens.
inline void prefetch_ahead(const float* values) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t i = 0; i < kPrefetched; i += kLine) {
    __builtin_prefetch(values + kPrefetchAhead + i);
  }
}

}  // namespace
}  // namespace gpt2_jax

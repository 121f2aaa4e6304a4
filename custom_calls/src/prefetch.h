// Prefetches memory for a pass over a long array: the processor's own prefetching stops at the end
// of each 4 KiB page.
//
// Included by files that are compiled for an instruction set of their own, so everything has
// internal linkage and uses no library; kernel.h says why.
#pragma once

#include <cstdint>

namespace gpt2_jax {
namespace {

constexpr int64_t kPrefetched = 256;      // elements prefetched by one call
constexpr int64_t kPrefetchAhead = 1024;  // elements between the one in use and the prefetched ones

// Prefetches kPrefetched elements that begin kPrefetchAhead after `values`. To be called once for
// every kPrefetched elements read. Harmless past the array's end.
inline void prefetch_ahead(const float* values) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t i = 0; i < kPrefetched; i += kLine) {
    __builtin_prefetch(values + kPrefetchAhead + i);
  }
}

}  // namespace
}  // namespace gpt2_jax

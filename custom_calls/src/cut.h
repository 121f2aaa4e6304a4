// Cutting a range into blocks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gpt2_jax {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The block size that covers `total` as evenly as possible: a multiple of `unit`, at most `block`
// (itself a multiple of `unit`).
inline int64_t even_block(int64_t total, int64_t block, int64_t unit) {
  return round_up(ceil_div(total, ceil_div(total, block)), unit);
}

struct Range {
  int64_t first, size;
};

// [first, first + total) cut into blocks of one size; the last block may be smaller.
struct Cut {
  int64_t total, block;
  int64_t first = 0;

  int64_t count() const { return ceil_div(total, block); }
  int64_t size(int64_t i) const { return std::min(block, total - i * block); }
  Range operator[](int64_t i) const { return {first + i * block, size(i)}; }
};

}  // namespace gpt2_jax

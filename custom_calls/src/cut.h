// Cutting a range into blocks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gpt2_jax {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The size of equal blocks, at most `block` (a multiple of `unit`) each, that cover `total`.
inline int64_t even_block(int64_t total, int64_t block, int64_t unit) {
  return round_up(ceil_div(total, ceil_div(total, block)), unit);
}

struct Range {
  int64_t first, size;
};

// [first, first + total) in blocks of one size but for the last.
struct Cut {
  int64_t total, block;
  int64_t first = 0;

  int64_t count() const { return ceil_div(total, block); }
  int64_t size(int64_t i) const { return std::min(block, total - i * block); }
  Range operator[](int64_t i) const { return {first + i * block, size(i)}; }
};

}  // namespace gpt2_jax

// For any CPU: the compiler's own vectors of 4 floats, which are SSE2 on x86-64 and NEON on arm64.
// 8 of 16 registers hold sums.
#include <cstdint>

#include "kernels/kernel.h"
#include "kernels/prefetch_lines.h"

namespace gpt2_jax {
namespace {

typedef float Vector __attribute__((vector_size(16)));
// The same vector, for loads and stores at any alignment; may alias other types.
typedef float LooseVector __attribute__((vector_size(16), aligned(4), may_alias));

constexpr int kRows = 4;
constexpr int kVectors = 2;

}  // namespace

void multiply_f32_4x8_generic(const PanelBlock& block) {
  prefetch_lines(*block.prefetch, block.prefetch->lines_per_block);
  const float* a = reinterpret_cast<const float*>(block.left);
  const float* b = reinterpret_cast<const float*>(block.right);
  Vector sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < block.depth; ++p) {
    const LooseVector* row = reinterpret_cast<const LooseVector*>(b);
    const Vector b0 = row[0];
    const Vector b1 = row[1];
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] += a[i] * b0;
      sum[i][1] += a[i] * b1;
    }
    a += kRows;
    b += 4 * kVectors;
  }
  for (int i = 0; i < kRows; ++i) {
    LooseVector* row = reinterpret_cast<LooseVector*>(block.sums + i * 4 * kVectors);
    for (int v = 0; v < kVectors; ++v) row[v] = block.accumulate ? row[v] + sum[i][v] : sum[i][v];
  }
}

}  // namespace gpt2_jax

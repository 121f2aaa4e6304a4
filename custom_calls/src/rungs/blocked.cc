#include <algorithm>

#include "operand.h"
#include "rungs/rungs.h"

namespace gpt2_jax {
namespace {

// The blocks of a, b and sums are 16 + 32 + 32 KiB: together they fit L2, and a row of b with a row
// of sums fits L1.
constexpr int64_t kRows = 64;
constexpr int64_t kColumns = 128;
constexpr int64_t kDepth = 64;

// Copies rows x columns of op(X) as float32 to `block`, which has kStride floats a row.
template <int64_t kStride, typename View>
void copy_block(const View& view, int64_t first_row, int64_t rows, int64_t first_column,
                int64_t columns, float* block) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      block[i * kStride + j] = view.at(first_row + i, first_column + j);
    }
  }
}

}  // namespace

void run_blocked(const Matmul& matmul, Executor&) {
  alignas(64) float a_block[kRows * kDepth];
  alignas(64) float b_block[kDepth * kColumns];
  alignas(64) float sums[kRows * kColumns];

  visit_operand(matmul.a, matmul.precision, [&](auto a) {
    visit_operand(matmul.b, matmul.precision, [&](auto b) {
      for (int64_t i0 = 0; i0 < matmul.m; i0 += kRows) {
        const int64_t rows = std::min(kRows, matmul.m - i0);
        for (int64_t j0 = 0; j0 < matmul.n; j0 += kColumns) {
          const int64_t columns = std::min(kColumns, matmul.n - j0);
          std::fill(sums, sums + kRows * kColumns, 0.0f);
          for (int64_t p0 = 0; p0 < matmul.k; p0 += kDepth) {
            const int64_t depth = std::min(kDepth, matmul.k - p0);
            copy_block<kDepth>(a, i0, rows, p0, depth, a_block);
            copy_block<kColumns>(b, p0, depth, j0, columns, b_block);
            for (int64_t i = 0; i < rows; ++i) {
              for (int64_t p = 0; p < depth; ++p) {
                const float a_ip = a_block[i * kDepth + p];
                // Both arrays are read in memory order, so the compiler vectorizes this loop.
                for (int64_t j = 0; j < columns; ++j) {
                  sums[i * kColumns + j] += a_ip * b_block[p * kColumns + j];
                }
              }
            }
          }
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) {
              store_result(matmul, i0 + i, j0 + j, sums[i * kColumns + j]);
            }
          }
        }
      }
    });
  });
}

}  // namespace gpt2_jax

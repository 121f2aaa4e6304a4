#include "few_rows.h"

#include <algorithm>

#include "cut.h"
#include "operand.h"
#include "rows/rows.h"
#include "workspace.h"

namespace gpt2_jax {
namespace {

// Of op(b) in a work item: enough that taking an item costs little, few enough that the threads end
// together.
constexpr int64_t kItemBytes = 1 << 17;
// Columns of op(b) in an item are a multiple of it: threads write to different cache lines.
constexpr int64_t kColumnUnit = 32;

}  // namespace

bool has_few_rows(const Matmul& matmul) {
  const bool rounds_b =
      matmul.precision == Precision::kBF16_BF16_F32 && matmul.b.dtype == DType::kFloat32;
  return matmul.m >= 1 && matmul.m <= kFewRows && matmul.b.transposed && !rounds_b &&
         matmul.sum_of_squares == nullptr;
}

void few_rows_matmul(const Matmul& matmul, Executor& executor) {
  const int64_t m = matmul.m, k = matmul.k;
  const Workspace workspace(m * k);
  float* const a = workspace.data();
  visit_operand(matmul.a, matmul.precision, [&](auto view) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t p = 0; p < k; ++p) a[i * k + p] = view.at(i, p);
    }
  });

  const bool narrow = matmul.b.dtype == DType::kBFloat16;
  const int64_t width = narrow ? 2 : 4;
  const auto* const b = static_cast<const char*>(matmul.b.buffer) + matmul.b.offset * width;
  const int64_t row_bytes = std::max<int64_t>(k * width, 1);
  const Cut items = {matmul.n,
                     round_up(std::max<int64_t>(kItemBytes / row_bytes, 1), kColumnUnit)};
  parallel_for(executor, items.count(), [&](int64_t index) {
    const Range columns = items[index];
    for (int64_t j = columns.first; j < columns.first + columns.size; ++j) {
      float sums[kFewRows];
      row_kernels().dots(m, k, a, narrow, b + j * matmul.b.leading_dimension * width, sums);
      for (int64_t i = 0; i < m; ++i) store_result(matmul, i, j, sums[i]);
    }
  });
}

}  // namespace gpt2_jax

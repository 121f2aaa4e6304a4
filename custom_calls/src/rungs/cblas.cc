#include "rungs/cblas.h"

#include <algorithm>
#include <climits>

#include "operand.h"
#include "workspace.h"

namespace gpt2_jax {
namespace {

enum CblasOrder { kRowMajor = 101 };
enum CblasTranspose { kNoTranspose = 111, kTranspose = 112 };

// Calls rows(first, last) for ranges that cover [0, count), each long enough to be worth a thread.
template <typename Rows>
void parallel_rows(Executor& executor, int64_t count, int64_t columns, const Rows& rows) {
  const int64_t block = std::max<int64_t>(1, (1 << 15) / columns);
  parallel_for(executor, (count + block - 1) / block,
               [&](int64_t index) { rows(index * block, std::min(count, (index + 1) * block)); });
}

bool needs_copy(const Operand& operand, Precision precision) {
  return operand.dtype != DType::kFloat32 || precision == Precision::kBF16_BF16_F32;
}

template <typename Load>
void copy_row(const MatrixView<Load>& view, int64_t row, int64_t columns, float* to) {
  const auto* from = view.data + row * view.row_stride;
  for (int64_t j = 0; j < columns; ++j) to[j] = Load::load(from[j]);
}

// Copies the matrix as it is stored, rows x columns, to dense float32.
void copy_operand(Operand stored, Precision precision, int64_t rows, int64_t columns, float* to,
                  Executor& executor) {
  stored.transposed = false;
  visit_operand(stored, precision, [&](const auto& view) {
    parallel_rows(executor, rows, columns, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) copy_row(view, i, columns, to + i * columns);
    });
  });
}

// The matrix that sgemm reads: the operand in its place, or its float32 copy.
struct Source {
  const float* data;
  int leading_dimension;
};

Source source(const Operand& operand, bool copied, const float* copy, int64_t columns) {
  if (copied) return {copy, static_cast<int>(columns)};
  return {static_cast<const float*>(operand.buffer) + operand.offset,
          // cblas requires a leading dimension >= columns and > 0, even for a single row.
          static_cast<int>(std::max(operand.leading_dimension, columns))};
}

}  // namespace

std::string refuse_cblas(const Matmul& matmul) {
  const int64_t largest = std::max({matmul.m, matmul.n, matmul.k, matmul.a.leading_dimension,
                                    matmul.b.leading_dimension, matmul.out_leading_dimension});
  if (largest <= INT_MAX) return "";
  return "cblas_sgemm takes sizes of 32 bits, this product has " + std::to_string(largest);
}

void cblas_matmul(const Matmul& matmul, CblasSgemm sgemm, Executor& executor) {
  const int64_t m = matmul.m, n = matmul.n, k = matmul.k;
  const bool copy_a = needs_copy(matmul.a, matmul.precision);
  const bool copy_b = needs_copy(matmul.b, matmul.precision);
  const bool copy_out = matmul.out_dtype != DType::kFloat32;
  const int64_t a_columns = matmul.a.transposed ? m : k;
  const int64_t b_columns = matmul.b.transposed ? k : n;
  const int64_t a_floats = copy_a ? m * k : 0;
  const int64_t b_floats = copy_b ? k * n : 0;
  const Workspace workspace(a_floats + b_floats + (copy_out ? m * n : 0));
  float* const a_copy = workspace.data();
  float* const b_copy = a_copy + a_floats;
  float* const out_copy = b_copy + b_floats;
  if (copy_a) {
    copy_operand(matmul.a, matmul.precision, m * k / a_columns, a_columns, a_copy, executor);
  }
  if (copy_b) {
    copy_operand(matmul.b, matmul.precision, k * n / b_columns, b_columns, b_copy, executor);
  }
  const Source a = source(matmul.a, copy_a, a_copy, a_columns);
  const Source b = source(matmul.b, copy_b, b_copy, b_columns);
  float* const out = copy_out ? out_copy : static_cast<float*>(matmul.out);
  const int64_t out_stride = copy_out ? n : std::max(matmul.out_leading_dimension, n);

  sgemm(kRowMajor, matmul.a.transposed ? kTranspose : kNoTranspose,
        matmul.b.transposed ? kTranspose : kNoTranspose, static_cast<int>(m), static_cast<int>(n),
        static_cast<int>(k), 1, a.data, a.leading_dimension, b.data, b.leading_dimension,
        matmul.accumulate ? 1 : 0, out, static_cast<int>(out_stride));

  if (!copy_out && matmul.bias == nullptr) return;
  parallel_rows(executor, m, n, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = 0; j < n; ++j) store_result(matmul, i, j, out[i * out_stride + j]);
    }
  });
}

}  // namespace gpt2_jax

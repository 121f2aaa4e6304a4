#include "rows/rows.h"

#include <algorithm>
#include <vector>

#include "cpu_features.h"
#include "executor.h"

namespace gpt2_jax {
namespace {

constexpr int64_t kRowsOfItem = 16;
constexpr int64_t kColumnsOfItem = 256;
constexpr int64_t kElementsOfItem = 1 << 15;
constexpr int64_t kSquaresOfItem = 1 << 16;

// Calls item(first, count) for pieces of `size` that cover [0, total).
template <typename Item>
void in_pieces(Executor& executor, int64_t total, int64_t size, const Item& item) {
  parallel_for(executor, (total + size - 1) / size, [&](int64_t index) {
    const int64_t first = index * size;
    item(first, std::min(size, total - first));
  });
}

// The address of element `first` of a matrix, counted over all rows.
char* elements(const Rows& x, int64_t first) {
  return static_cast<char*>(x.data) + first * (x.narrow ? 2 : 4);
}

}  // namespace

const RowKernels& best_row_kernels([[maybe_unused]] uint32_t features) {
#if defined(__x86_64__)
  if (has_all(features, kAvx512Code)) return kRowKernelsAvx512;
  if (has_all(features, kAvx2Code)) return kRowKernelsAvx2;
#endif
  return kRowKernelsGeneric;
}

const RowKernels& row_kernels() { return best_row_kernels(cpu_features()); }

void layer_norm(const Rows& x, const float* gain, const float* bias, const Rows& out,
                Executor& executor) {
  in_pieces(executor, x.rows, kRowsOfItem, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      row_kernels().layer_norm(x.columns, x.narrow, x.row(i), gain, bias, out.row(i));
    }
  });
}

void layer_norm_backward(const Rows& x, const float* gain, const Rows& dout, const Rows& dresidual,
                         const Rows& dx, float* dgain, float* dbias, Executor& executor) {
  const int64_t columns = x.columns;
  const int64_t items = (x.rows + kRowsOfItem - 1) / kRowsOfItem;
  // For each item: its sums for dgain, then those for dbias.
  std::vector<float> sums(static_cast<size_t>(items * 2 * columns), 0.0f);
  in_pieces(executor, x.rows, kRowsOfItem, [&](int64_t first, int64_t count) {
    float* const own = sums.data() + first / kRowsOfItem * 2 * columns;
    for (int64_t i = first; i < first + count; ++i) {
      row_kernels().layer_norm_backward(columns, x.narrow, x.row(i), gain, dout.row(i),
                                        dresidual.row(i), dx.row(i), own, own + columns);
    }
  });
  std::fill_n(dgain, columns, 0.0f);
  std::fill_n(dbias, columns, 0.0f);
  for (int64_t item = 0; item < items; ++item) {
    const float* const own = sums.data() + item * 2 * columns;
    row_kernels().add_to(columns, false, own, 1.0f, dgain);
    row_kernels().add_to(columns, false, own + columns, 1.0f, dbias);
  }
}

void gelu(const Rows& x, const Rows& out, Executor& executor) {
  in_pieces(executor, x.rows * x.columns, kElementsOfItem, [&](int64_t first, int64_t count) {
    row_kernels().gelu(count, x.narrow, elements(x, first), elements(out, first));
  });
}

void gelu_backward(const Rows& x, const Rows& dout, const Rows& dx, Executor& executor) {
  in_pieces(executor, x.rows * x.columns, kElementsOfItem, [&](int64_t first, int64_t count) {
    row_kernels().gelu_backward(count, x.narrow, elements(x, first), elements(dout, first),
                                elements(dx, first));
  });
}

void softmax_cross_entropy(const Rows& logits, const int32_t* targets, int64_t vocab_size,
                           float scale, float* losses, const Rows& dlogits, Executor& executor) {
  parallel_for(executor, logits.rows, [&](int64_t i) {
    losses[i] = row_kernels().softmax_cross_entropy(
        logits.columns, vocab_size, reinterpret_cast<const float*>(logits.row(i)), targets[i],
        scale, dlogits.narrow, dlogits.row(i));
  });
}

void column_sums(const Rows& x, float* sums, Executor& executor) {
  in_pieces(executor, x.columns, kColumnsOfItem, [&](int64_t first, int64_t count) {
    std::fill_n(sums + first, count, 0.0f);
    for (int64_t i = 0; i < x.rows; ++i) {
      row_kernels().add_to(count, x.narrow, x.row(i) + first * (x.narrow ? 2 : 4), 1.0f,
                           sums + first);
    }
  });
}

double sum_of_squares(int64_t count, const float* x, Executor& executor) {
  std::vector<double> sums(static_cast<size_t>((count + kSquaresOfItem - 1) / kSquaresOfItem));
  in_pieces(executor, count, kSquaresOfItem, [&](int64_t first, int64_t size) {
    sums[static_cast<size_t>(first / kSquaresOfItem)] =
        row_kernels().sum_of_squares(size, x + first);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace gpt2_jax

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rows/rows.h"
#include "workspace.h"

namespace gpt2_jax {
namespace {

// Queries in a block. Enough that packing costs little beside the products; few enough that a block
// of scores stays in the cache and few masked scores are computed.
constexpr int64_t kQueries = 128;

// One head of one sequence.
class Head {
 public:
  Head(const Attention& attention, int64_t index)
      : a_(attention),
        implementation_(attention.implementation->own_threads ? *find_implementation("simd")
                                                              : *attention.implementation),
        batch_(index / attention.heads),
        head_(index % attention.heads) {}

  int64_t width() const { return a_.heads * a_.head_size; }

  // The rows from `first` on of q, k or v (part 0, 1 or 2), in a buffer of qkv's shape.
  Operand part(const void* qkv, int part, int64_t first, bool transposed) const {
    return {qkv, part_offset(part, first), 3 * width(), a_.dtype, transposed};
  }
  int64_t part_offset(int part, int64_t first) const {
    return (batch_ * a_.time + first) * 3 * width() + part * width() + head_ * a_.head_size;
  }

  // The rows from `first` on in a buffer of out's shape.
  Operand output(const void* out, int64_t first, bool transposed) const {
    return {out, output_offset(first), width(), a_.dtype, transposed};
  }
  int64_t output_offset(int64_t first) const {
    return (batch_ * a_.time + first) * width() + head_ * a_.head_size;
  }

  float* log_sums(float* all) const { return all + (batch_ * a_.heads + head_) * a_.time; }

  void product(int64_t m, int64_t n, int64_t k, const Operand& a, const Operand& b, void* out,
               int64_t out_leading_dimension, DType out_dtype, bool accumulate = false) const {
    Matmul matmul;
    matmul.m = m, matmul.n = n, matmul.k = k;
    matmul.a = a, matmul.b = b;
    matmul.out = out;
    matmul.out_leading_dimension = out_leading_dimension;
    matmul.out_dtype = out_dtype;
    matmul.accumulate = accumulate;
    matmul.precision = a_.precision;
    InlineExecutor alone;
    multiply(implementation_, matmul, alone);
  }

 private:
  const Attention& a_;
  const Implementation& implementation_;
  const int64_t batch_, head_;
};

void* element(const void* buffer, DType dtype, int64_t index) {
  return static_cast<char*>(const_cast<void*>(buffer)) +
         index * (dtype == DType::kBFloat16 ? 2 : 4);
}

float scale_of(const Attention& attention) {
  return 1.0f / std::sqrt(static_cast<float>(attention.head_size));
}

Operand scratch(const float* data, int64_t columns, bool transposed) {
  return {data, 0, columns, DType::kFloat32, transposed};
}

}  // namespace

void attention_forward(const Attention& attention, void* out, float* log_sums, Executor& executor) {
  const int64_t T = attention.time, D = attention.head_size;
  const float scale = scale_of(attention);
  parallel_for(executor, attention.batch * attention.heads, [&](int64_t index) {
    const Head head(attention, index);
    const Workspace workspace(std::min(kQueries, T) * T);
    float* const scores = workspace.data();
    for (int64_t first = 0; first < T; first += kQueries) {
      const int64_t queries = std::min(kQueries, T - first), keys = first + queries;
      head.product(queries, keys, D, head.part(attention.qkv, 0, first, false),
                   head.part(attention.qkv, 1, 0, true), scores, keys, DType::kFloat32);
      for (int64_t i = 0; i < queries; ++i) {
        head.log_sums(log_sums)[first + i] =
            row_kernels().causal_softmax(keys, first + i + 1, scale, scores + i * keys);
      }
      head.product(
          queries, D, keys, scratch(scores, keys, false), head.part(attention.qkv, 2, 0, false),
          element(out, attention.dtype, head.output_offset(first)), head.width(), attention.dtype);
    }
  });
}

void attention_backward(const Attention& attention, const void* out, const float* log_sums,
                        const void* dout, void* dqkv, Executor& executor) {
  const int64_t T = attention.time, D = attention.head_size;
  const float scale = scale_of(attention);
  const bool narrow = attention.dtype == DType::kBFloat16;
  parallel_for(executor, attention.batch * attention.heads, [&](int64_t index) {
    const Head head(attention, index);
    const int64_t block = std::min(kQueries, T) * T;
    const Workspace workspace(2 * block + 2 * T * D);
    float* const weights = workspace.data();
    float* const dscores = weights + block;
    float* const dk = dscores + block;
    float* const dv = dk + T * D;
    std::fill_n(dk, 2 * T * D, 0.0f);
    for (int64_t first = 0; first < T; first += kQueries) {
      const int64_t queries = std::min(kQueries, T - first), keys = first + queries;
      const Operand q = head.part(attention.qkv, 0, first, false);
      const Operand d = head.output(dout, first, false);
      head.product(queries, keys, D, q, head.part(attention.qkv, 1, 0, true), weights, keys,
                   DType::kFloat32);
      head.product(queries, keys, D, d, head.part(attention.qkv, 2, 0, true), dscores, keys,
                   DType::kFloat32);
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t row = head.output_offset(first + i);
        const float output_product = row_kernels().dot(
            D, narrow, element(out, attention.dtype, row), element(dout, attention.dtype, row));
        row_kernels().causal_softmax_backward(
            keys, first + i + 1, scale, head.log_sums(const_cast<float*>(log_sums))[first + i],
            output_product, weights + i * keys, dscores + i * keys);
      }
      head.product(keys, D, queries, scratch(weights, keys, true), d, dv, D, DType::kFloat32, true);
      head.product(keys, D, queries, scratch(dscores, keys, true), q, dk, D, DType::kFloat32, true);
      head.product(queries, D, keys, scratch(dscores, keys, false),
                   head.part(attention.qkv, 1, 0, false),
                   element(dqkv, attention.dtype, head.part_offset(0, first)), 3 * head.width(),
                   attention.dtype);
    }
    for (int64_t i = 0; i < T; ++i) {
      row_kernels().copy(D, dk + i * D, narrow,
                         element(dqkv, attention.dtype, head.part_offset(1, i)));
      row_kernels().copy(D, dv + i * D, narrow,
                         element(dqkv, attention.dtype, head.part_offset(2, i)));
    }
  });
}

}  // namespace gpt2_jax

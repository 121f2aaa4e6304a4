#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "few_rows.h"
#include "rows/rows.h"
#include "workspace.h"

namespace gpt2_jax {
namespace {

// Queries in a block. A block of scores stays in the cache, and few masked scores are computed. In a
// longer sequence packing its keys and values for each block would cost more than that saves.
int64_t queries_of_block(int64_t time) { return std::min<int64_t>(time <= 256 ? 32 : 128, time); }

// The rung that computes the products of one head: a library with threads of its own would compute
// one head after another.
const Implementation& of_one_head(const Implementation& implementation) {
  return implementation.own_threads ? *find_implementation("simd") : implementation;
}

void product_of_one_head(const Implementation& implementation, Precision precision, int64_t m,
                         int64_t n, int64_t k, const Operand& a, const Operand& b, void* out,
                         int64_t out_leading_dimension, DType out_dtype, bool accumulate = false) {
  Matmul matmul;
  matmul.m = m, matmul.n = n, matmul.k = k;
  matmul.a = a, matmul.b = b;
  matmul.out = out;
  matmul.out_leading_dimension = out_leading_dimension;
  matmul.out_dtype = out_dtype;
  matmul.accumulate = accumulate;
  matmul.precision = precision;
  InlineExecutor alone;
  multiply(implementation, matmul, alone);
}

// One head of one sequence.
class Head {
 public:
  Head(const Attention& attention, int64_t index)
      : a_(attention),
        implementation_(of_one_head(*attention.implementation)),
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
    product_of_one_head(implementation_, a_.precision, m, n, k, a, b, out, out_leading_dimension,
                        out_dtype, accumulate);
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

float scale_of(int64_t head_size) { return 1.0f / std::sqrt(static_cast<float>(head_size)); }

Operand scratch(const float* data, int64_t columns, bool transposed) {
  return {data, 0, columns, DType::kFloat32, transposed};
}

}  // namespace

void attention_forward(const Attention& attention, void* out, float* log_sums, Executor& executor) {
  const int64_t T = attention.time, D = attention.head_size;
  const float scale = scale_of(attention.head_size);
  parallel_for(executor, attention.batch * attention.heads, [&](int64_t index) {
    const Head head(attention, index);
    const int64_t block = queries_of_block(T);
    const Workspace workspace(block * T);
    float* const scores = workspace.data();
    for (int64_t first = 0; first < T; first += block) {
      const int64_t queries = std::min(block, T - first), keys = first + queries;
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
  const float scale = scale_of(attention.head_size);
  const bool narrow = attention.dtype == DType::kBFloat16;
  parallel_for(executor, attention.batch * attention.heads, [&](int64_t index) {
    const Head head(attention, index);
    const int64_t most_queries = queries_of_block(T), block = most_queries * T;
    const Workspace workspace(2 * block + 2 * T * D);
    float* const weights = workspace.data();
    float* const dscores = weights + block;
    float* const dk = dscores + block;
    float* const dv = dk + T * D;
    std::fill_n(dk, 2 * T * D, 0.0f);
    for (int64_t first = 0; first < T; first += most_queries) {
      const int64_t queries = std::min(most_queries, T - first), keys = first + queries;
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

void cached_attention(const CachedAttention& attention, void* out, Executor& executor) {
  const int64_t T = attention.time, D = attention.head_size, width = attention.heads * D;
  const float scale = scale_of(D);
  const DType dtype = attention.dtype;
  const bool narrow = dtype == DType::kBFloat16;
  const Implementation& implementation = of_one_head(*attention.implementation);
  parallel_for(executor, attention.batch * attention.heads, [&](int64_t index) {
    const int64_t batch = index / attention.heads, head = index % attention.heads;
    const int64_t cached = index * attention.positions * D;
    const int64_t block = std::min(queries_of_block(attention.start + T), T);
    const Workspace workspace(block * (attention.start + T) + D);
    float* const sums = workspace.data();
    float* const scores = sums + D;
    for (int64_t first = 0; first < T; first += block) {
      const int64_t queries = std::min(block, T - first);
      const int64_t keys = attention.start + first + queries;
      const int64_t own = (batch * T + first) * width + head * D;
      product_of_one_head(implementation, attention.precision, queries, keys, D,
                          {attention.q, own, width, dtype, false},
                          {attention.keys, cached, D, dtype, true}, scores, keys,
                          DType::kFloat32);
      for (int64_t i = 0; i < queries; ++i) {
        row_kernels().causal_softmax(keys, attention.start + first + i + 1, scale,
                                     scores + i * keys);
      }
      if (queries > kFewRows) {
        product_of_one_head(implementation, attention.precision, queries, D, keys,
                            scratch(scores, keys, false),
                            {attention.values, cached, D, dtype, false},
                            element(out, dtype, own), width, dtype);
        continue;
      }
      // Few queries: reading the values once is all that takes time.
      for (int64_t i = 0; i < queries; ++i) {
        std::fill_n(sums, D, 0.0f);
        for (int64_t key = 0; key < attention.start + first + i + 1; ++key) {
          row_kernels().add_to(D, narrow, element(attention.values, dtype, cached + key * D),
                               scores[i * keys + key], sums);
        }
        row_kernels().copy(D, sums, narrow, element(out, dtype, own + i * width));
      }
    }
  });
}

}  // namespace gpt2_jax

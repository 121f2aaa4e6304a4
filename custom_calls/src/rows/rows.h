// The row by row computations of a transformer between its products: layer norm, GELU, softmax
// cross-entropy, and the sums of columns. Computed in float32, whether the matrices are float32 or
// bfloat16.
//
// The references are gpt2_jax/ops/norm.py, activation.py and classifier.py.
#pragma once

#include <cstdint>

namespace gpt2_jax {

class Executor;  // only declared: kernel files must include nothing that defines inline functions

// A row-major matrix of float32 or bfloat16.
struct Rows {
  void* data;
  int64_t rows, columns;
  bool narrow;  // bfloat16

  char* row(int64_t i) const { return static_cast<char*>(data) + i * columns * (narrow ? 2 : 4); }
};

// The loops over one row, compiled for an instruction set. Narrow results are rounded to nearest
// even.
struct RowKernels {
  // out = (x - mean) rstd gain + bias
  void (*layer_norm)(int64_t columns, bool narrow, const void* x, const float* gain,
                     const float* bias, void* out);
  // dx = dresidual + the derivative of layer_norm by x. Adds this row's part to dgain and dbias.
  void (*layer_norm_backward)(int64_t columns, bool narrow, const void* x, const float* gain,
                              const void* dout, const void* dresidual, void* dx, float* dgain,
                              float* dbias);
  void (*gelu)(int64_t count, bool narrow, const void* x, void* out);
  void (*gelu_backward)(int64_t count, bool narrow, const void* x, const void* dout, void* dx);
  // Returns the loss of one row of logits and sets dlogits to scale times its gradient. Only the
  // first vocab_size columns count; dlogits is zero in the others. dlogits may be the same memory
  // as logits when it is not narrow.
  float (*softmax_cross_entropy)(int64_t columns, int64_t vocab_size, const float* logits,
                                 int32_t target, float scale, bool narrow, void* dlogits);
  // Replaces the scores of one query by its attention weights: the softmax of scale times the first
  // `visible` scores, and zeros for the others. Returns the log of the sum of the exponentials.
  float (*causal_softmax)(int64_t count, int64_t visible, float scale, float* scores);
  // Replaces the scores by the same weights, computed from that log-sum. Replaces the derivatives
  // of the weights, given in dscores, by those of the scores. output_product is the dot product of
  // the query's output and its derivative.
  void (*causal_softmax_backward)(int64_t count, int64_t visible, float scale, float log_sum,
                                  float output_product, float* scores, float* dscores);
  float (*dot)(int64_t count, bool narrow, const void* a, const void* b);
  // The dot products of `rows` rows of x, one after the other, with y: `count` elements each. Only
  // y may be narrow.
  void (*dots)(int64_t rows, int64_t count, const float* x, bool narrow, const void* y,
               float* sums);
  void (*copy)(int64_t count, const float* x, bool narrow, void* out);
  // sums += factor x
  void (*add_to)(int64_t count, bool narrow, const void* x, float factor, float* sums);
  double (*sum_of_squares)(int64_t count, const float* x);
};

// The best table for these CpuFeatures; the best for this CPU.
const RowKernels& best_row_kernels(uint32_t features);
const RowKernels& row_kernels();

// These distribute rows over the executor's threads. Sums over rows are made in blocks of a fixed
// number of rows and added in order, so the bits do not depend on the number of threads.
void layer_norm(const Rows& x, const float* gain, const float* bias, const Rows& out,
                Executor& executor);
void layer_norm_backward(const Rows& x, const float* gain, const Rows& dout, const Rows& dresidual,
                         const Rows& dx, float* dgain, float* dbias, Executor& executor);
void gelu(const Rows& x, const Rows& out, Executor& executor);
void gelu_backward(const Rows& x, const Rows& dout, const Rows& dx, Executor& executor);
// logits are float32. Sets one loss for each row.
void softmax_cross_entropy(const Rows& logits, const int32_t* targets, int64_t vocab_size,
                           float scale, float* losses, const Rows& dlogits, Executor& executor);
void column_sums(const Rows& x, float* sums, Executor& executor);
// Sums in double over pieces of a fixed size: the same bits for any number of threads.
double sum_of_squares(int64_t count, const float* x, Executor& executor);

// Each is defined in a file of its own, from row_kernels.inc.
extern const RowKernels kRowKernelsGeneric, kRowKernelsAvx2, kRowKernelsAvx512;

}  // namespace gpt2_jax

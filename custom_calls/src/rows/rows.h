// What a transformer does row by row between its products, in float32 inside whatever is stored:
// layer norm, GELU, softmax cross-entropy, and sums down the columns.
//
// Formulas: gpt2_jax/models/gpt2.py and classifier.py, which are the reference.
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
  // dx = dresidual + the derivative of layer_norm; dgain and dbias are added to.
  void (*layer_norm_backward)(int64_t columns, bool narrow, const void* x, const float* gain,
                              const void* dout, const void* dresidual, void* dx, float* dgain,
                              float* dbias);
  void (*gelu)(int64_t count, bool narrow, const void* x, void* out);
  void (*gelu_backward)(int64_t count, bool narrow, const void* x, const void* dout, void* dx);
  // The loss of one row of logits, of which the first vocab_size count, and dlogits = scale times
  // its gradient, zero beyond them. dlogits may be logits when it is not narrow.
  float (*softmax_cross_entropy)(int64_t columns, int64_t vocab_size, const float* logits,
                                 int32_t target, float scale, bool narrow, void* dlogits);
  // Attention weights of one query, in place of its scores: softmax of scale times the first
  // `visible` of them, zero beyond. Returns the log of the sum of the exponentials.
  float (*causal_softmax)(int64_t count, int64_t visible, float scale, float* scores);
  // The same weights from that log-sum; and dscores, in place of the derivatives of the weights,
  // where output_product is the query's output times its derivative.
  void (*causal_softmax_backward)(int64_t count, int64_t visible, float scale, float log_sum,
                                  float output_product, float* scores, float* dscores);
  float (*dot)(int64_t count, bool narrow, const void* a, const void* b);
  void (*copy)(int64_t count, const float* x, bool narrow, void* out);
  void (*add_to)(int64_t count, bool narrow, const void* x, float* sums);
  double (*sum_of_squares)(int64_t count, const float* x);
};

// The best for these CpuFeatures, and for this CPU.
const RowKernels& best_row_kernels(uint32_t features);
const RowKernels& row_kernels();

// Rows over the executor's threads; sums over rows are made in blocks of a fixed number of them, in
// order, so the bits do not depend on the threads.
void layer_norm(const Rows& x, const float* gain, const float* bias, const Rows& out,
                Executor& executor);
void layer_norm_backward(const Rows& x, const float* gain, const Rows& dout, const Rows& dresidual,
                         const Rows& dx, float* dgain, float* dbias, Executor& executor);
void gelu(const Rows& x, const Rows& out, Executor& executor);
void gelu_backward(const Rows& x, const Rows& dout, const Rows& dx, Executor& executor);
// losses: one a row, of logits (float32) and targets.
void softmax_cross_entropy(const Rows& logits, const int32_t* targets, int64_t vocab_size,
                           float scale, float* losses, const Rows& dlogits, Executor& executor);
void column_sums(const Rows& x, float* sums, Executor& executor);
// In double over pieces of a fixed size: the same bits for any number of threads.
double sum_of_squares(int64_t count, const float* x, Executor& executor);

// Defined one a file from row_kernels.inc.
extern const RowKernels kRowKernelsGeneric, kRowKernelsAvx2, kRowKernelsAvx512;

}  // namespace gpt2_jax

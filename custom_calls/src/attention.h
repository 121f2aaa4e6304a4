// Causal self-attention of all heads in one call, its products made by one of the matmul rungs.
//
//   out = softmax(q k^T / sqrt(D), positions up to one's own) v     for each sequence and head
//
// Reference: gpt2_jax/ops/attention.py. The scores are made for a block of queries at a time and never
// stored whole; the backward pass makes them again from the log-sums of the forward pass.
#pragma once

#include <cstdint>

#include "executor.h"
#include "matmul.h"
#include "registry.h"

namespace gpt2_jax {

struct Attention {
  int64_t batch, time, heads, head_size;
  const void* qkv;  // batch x time x (q, k, v) x heads x head_size
  DType dtype;      // of qkv, out and their derivatives
  const Implementation* implementation;
  Precision precision;
};

// out: batch x time x heads x head_size. log_sums: batch x heads x time, of the scores'
// exponentials. The bits do not depend on the threads. Throws std::bad_alloc.
void attention_forward(const Attention& attention, void* out, float* log_sums, Executor& executor);

// dqkv as qkv, from dout and what the forward pass returned.
void attention_backward(const Attention& attention, const void* out, const float* log_sums,
                        const void* dout, void* dqkv, Executor& executor);

}  // namespace gpt2_jax

// Causal self-attention of all heads in one call, its products made by one of the matmul rungs.
//
//   out = softmax(q k^T / sqrt(D) + causal mask) v     for each sequence and head
//
// Each head is an item for our threads. A library with threads of its own would compute one head
// after another, so `simd` takes its place.
//
// Reference: gpt2_jax/ops/attention.py. The scores are computed for one block of queries at a time
// and never stored whole; the backward pass computes them again from the log-sums of the forward
// pass.
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

// Sets out (batch x time x heads x head_size) and log_sums (batch x heads x time): the logarithm of
// the sum of the exponentials of a query's scores. The bits do not depend on the number of threads.
// Throws std::bad_alloc.
void attention_forward(const Attention& attention, void* out, float* log_sums, Executor& executor);

// Sets dqkv, which has qkv's shape, from dout and the forward pass's out and log_sums.
void attention_backward(const Attention& attention, const void* out, const float* log_sums,
                        const void* dout, void* dqkv, Executor& executor);

// Attention of new queries over cached keys and values, when a text is made token by token.
struct CachedAttention {
  int64_t batch, time, heads, head_size;
  int64_t positions;  // of the cache
  int64_t start;      // position of the first query; each query sees the positions up to its own
  const void* q;      // batch x time x heads x head_size
  const void* keys;   // batch x heads x positions x head_size
  const void* values;  // like the keys
  DType dtype;         // of all, and of out
  const Implementation* implementation;
  Precision precision;
};

// Sets out, which has q's shape. start + time must not exceed the positions. The bits do not depend
// on the number of threads. Throws std::bad_alloc.
void cached_attention(const CachedAttention& attention, void* out, Executor& executor);

}  // namespace gpt2_jax

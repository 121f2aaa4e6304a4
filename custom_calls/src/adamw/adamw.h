// AdamW over flat buffers in one pass: the update's formula and its kernels.
//
// The reference is gpt2_jax/buffer/adamw.py; the formula is llm.c's, llmc/adamw.cuh.
#pragma once

#include <cstdint>

namespace gpt2_jax {

class Executor;  // only declared: kernel files must include nothing that defines inline functions

// Constants of one update, the same for every element.
struct AdamWConstants {
  float gradient_scale;  // factor that clips the gradient
  float learning_rate;
  float beta1, beta2;
  float correction1, correction2;  // 1 / (1 - beta^t)
  float epsilon;
};

// Elements [start, stop) of the buffers, all of one weight decay.
struct DecaySpan {
  int64_t start, stop;
  float weight_decay;
};

// For each of `count` elements, in float32:
//
//   g = gradient * gradient_scale
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   p = p - learning_rate (m correction1 / (sqrt(v correction2) + epsilon) + weight_decay p)
using AdamWKernel = void (*)(int64_t count, const AdamWConstants& constants, float weight_decay,
                             const float* gradients, float* params, float* m, float* v);

// The best kernel for these CpuFeatures.
AdamWKernel best_adamw_kernel(uint32_t features);

// The buffers are updated in place, and only within the spans, which are in order.
struct AdamWUpdate {
  int64_t count;
  const float* gradients;
  float *params, *m, *v;
  const DecaySpan* spans;
  int64_t num_spans;
};
void adamw_update(const AdamWUpdate& update, const AdamWConstants& constants, Executor& executor);

// Each is defined in a file of its own, compiled for its instruction set from adamw_kernel.inc.
void adamw_generic(int64_t, const AdamWConstants&, float, const float*, float*, float*, float*);
void adamw_avx2(int64_t, const AdamWConstants&, float, const float*, float*, float*, float*);
void adamw_avx512(int64_t, const AdamWConstants&, float, const float*, float*, float*, float*);

}  // namespace gpt2_jax

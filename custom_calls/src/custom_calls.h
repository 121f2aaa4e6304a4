// The library's whole surface: what Python finds in it by name. C linkage, nothing else exported.
#pragma once

#if defined(__GNUC__)
#define GPT2_JAX_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define GPT2_JAX_EXPORT extern "C"
#endif

struct XLA_FFI_Error;
struct XLA_FFI_CallFrame;

// XLA FFI handlers (CPU), to be registered as targets of any name. Arguments other than said here
// are INVALID_ARGUMENT with what was expected and what was found; a rung that refuses is
// UNIMPLEMENTED with its reason; memory that cannot be had is RESOURCE_EXHAUSTED.
//
// The product:
//
//   out (m x n) = op(a) (m x k) . op(b) (k x n)
//
//   arguments   a, b: f32 or bf16, of any rank. Element (i, j) of the stored matrix is element
//               offset + i * columns + j of the row-major array. An array of rank 2 or more must
//               have the matrix's columns as its last dimension; one of rank 1 is a flat buffer.
//   result      out: f32 or bf16, m * n elements, last dimension n when of rank 2 or more
//   attributes  m, n, k                   int64
//               transpose_a, transpose_b  int64, 0 or 1: a is stored k x m, b is stored n x k
//               a_offset, b_offset        int64, elements
//               implementation            string, a rung's name
//               precision                 string, a name of matmul.h's Precision
//               num_threads               int64, at least 1, the calling thread included
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_matmul(XLA_FFI_CallFrame* call_frame);

// The product plus a bias, out = op(a) . op(b) + bias, the bias added to every row's float32 sums
// before they are rounded. As gpt2_jax_matmul, and
//
//   argument    bias: f32 of rank 1, after a and b; n elements from element bias_offset on. A flat
//               buffer of parameters can be b and bias at once
//   attribute   bias_offset               int64, elements
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_matmul_bias(XLA_FFI_CallFrame* call_frame);

// The product written into, or added to, a part of a flat buffer, all else of which is kept:
// out = target, then out[out_offset ... + m * n] = or += op(a) . op(b). As gpt2_jax_matmul, and
//
//   argument    target: f32 of rank 1, after a and b. Where XLA aliases it to out, which it should,
//               nothing is copied; otherwise target is copied to out first, whole
//   results     out: of target's type and shape. Neither a nor b may lie in the part written;
//               squares: f32, one element, the sum of the squares of what is in that part then
//   attributes  out_offset                int64, elements
//               accumulate                int64, 0 or 1: written, or added
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_matmul_into(XLA_FFI_CallFrame* call_frame);

// Small pieces written into, or added to, their places in a flat buffer.
//
//   arguments   target: f32 of rank 1; then any number of f32 pieces
//   result      out: target's new content; aliased to target, which it should be, nothing is copied
//   attributes  offsets                   int64 array, elements: where each piece begins
//               accumulate                int64, 0 or 1: written, or added
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_write_into(XLA_FFI_CallFrame* call_frame);

// Its first argument as it is, at a time of the caller's choice: XLA sees a new value that cannot
// be had before the others. XLA's own barriers are gone when its CPU compiler orders the calls.
//
//   arguments   x: of any type; then any number of others, which are not read
//   result      out: as x; aliased to x, which it should be, nothing is copied
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_barrier(XLA_FFI_CallFrame* call_frame);

// Rows added, one after another, to the rows of a matrix in a flat buffer that indices name.
//
//   arguments   target: f32 of rank 1; indices: s32; rows: f32 or bf16, one for each index
//   results     out: target's new content, as above; change: f32, one element, by which the sum
//               of the squares of out is more than target's
//   attribute   out_offset                int64, elements: where the matrix begins
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_add_rows_into(XLA_FFI_CallFrame* call_frame);

// The sums of the squares of spans of a flat buffer, in double over blocks of a fixed size.
//
//   argument    values: f32 of any rank
//   result      sums: f32, one a span
//   attributes  spans                     int64 array, elements: start and stop of each
//               num_threads               int64
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_sums_of_squares(XLA_FFI_CallFrame* call_frame);

// Causal self-attention of all heads; attention.h has the formula. All f32 or all bf16 but
// log_sums.
//
//   forward     qkv [batch,time,3 channels] -> out [batch,time,channels],
//               log_sums f32 [batch,heads,time]
//   backward    qkv, out, log_sums, dout -> dqkv
//   attributes  num_heads int64; implementation, precision: of the products, as gpt2_jax_matmul's;
//               num_threads int64
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_attention(XLA_FFI_CallFrame* call_frame);
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_attention_backward(XLA_FFI_CallFrame* call_frame);

// What happens row by row between the products; rows/rows.h has the formulas. Matrices are f32 or
// bf16, all of a call's of one dtype but where f32 is said; their last dimension is the columns,
// all others are rows. Attribute: num_threads int64.
//
//   layer_norm             x, gain f32, bias f32 -> out
//   layer_norm_backward    x, gain f32, dout, dresidual -> dx = dresidual + ...,
//                          dgain f32, dbias f32
//   gelu                   x -> out
//   gelu_backward          x, dout -> dx
//   softmax_cross_entropy  logits f32, targets s32 -> losses f32 (one a row), dlogits f32 or bf16
//                          attributes vocab_size int64 (columns beyond it are padding),
//                          scale float (of dlogits)
//   column_sums            x -> sums f32
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_layer_norm(XLA_FFI_CallFrame* call_frame);
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_layer_norm_backward(XLA_FFI_CallFrame* call_frame);
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_gelu(XLA_FFI_CallFrame* call_frame);
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_gelu_backward(XLA_FFI_CallFrame* call_frame);
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_softmax_cross_entropy(XLA_FFI_CallFrame* call_frame);
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_column_sums(XLA_FFI_CallFrame* call_frame);

// One AdamW update of flat buffers in one pass; adamw/adamw.h has the formula.
//
//   arguments   gradients, params, m, v: f32, of one length; scalars: f32, 5 elements: gradient
//               scale, learning rate, 1 / (1 - beta1^t), 1 / (1 - beta2^t), and 0 to leave the
//               buffers as they are, else 1
//   results     params, m, v. Where XLA aliases them to the arguments, which it should, nothing is
//               copied
//   attributes  decay_spans               int64 array: start and stop of each span that decays
//               weight_decay, beta1, beta2, epsilon  float
//               num_threads               int64
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_adamw(XLA_FFI_CallFrame* call_frame);

// Where OpenBLAS is: the path of the shared library in the PyPI package scipy-openblas32. To be
// called before `describe`, which says what is wrong with it.
GPT2_JAX_EXPORT void gpt2_jax_use_openblas(const char* path);

// What this library is and what it can do on this machine, as one JSON object:
//
//   {"version": "0.1.0", "xla_ffi_api": "0.1",
//    "implementations": [{"name": "naive", "available": true, "reason": "",
//                         "precisions": ["F32_F32_F32", ... of f32 operands]}, ...],
//    "cpu_features": {"seen": ["avx2", ...], "allowed": [...], "mask": "avx2" or null,
//                     "unknown": ["names in the mask that are no feature"]},
//    "kernel": "f32_6x16_avx2"}
//
// The text lives as long as the library; the caller must not free it.
GPT2_JAX_EXPORT const char* gpt2_jax_custom_calls_describe();

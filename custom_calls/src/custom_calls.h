// The library's whole interface. These functions have C linkage; nothing else is exported.
#pragma once

#if defined(__GNUC__)
#define GPT2_JAX_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define GPT2_JAX_EXPORT extern "C"
#endif

struct XLA_FFI_Error;
struct XLA_FFI_CallFrame;

// XLA FFI handlers (CPU), to be registered as targets of any name. Their errors:
//
//   INVALID_ARGUMENT    an argument is not as described here: what was expected, what was found
//   UNIMPLEMENTED       the rung does not compute this product: its reason
//   RESOURCE_EXHAUSTED  out of memory
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

// The product plus a bias: out = op(a) . op(b) + bias. The bias is added to every row's float32
// sums before they are rounded. Like gpt2_jax_matmul, with these besides:
//
//   argument    bias: f32 of rank 1, after a and b; n elements from element bias_offset on. One
//               flat buffer of parameters can be both b and bias
//   attribute   bias_offset               int64, elements
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_matmul_bias(XLA_FFI_CallFrame* call_frame);

// The product written into, or added to, a part of a flat buffer; the rest of the buffer is kept.
// out = target, then out[out_offset ... + m * n] = or += op(a) . op(b). Like gpt2_jax_matmul, with
// these besides:
//
//   argument    target: f32 of rank 1, after a and b. XLA should alias it to out: then nothing is
//               copied. Otherwise all of target is copied to out first
//   results     out: of target's type and shape. Neither a nor b may lie in the part written;
//               squares: f32, one element: the sum of the squares of that part's new elements
//   attributes  out_offset                int64, elements
//               accumulate                int64, 0: written, 1: added
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_matmul_into(XLA_FFI_CallFrame* call_frame);

// Small pieces written into, or added to, their places in a flat buffer.
//
//   arguments   target: f32 of rank 1; then any number of f32 pieces
//   result      out: target's new content. XLA should alias it to target: then nothing is copied
//   attributes  offsets                   int64 array, elements: where each piece begins
//               accumulate                int64, 0: written, 1: added
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_write_into(XLA_FFI_CallFrame* call_frame);

// Returns x unchanged, and delays it until the other arguments exist: to XLA the result is a new
// value that depends on all of them. XLA's own optimization barriers cannot do this: its CPU
// compiler has removed them by the time it orders the calls.
//
//   arguments   x: of any type; then any number of others, which are not read
//   result      out: x. XLA should alias it to x: then nothing is copied
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_barrier(XLA_FFI_CallFrame* call_frame);

// Adds rows[i] to row indices[i] of a matrix that lies in a flat buffer, for one i after another.
//
//   arguments   target: f32 of rank 1; indices: s32; rows: f32 or bf16, one for each index
//   results     out: target's new content, aliased as above; change: f32, one element: the sum of
//               the squares of out less that of target
//   attribute   out_offset                int64, elements: where the matrix begins
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_add_rows_into(XLA_FFI_CallFrame* call_frame);

// The sum of the squares of each span of a flat buffer, summed in double over blocks of a fixed
// size.
//
//   argument    values: f32 of any rank
//   result      sums: f32, one a span
//   attributes  spans                     int64 array, elements: start and stop of each
//               num_threads               int64
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_sums_of_squares(XLA_FFI_CallFrame* call_frame);

// Causal self-attention of all heads; attention.h has the formula. log_sums is f32; the others are
// all f32 or all bf16.
//
//   forward     qkv [batch,time,3 channels] -> out [batch,time,channels],
//               log_sums f32 [batch,heads,time]
//   backward    qkv, out, log_sums, dout -> dqkv
//   attributes  num_heads int64; implementation and precision of the products, as in
//               gpt2_jax_matmul; num_threads int64
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_attention(XLA_FFI_CallFrame* call_frame);
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_attention_backward(XLA_FFI_CallFrame* call_frame);

// Attention of new queries over cached keys and values; start is where the first query stands.
//
//   arguments   q [batch,time,channels], keys and values [batch,heads,positions,head size]: all f32
//               or all bf16; start s32, one element
//   result      out, like q
//   attributes  implementation and precision of the products, as in gpt2_jax_matmul; num_threads
//               int64
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_cached_attention(XLA_FFI_CallFrame* call_frame);

// The row by row computations between the products; rows/rows.h has the formulas. The matrices of a
// call are all f32 or all bf16, except where f32 is written below. The last dimension is the
// columns, all others are rows. Attribute: num_threads int64.
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
//               scale, learning rate, 1 / (1 - beta1^t), 1 / (1 - beta2^t), and 1 to update or 0 to
//               leave the buffers unchanged
//   results     params, m, v. XLA should alias them to the arguments: then nothing is copied
//   attributes  decay_spans               int64 array: start and stop of each span that decays
//               weight_decay, beta1, beta2, epsilon  float
//               num_threads               int64
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_adamw(XLA_FFI_CallFrame* call_frame);

// The number of this interface, which gpt2_jax/ops/cpu/library.py has too: the package refuses a
// library of another number, which an earlier build left behind. Raise both when a symbol, or a
// handler's arguments, attributes or meaning change.
#define GPT2_JAX_INTERFACE 1
GPT2_JAX_EXPORT int gpt2_jax_custom_calls_interface();

// Tells the library where OpenBLAS is: the path of the shared library in the PyPI package
// scipy-openblas32. Call it before `describe`, which reports a library that cannot be loaded.
GPT2_JAX_EXPORT void gpt2_jax_use_openblas(const char* path);

// The library's version and what it can use on this machine, as one JSON object:
//
//   {"version": "0.1.0", "xla_ffi_api": "0.1",
//    "implementations": [{"name": "naive", "available": true, "reason": "",
//                         "precisions": ["F32_F32_F32", ... of f32 operands]}, ...],
//    "cpu_features": {"seen": ["avx2", ...], "allowed": [...], "mask": "avx2" or null,
//                     "unknown": ["names in the mask that are no feature"]},
//    "kernel": "f32_6x16_avx2", "bfloat16_kernel": "f32_6x16_avx2"}
//
// The text lives as long as the library; the caller must not free it.
GPT2_JAX_EXPORT const char* gpt2_jax_custom_calls_describe();

// What this machine can do at most with so many threads, measured in about a second, as one JSON
// object; nullptr without the memory (256 MiB) or the threads for it. Products in GFLOP/s by the
// fastest kernel on operands in L1, and memory in GB/s read and written together:
//
//   {"F32_F32_F32": 230.1, "BF16_BF16_F32": 440.2, "memory": 41.5}
//
// The text is valid until the thread's next call.
GPT2_JAX_EXPORT const char* gpt2_jax_custom_calls_rates(int num_threads);

// The cotangent of x in y = gelu(x) w^T, with GELU's tanh approximation: (dy w) * gelu'(x), by one
// product of cuBLASLt's (platform CUDA). All are bf16 matrices but the workspace.
//
//   arguments   dy (M, O), w (O, I), x (M, I)
//   results     dx (M, I); workspace u8, of which cuBLASLt uses what it likes
//   attributes  tune                      int64: not 0 to time cuBLASLt's algorithms when a shape
//                                         comes first (outside of a CUDA graph's recording), and to
//                                         take the fastest; 0 for cuBLASLt's own favourite
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_cublas_gelu_backward(XLA_FFI_CallFrame* call_frame);

// Opens cuBLASLt: `driver` is the file name of CUDA's driver, `path` that of cuBLASLt. The reason when
// it fails, valid until the thread's next call; else null.
GPT2_JAX_EXPORT const char* gpt2_jax_cublas_load(const char* driver, const char* path);

// Launches a kernel of CUDA's on XLA's stream (platform CUDA). The kernel takes the addresses of all
// arguments, then those of all results, on the device.
//
//   arguments   any buffers
//   results     any buffers
//   attributes  kernel                    string, a name that gpt2_jax_cuda_load was given
//               blocks, threads           int64, of a grid and of a block of one dimension
//               shared_bytes              int64, shared memory of a block
GPT2_JAX_EXPORT XLA_FFI_Error* gpt2_jax_cuda_launch(XLA_FFI_CallFrame* call_frame);

// Makes a kernel known by `name`: the function `symbol` of `image`, machine code of a GPU of this
// machine. `driver` is the file name of CUDA's driver. The reason when it fails, valid until the
// thread's next call; else null. A name that is known stays as it is.
GPT2_JAX_EXPORT const char* gpt2_jax_cuda_load(const char* driver, const char* name,
                                               const char* symbol, const void* image);

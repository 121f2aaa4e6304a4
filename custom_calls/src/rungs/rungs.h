// The rungs of the ladder, one file each. registry.h describes `run`.
#pragma once

#include <string>

#include "executor.h"
#include "matmul.h"

namespace gpt2_jax {

// Three loops, one sum at a time: the reference that every other rung is compared with.
void run_naive(const Matmul& matmul, Executor& executor);

// Portable C++ on blocks that fit the caches.
void run_blocked(const Matmul& matmul, Executor& executor);

// Packed panels and this CPU's best micro-kernel, on the calling thread alone.
void run_simd(const Matmul& matmul, Executor& executor);

// The same over the executor's threads, with the same bits for any number of them.
void run_threaded(const Matmul& matmul, Executor& executor);

// bfloat16 products on Intel's AMX tiles, over the executor's threads, with the same bits for any
// number of them. Denormal operands, parts and results count as zeros.
void run_amx(const Matmul& matmul, Executor& executor);

// Apple's Accelerate, on threads of its own. With an executor of one thread, and on macOS 15 or
// newer, on the calling thread alone.
std::string accelerate_unavailable();
void run_accelerate(const Matmul& matmul, Executor& executor);

// OpenBLAS from the path given to gpt2_jax_use_openblas. It uses as many threads of its own as the
// executor has, at most OPENBLAS_NUM_THREADS. One product at a time.
std::string openblas_unavailable();
void run_openblas(const Matmul& matmul, Executor& executor);

}  // namespace gpt2_jax

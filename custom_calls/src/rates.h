// What this machine can do at most: the rates of its kernels on panels in L1, and of memory. A
// training step is held against them.
#pragma once

#include "kernels/kernel.h"

namespace gpt2_jax {

// Both are measured for about `seconds`, on `num_threads` threads at once, over the threads' CPU time.

// GFLOP/s of a kernel.
double kernel_gflops(const Kernel& kernel, int num_threads, double seconds);

// GB/s of memory, read and written together: 256 MiB changed in place. Throws std::bad_alloc.
double memory_gbytes(int num_threads, double seconds);

// The kernel that multiplies fastest here in a precision, F32_F32_F32 or BF16_BF16_F32.
const Kernel& fastest_kernel(Precision precision);

}  // namespace gpt2_jax

// The tests' OpenBLAS: GPT2_JAX_OPENBLAS is the path of scipy-openblas32's shared library.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "custom_calls.h"

namespace gpt2_jax {

// Returns false and prints a line when the variable is not set.
inline bool use_openblas_of_environment() {
  const char* path = std::getenv("GPT2_JAX_OPENBLAS");
  if (path == nullptr) {
    std::printf("SKIPPED: openblas, for want of GPT2_JAX_OPENBLAS=<its library>\n");
    return false;
  }
  gpt2_jax_use_openblas(path);
  return true;
}

}  // namespace gpt2_jax

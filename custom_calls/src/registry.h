// The ladder: every implementation by name, with its reason when it cannot be used.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "executor.h"
#include "matmul.h"

namespace gpt2_jax {

struct Implementation {
  const char* name;
  // Why this machine cannot run it; empty when it can.
  std::string (*unavailable)();
  // Why it will not compute this product; empty when it will. Asked only when available.
  std::string (*refuse)(const Matmul& matmul);
  // Computes the product; m, n and k are at least 1. Throws std::bad_alloc when there is no memory for
  // its workspace.
  void (*run)(const Matmul& matmul, Executor& executor);
  // True when run() sets Matmul::sum_of_squares itself, while the sums are in registers.
  bool sums_squares = false;
  // True for another library, which has threads of its own and computes one product at a time: work
  // that is already cut into items for our threads, as attention's heads are, takes `simd` instead.
  bool own_threads = false;
};

// Computes the product, and the sum of squares when matmul asks for it. m, n and k may be 0.
void multiply(const Implementation& implementation, const Matmul& matmul, Executor& executor);

// In order: the plainest first, other people's libraries last.
const std::vector<Implementation>& implementations();

// nullptr when there is none of that name.
const Implementation* find_implementation(std::string_view name);

// "naive, blocked, ...", for messages.
std::string implementation_names();

}  // namespace gpt2_jax

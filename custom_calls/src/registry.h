// The ladder: every implementation by name, and why it will not do when it will not.
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
  // Computes the product. Throws std::bad_alloc when there is no memory for its workspace.
  void (*run)(const Matmul& matmul, Executor& executor);
  // Whether it sets Matmul::sum_of_squares on the way out, while the sums are in registers.
  bool sums_squares = false;
};

// The product, and the sum of squares where it is asked for, whoever adds it up.
void multiply(const Implementation& implementation, const Matmul& matmul, Executor& executor);

// From the plainest up; other people's libraries last.
const std::vector<Implementation>& implementations();

// nullptr when there is none of that name.
const Implementation* find_implementation(std::string_view name);

// "naive, blocked, ...", for messages.
std::string implementation_names();

}  // namespace gpt2_jax

// Every product of one GPT-2 124M training step.
#pragma once

#include <cstdint>
#include <string>

namespace gpt2_jax {

// Times forward, dx and dw of each weight with every rung and precision (of the comma list `rungs`,
// or all), operands and results as the training step has them, and prints a table.
void bench_gpt2_products(int64_t tokens, int num_threads, const std::string& rungs);

}  // namespace gpt2_jax

// Every product of one GPT-2 124M training step.
#pragma once

#include <cstdint>
#include <string>

namespace gpt2_jax {

// Times forward, dx and dw of each weight with every rung and precision, and prints a table.
// Operands and results have the training step's types and places. `rungs` is a comma list; empty
// means all.
void bench_gpt2_products(int64_t tokens, int num_threads, const std::string& rungs);

}  // namespace gpt2_jax

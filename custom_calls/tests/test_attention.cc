// Which implementation computes attention's products, and empty sizes. Its values are tested in
// Python, against the plain attention.
#include "attention.h"

#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "thread_pool.h"

namespace gpt2_jax {
namespace {

constexpr int64_t kBatch = 2, kTime = 37, kHeads = 3, kHeadSize = 8;

int foreign_products = 0;

const Implementation kForeign = {"foreign",
                                 [] { return std::string(); },
                                 [](const Matmul&) { return std::string(); },
                                 [](const Matmul&, Executor&) { ++foreign_products; },
                                 /*sums_squares=*/false,
                                 /*own_threads=*/true};

struct Results {
  std::vector<float> out, log_sums, dqkv;
};

Results run(const Implementation& implementation, int64_t batch, int64_t time) {
  const int64_t rows = batch * time, width = kHeads * kHeadSize;
  std::vector<float> qkv(3 * rows * width), dout(rows * width);
  for (size_t i = 0; i < qkv.size(); ++i) qkv[i] = static_cast<float>(i * 7 % 23) / 8 - 1;
  for (size_t i = 0; i < dout.size(); ++i) dout[i] = static_cast<float>(i * 5 % 19) / 8 - 1;
  Results results = {std::vector<float>(rows * width), std::vector<float>(batch * kHeads * time),
                     std::vector<float>(qkv.size())};
  const Attention attention = {
      batch,      time,           kHeads, kHeadSize, qkv.data(), DType::kFloat32, &implementation,
      Precision::kF32_F32_F32};
  ThreadPool pool(1);
  PoolExecutor executor(pool, 2);
  attention_forward(attention, results.out.data(), results.log_sums.data(), executor);
  attention_backward(attention, results.out.data(), results.log_sums.data(), dout.data(),
                     results.dqkv.data(), executor);
  return results;
}

// A library with threads of its own computes one product at a time: heads would wait for one
// another.
void test_own_threads() {
  const Results foreign = run(kForeign, kBatch, kTime);
  const Results simd = run(*find_implementation("simd"), kBatch, kTime);
  CHECK(foreign_products == 0, foreign_products << " of attention's products went to the library");
  CHECK(foreign.out == simd.out && foreign.dqkv == simd.dqkv, "the bits of simd");
  for (const char* name : {"openblas", "accelerate"}) {
    CHECK(find_implementation(name)->own_threads, name);
  }
}

void test_empty() {
  run(*find_implementation("threaded"), 0, kTime);
  run(*find_implementation("threaded"), kBatch, 0);
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  gpt2_jax::test_own_threads();
  gpt2_jax::test_empty();
  return gpt2_jax::report("test_attention");
}

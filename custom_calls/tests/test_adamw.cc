// AdamW against its formula in double: every kernel that this CPU can run, any number of threads.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "adamw/adamw.h"
#include "check.h"
#include "cpu_features.h"
#include "executor.h"
#include "thread_pool.h"

namespace gpt2_jax {
namespace {

constexpr AdamWConstants kConstants = {0.5f, 3e-4f, 0.9f, 0.95f, 10.0f, 20.0f, 1e-8f};

std::vector<float> random(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

struct Buffers {
  std::vector<float> gradients, params, m, v;

  explicit Buffers(int64_t count)
      : gradients(random(count, 1)),
        params(random(count, 2)),
        m(random(count, 3)),
        v(random(count, 4)) {
    for (float& value : v) value *= value;
  }
};

void test_kernel(AdamWKernel kernel, int64_t count) {
  const Buffers before(count);
  Buffers after = before;
  const float weight_decay = 0.1f;
  kernel(count, kConstants, weight_decay, after.gradients.data(), after.params.data(),
         after.m.data(), after.v.data());
  for (int64_t i = 0; i < count; ++i) {
    const double g = double(before.gradients[i]) * kConstants.gradient_scale;
    const double m = kConstants.beta1 * double(before.m[i]) + (1.0 - kConstants.beta1) * g;
    const double v = kConstants.beta2 * double(before.v[i]) + (1.0 - kConstants.beta2) * g * g;
    const double direction =
        m * kConstants.correction1 / (std::sqrt(v * kConstants.correction2) + kConstants.epsilon) +
        weight_decay * double(before.params[i]);
    const double p = before.params[i] - kConstants.learning_rate * direction;
    // The bound: a few float32 roundings of terms of these sizes.
    const double unit = std::ldexp(8.0, -24);
    CHECK(std::abs(after.m[i] - m) <= unit * (std::abs(before.m[i]) + std::abs(g)),
          "m of element " << i);
    CHECK(std::abs(after.v[i] - v) <= unit * v, "v of element " << i);
    CHECK(std::abs(after.params[i] - p) <=
              unit * (std::abs(before.params[i]) + kConstants.learning_rate * 100),
          "parameter " << i);
  }
}

// The spans' bounds lie inside the blocks that the work is cut into.
void test_update_is_the_kernel_span_by_span(int threads) {
  const int64_t count = (1 << 17) + 777;
  // Between the last two lie elements that stay as they are.
  const DecaySpan spans[] = {{0, 70000, 0.1f}, {70000, 70001, 0.0f}, {90001, count, 0.2f}};
  Buffers expected(count), found(count);
  for (const DecaySpan& span : spans) {
    adamw_generic(span.stop - span.start, kConstants, span.weight_decay,
                  expected.gradients.data() + span.start, expected.params.data() + span.start,
                  expected.m.data() + span.start, expected.v.data() + span.start);
  }
  ThreadPool pool(threads);
  PoolExecutor executor(pool, threads);
  adamw_update({count, found.gradients.data(), found.params.data(), found.m.data(), found.v.data(),
                spans, 3},
               kConstants, executor);
  // All kernels round every operation once and in one order.
  CHECK(found.params == expected.params, "params with " << threads << " threads");
  CHECK(found.m == expected.m, "m with " << threads << " threads");
  CHECK(found.v == expected.v, "v with " << threads << " threads");
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  using namespace gpt2_jax;
  for (const int64_t count : {1, 15, 64, 1001}) {
    test_kernel(adamw_generic, count);
#if defined(__x86_64__)
    if (has_all(cpu_features(), kAvx2Code)) test_kernel(adamw_avx2, count);
    if (has_all(cpu_features(), kAvx512Code)) test_kernel(adamw_avx512, count);
#endif
  }
  for (const int threads : {1, 2, 5}) test_update_is_the_kernel_span_by_span(threads);
  return report("test_adamw");
}

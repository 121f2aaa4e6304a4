// The row by row loops: against their formulas in double, between instruction sets, and with any
// number of threads (the same bits).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "bfloat16.h"
#include "check.h"
#include "cpu_features.h"
#include "executor.h"
#include "rows/rows.h"
#include "thread_pool.h"

namespace gpt2_jax {
namespace {

constexpr double kUnit = 1.0 / (1 << 24);

std::vector<float> random(int64_t count, uint32_t seed, float scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

std::vector<const RowKernels*> all_kernels() {
  std::vector<const RowKernels*> all = {&kRowKernelsGeneric};
#if defined(__x86_64__)
  const CpuFeatures seen = cpu_features_seen();
  if (has_all(seen, kAvx2Code)) all.push_back(&kRowKernelsAvx2);
  if (has_all(seen, kAvx512Code)) all.push_back(&kRowKernelsAvx512);
#endif
  return all;
}

double gelu_of(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

void test_gelu(const RowKernels& kernels) {
  std::vector<float> x = random(1001, 1, 3);
  x[0] = 0, x[1] = 1e-6f, x[2] = -1e-6f, x[3] = 50, x[4] = -50, x[5] = 0.1f, x[6] = -1e15f;
  const std::vector<float> ones(x.size(), 1.0f);
  std::vector<float> out(x.size()), slope(x.size());
  const int64_t count = static_cast<int64_t>(x.size());
  kernels.gelu(count, false, x.data(), out.data());
  kernels.gelu_backward(count, false, x.data(), ones.data(), slope.data());
  for (size_t i = 0; i < x.size(); ++i) {
    CHECK(std::abs(out[i] - gelu_of(x[i])) <= 8 * kUnit * std::abs(x[i]), "gelu of " << x[i]);
    if (x[i] < -100) {
      CHECK(out[i] == 0 && slope[i] == 0, "nothing is left of " << x[i]);
      continue;
    }
    const double h = 1e-4, expected = (gelu_of(x[i] + h) - gelu_of(x[i] - h)) / (2 * h);
    // The difference quotient's own error is h^2; the slope is at most 1.13.
    CHECK(std::abs(slope[i] - expected) <= 1e-7 + 16 * kUnit, "slope at " << x[i]);
  }
}

void test_layer_norm(const RowKernels& kernels, int64_t columns) {
  const std::vector<float> x = random(columns, 2, 2), gain = random(columns, 3);
  const std::vector<float> bias = random(columns, 4), dout = random(columns, 5);
  const std::vector<float> dresidual = random(columns, 6);
  std::vector<float> out(x.size()), dx(x.size()), dgain(x.size(), 1), dbias(x.size(), 2);
  kernels.layer_norm(columns, false, x.data(), gain.data(), bias.data(), out.data());
  kernels.layer_norm_backward(columns, false, x.data(), gain.data(), dout.data(), dresidual.data(),
                              dx.data(), dgain.data(), dbias.data());
  double mean = 0, variance = 0, mean_gradient = 0, mean_product = 0;
  for (const float value : x) mean += value / double(columns);
  for (const float value : x) variance += (value - mean) * (value - mean) / double(columns);
  const double rstd = 1 / std::sqrt(variance + 1e-5);
  for (int64_t i = 0; i < columns; ++i) {
    mean_gradient += double(dout[i]) * gain[i] / double(columns);
    mean_product += double(dout[i]) * gain[i] * (x[i] - mean) * rstd / double(columns);
  }
  const double bound = 64 * kUnit * (columns == 1 ? 1000 : 1);  // one column: rstd is 316
  for (int64_t i = 0; i < columns; ++i) {
    const double n = (x[i] - mean) * rstd;
    CHECK(std::abs(out[i] - (n * gain[i] + bias[i])) <= bound * 8, "layer norm " << i);
    const double expected =
        dresidual[i] + (double(dout[i]) * gain[i] - mean_gradient - n * mean_product) * rstd;
    CHECK(std::abs(dx[i] - expected) <= bound * 8, "its dx " << i);
    CHECK(std::abs(dgain[i] - 1 - dout[i] * n) <= bound * 8, "its dgain is added to " << i);
    CHECK(std::abs(dbias[i] - 2 - dout[i]) <= bound * 8, "its dbias is added to " << i);
  }
}

void test_softmax_cross_entropy(const RowKernels& kernels, int64_t columns, int64_t vocab_size) {
  std::vector<float> logits = random(columns, 7, 5);
  for (int64_t i = vocab_size; i < columns; ++i) logits[i] = 1e30f;  // padding must not count
  const int32_t target = static_cast<int32_t>(vocab_size - 1);
  std::vector<float> dlogits(logits.size());
  const float loss = kernels.softmax_cross_entropy(columns, vocab_size, logits.data(), target, 0.5f,
                                                   false, dlogits.data());
  const double max = *std::max_element(logits.begin(), logits.begin() + vocab_size);
  double sum = 0;
  for (int64_t i = 0; i < vocab_size; ++i) sum += std::exp(logits[i] - max);
  CHECK(std::abs(loss - (std::log(sum) + max - logits[target])) <= 1e-5, "loss " << loss);
  for (int64_t i = 0; i < columns; ++i) {
    const double p = i < vocab_size ? std::exp(logits[i] - max) / sum : 0;
    CHECK(std::abs(dlogits[i] - 0.5 * (p - (i == target))) <= 1e-6 * p + 4 * kUnit * (i == target),
          "dlogits " << i);
  }
  logits[0] = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(kernels.softmax_cross_entropy(columns, vocab_size, logits.data(), target, 0.5f,
                                                 false, dlogits.data())),
        "a NaN must reach the loss");
}

// The results of all functions on random matrices.
std::vector<float> all_results(bool narrow, int threads) {
  const int64_t rows = 37, columns = 600;
  std::vector<float> x = random(rows * columns, 8), dout = random(rows * columns, 9);
  if (narrow) {
    for (std::vector<float>* values : {&x, &dout}) {
      for (int64_t i = 0; i < rows * columns; ++i) {
        const uint16_t low = float_to_bfloat16((*values)[i]);
        std::memcpy(reinterpret_cast<char*>(values->data()) + 2 * i, &low, 2);
      }
    }
  }
  const std::vector<float> gain = random(columns, 10);
  ThreadPool pool(threads);
  PoolExecutor executor(pool, threads);
  std::vector<float> results;
  std::vector<float> out(x.size()), sums(columns), more(columns);
  const auto matrix = [&](std::vector<float>& values) {
    return Rows{values.data(), rows, columns, narrow};
  };
  const auto keep = [&](const std::vector<float>& values) {
    results.insert(results.end(), values.begin(), values.end());
  };
  layer_norm(matrix(x), gain.data(), gain.data(), matrix(out), executor), keep(out);
  layer_norm_backward(matrix(x), gain.data(), matrix(dout), matrix(dout), matrix(out), sums.data(),
                      more.data(), executor);
  keep(out), keep(sums), keep(more);
  gelu(matrix(x), matrix(out), executor), keep(out);
  gelu_backward(matrix(x), matrix(dout), matrix(out), executor), keep(out);
  column_sums(matrix(x), sums.data(), executor), keep(sums);
  return results;
}

template <typename Value>
bool same_bits(const std::vector<Value>& a, const std::vector<Value>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Value)) == 0;
}

void test_sum_of_squares() {
  const int64_t count = (1 << 17) + 5;
  const std::vector<float> values = random(count, 9);
  double expected = 0;
  for (const float value : values) expected += double(value) * value;
  InlineExecutor one;
  const double alone = sum_of_squares(count, values.data(), one);
  CHECK(std::abs(alone - expected) <= 1e-12 * expected, alone << " for " << expected);
  ThreadPool pool(3);
  PoolExecutor three(pool, 3);
  CHECK(sum_of_squares(count, values.data(), three) == alone, "3 threads");
  CHECK(sum_of_squares(0, values.data(), one) == 0, "no values");
}

// They may differ by the roundings that fused multiply-adds avoid.
void test_instruction_sets_agree() {
  const int64_t count = 777;
  const std::vector<float> x = random(count, 11, 4), dout = random(count, 12);
  std::vector<std::vector<float>> found;
  for (const RowKernels* kernels : all_kernels()) {
    std::vector<float> out(4 * count + 1);
    kernels->gelu_backward(count, false, x.data(), dout.data(), out.data());
    kernels->layer_norm(count, false, x.data(), dout.data(), dout.data(), out.data() + count);
    out[4 * count] = kernels->softmax_cross_entropy(count, 700, x.data(), 3, 1.0f, false,
                                                    out.data() + 2 * count);
    kernels->gelu(count, false, x.data(), out.data() + 3 * count);
    found.push_back(out);
  }
  for (const auto& out : found) {
    for (size_t i = 0; i < out.size(); ++i) {
      // The terms are at most 20.
      CHECK(std::abs(out[i] - found[0][i]) <= 4 * 20 * kUnit,
            i << ": " << out[i] << ", generic " << found[0][i]);
    }
  }
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  using namespace gpt2_jax;
  for (const RowKernels* kernels : all_kernels()) {
    test_gelu(*kernels);
    for (const int64_t columns : {1, 15, 64, 768, 1001}) test_layer_norm(*kernels, columns);
    test_softmax_cross_entropy(*kernels, 1, 1);
    test_softmax_cross_entropy(*kernels, 1152, 1027);
    test_softmax_cross_entropy(*kernels, 1024, 1024);
  }
  test_sum_of_squares();
  test_instruction_sets_agree();
  for (const bool narrow : {false, true}) {
    const std::vector<float> alone = all_results(narrow, 1);
    CHECK(same_bits(all_results(narrow, 4), alone), "4 threads");
  }
  return report("test_rows");
}

// GFLOP/s of every rung on one product shape.
//
//   bench_matmul m n k [num_threads = 1] [layout = nn] [dtype = f32]
//
// layout: one letter an operand, n as stored or t transposed: nt is GPT-2's forward product
// (weights stored n x k), nn its input gradient, tn its weight gradient. dtype: f32 or bf16, of
// operands and output. Prints the median of the runs that fit in a second; a rung too slow for the
// whole product is timed on its first rows and marked so.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "bfloat16.h"
#include "cpu_features.h"
#include "kernels/kernel.h"
#include "openblas.h"
#include "registry.h"
#include "thread_pool.h"

namespace {

using namespace gpt2_jax;

// Stored values of one operand or result, as bytes of either dtype.
std::vector<float> storage(int64_t count, DType dtype, uint32_t seed) {
  std::vector<float> values(dtype == DType::kFloat32 ? count : (count + 1) / 2);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float value = static_cast<float>(seed >> 8) / (1 << 24) - 0.5f;
    if (dtype == DType::kFloat32) {
      values[i] = value;
    } else {
      const uint16_t narrow = float_to_bfloat16(value);
      std::memcpy(reinterpret_cast<char*>(values.data()) + 2 * i, &narrow, 2);
    }
  }
  return values;
}

double seconds_of(const Implementation& rung, const Matmul& matmul, Executor& executor) {
  const auto start = std::chrono::steady_clock::now();
  rung.run(matmul, executor);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median_seconds(const Implementation& rung, const Matmul& matmul, Executor& executor) {
  std::vector<double> seconds;
  double total = 0;
  do {
    seconds.push_back(seconds_of(rung, matmul, executor));
    total += seconds.back();
  } while (total < 1 && seconds.size() < 1000);
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s m n k [num_threads] [nn|nt|tn|tt] [f32|bf16]\n", argv[0]);
    return 2;
  }
  Matmul matmul;
  matmul.m = std::atoll(argv[1]);
  matmul.n = std::atoll(argv[2]);
  matmul.k = std::atoll(argv[3]);
  const int num_threads = argc > 4 ? std::max(1, std::atoi(argv[4])) : 1;
  const std::string layout = argc > 5 ? argv[5] : "nn";
  const DType dtype =
      argc > 6 && std::strcmp(argv[6], "bf16") == 0 ? DType::kBFloat16 : DType::kFloat32;

  const auto a = storage(matmul.m * matmul.k, dtype, 1);
  const auto b = storage(matmul.k * matmul.n, dtype, 2);
  auto out = storage(matmul.m * matmul.n, dtype, 3);
  const bool a_transposed = layout[0] == 't', b_transposed = layout[1] == 't';
  matmul.a = {a.data(), 0, a_transposed ? matmul.m : matmul.k, dtype, a_transposed};
  matmul.b = {b.data(), 0, b_transposed ? matmul.k : matmul.n, dtype, b_transposed};
  matmul.out = out.data();
  matmul.out_leading_dimension = matmul.n;
  matmul.out_dtype = dtype;
  if (dtype == DType::kBFloat16) matmul.precision = Precision::kBF16_BF16_F32;

  use_openblas_of_environment();
  // The calling thread works too.
  ThreadPool pool(num_threads - 1);
  PoolExecutor executor(pool, num_threads);
  std::printf("%s, %d thread(s), cpu features %s, kernel %s\n", to_string(matmul).c_str(),
              num_threads, cpu_feature_names(cpu_features()).c_str(),
              best_kernel(cpu_features()).name);
  for (const Implementation& rung : implementations()) {
    if (!rung.unavailable().empty() || !rung.refuse(matmul).empty()) continue;
    Matmul timed = matmul;
    timed.m = std::min<int64_t>(matmul.m, 8);
    const double slice = seconds_of(rung, timed, executor);
    const bool whole = slice * matmul.m / std::max<int64_t>(timed.m, 1) < 3;
    if (whole) timed.m = matmul.m;
    const double seconds = median_seconds(rung, timed, executor);
    const double flops = 2.0 * timed.m * timed.n * timed.k;
    std::printf("%-10s %10.3f ms %9.2f GFLOP/s%s\n", rung.name, seconds * 1e3,
                flops / seconds * 1e-9, whole ? "" : "  (first rows)");
  }
}

// GFLOP/s of the rungs, on one product or on all of a training step.
//
//   bench_matmul m n k [num_threads = 1] [layout = nn] [dtype = f32]
//   bench_matmul --products gpt2 [--tokens 256] [--threads 1] [--rungs amx,threaded]
//
// layout has one letter for each operand: n as stored, t transposed. GPT-2's forward product is nt
// (weights stored n x k), its input gradient nn, its weight gradient tn. dtype, f32 or bf16, is
// that of operands and output. Prints the median of the runs that fit in a second. A rung too slow
// for the whole product is timed on its first rows and marked.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu_features.h"
#include "gpt2_products.h"
#include "kernels/kernel.h"
#include "openblas.h"
#include "registry.h"
#include "thread_pool.h"
#include "timing.h"

namespace {

using namespace gpt2_jax;

int usage(const char* program) {
  std::fprintf(stderr,
               "usage: %s m n k [num_threads] [nn|nt|tn|tt] [f32|bf16]\n"
               "       %s --products gpt2 [--tokens N] [--threads N] [--rungs NAME,NAME]\n",
               program, program);
  return 2;
}

int bench_products(int argc, char** argv) {
  int64_t tokens = 256;
  int threads = 1;
  std::string rungs;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i], value = argv[i + 1];
    if (flag == "--products" && value == "gpt2") continue;
    if (flag == "--tokens") {
      tokens = std::atoll(argv[i + 1]);
    } else if (flag == "--threads") {
      threads = std::atoi(argv[i + 1]);
    } else if (flag == "--rungs") {
      rungs = value;
    } else {
      return usage(argv[0]);
    }
  }
  if (argc % 2 == 0 || tokens < 1 || threads < 1) return usage(argv[0]);
  bench_gpt2_products(tokens, threads, rungs);
  return 0;
}

int bench_shape(int argc, char** argv) {
  Matmul matmul;
  matmul.m = std::atoll(argv[1]);
  matmul.n = std::atoll(argv[2]);
  matmul.k = std::atoll(argv[3]);
  const int num_threads = argc > 4 ? std::max(1, std::atoi(argv[4])) : 1;
  const std::string layout = argc > 5 ? argv[5] : "nn";
  const DType dtype =
      argc > 6 && std::strcmp(argv[6], "bf16") == 0 ? DType::kBFloat16 : DType::kFloat32;

  const Storage a(matmul.m * matmul.k, dtype, 1);
  const Storage b(matmul.k * matmul.n, dtype, 2);
  Storage out(matmul.m * matmul.n, dtype, 3);
  const bool a_transposed = layout[0] == 't', b_transposed = layout[1] == 't';
  matmul.a = {a.data(), 0, a_transposed ? matmul.m : matmul.k, dtype, a_transposed};
  matmul.b = {b.data(), 0, b_transposed ? matmul.k : matmul.n, dtype, b_transposed};
  matmul.out = out.data();
  matmul.out_leading_dimension = matmul.n;
  matmul.out_dtype = dtype;

  use_openblas_of_environment();
  // The calling thread works too.
  ThreadPool pool(num_threads - 1);
  PoolExecutor executor(pool, num_threads);
  std::printf("%d thread(s), cpu features %s, kernel %s\n", num_threads,
              cpu_feature_names(cpu_features()).c_str(), best_kernel(Precision::kF32_F32_F32).name);
  for (const Precision precision : kPrecisions) {
    // BF16_BF16_F32 is timed with bfloat16 operands, the other precisions with float32 ones.
    if ((dtype == DType::kBFloat16) != (precision == Precision::kBF16_BF16_F32)) continue;
    matmul.precision = precision;
    std::printf("%s\n", to_string(matmul).c_str());
    for (const Implementation& rung : implementations()) {
      if (!rung.unavailable().empty() || !rung.refuse(matmul).empty()) continue;
      Matmul timed = matmul;
      timed.m = std::min<int64_t>(matmul.m, 8);
      const double slice = median_seconds(0, [&] { rung.run(timed, executor); });
      const bool whole = slice * matmul.m / std::max<int64_t>(timed.m, 1) < 3;
      if (whole) timed.m = matmul.m;
      const double seconds = median_seconds(1, [&] { rung.run(timed, executor); });
      const double flops = 2.0 * timed.m * timed.n * timed.k;
      std::printf("%-10s %10.3f ms %9.2f GFLOP/s%s\n", rung.name, seconds * 1e3,
                  flops / seconds * 1e-9, whole ? "" : "  (first rows)");
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strncmp(argv[1], "--", 2) == 0) return bench_products(argc, argv);
  return argc < 4 ? usage(argv[0]) : bench_shape(argc, argv);
}

#include "gpt2_products.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "kernels/kernel.h"
#include "operand.h"
#include "rates.h"
#include "registry.h"
#include "schedule.h"
#include "thread_pool.h"
#include "timing.h"

namespace gpt2_jax {
namespace {

struct Weight {
  const char* name;
  int64_t outputs, inputs, layers;
};

constexpr Weight kWeights[] = {{"qkv", 2304, 768, 12},
                               {"attproj", 768, 768, 12},
                               {"fc", 3072, 768, 12},
                               {"fcproj", 768, 3072, 12},
                               {"classifier", 50304, 768, 1}};
constexpr const char* kProducts[] = {"fwd", "dx", "dw"};

// The memory of a step. Weights and their gradients are one flat float32 buffer each, so that every
// product reads its weight from memory, not from a cache. Activations have the precision's dtype.
struct Memory {
  Storage weights, gradients, x, dy;
  Storage y;  // every result but the weights' gradients

  Memory(int64_t tokens, DType dtype)
      : weights(num_weights(), DType::kFloat32, 1),
        gradients(num_weights(), DType::kFloat32, 2),
        x(tokens * 3072, dtype, 3),
        dy(tokens * 50304, dtype, 4),
        y(tokens * 50304, dtype, 5) {}

  static int64_t num_weights() {
    int64_t count = 0;
    for (const Weight& weight : kWeights) count += weight.outputs * weight.inputs * weight.layers;
    return count;
  }
};

// One product of the step: kProducts[kind], with the weight that starts at `offset`.
Matmul product(Memory& memory, int kind, const Weight& weight, int64_t offset, int64_t tokens,
               Precision precision) {
  const Operand w = {memory.weights.data(), offset, weight.inputs, DType::kFloat32, kind == 0};
  const Operand x = {memory.x.data(), 0, weight.inputs, memory.x.dtype(), false};
  const Operand dy = {memory.dy.data(), 0, weight.outputs, memory.dy.dtype(), kind == 2};
  Matmul matmul;
  matmul.precision = precision;
  if (kind == 2) {
    matmul.m = weight.outputs, matmul.n = weight.inputs, matmul.k = tokens;
    matmul.a = dy, matmul.b = x;
    matmul.out = static_cast<float*>(memory.gradients.data()) + offset;
    matmul.out_dtype = DType::kFloat32;
  } else {
    matmul.m = tokens;
    matmul.n = kind == 0 ? weight.outputs : weight.inputs;
    matmul.k = kind == 0 ? weight.inputs : weight.outputs;
    matmul.a = kind == 0 ? x : dy;
    matmul.b = w;
    matmul.out = memory.y.data();
    matmul.out_dtype = memory.y.dtype();
  }
  matmul.out_leading_dimension = matmul.n;
  return matmul;
}

// max |out - float64| / max |float64|, over rows and columns sampled from the whole output.
double max_error(const Matmul& matmul) {
  constexpr int64_t kRows = 7, kColumns = 61;
  double error = 0, largest = 0;
  visit_operand(matmul.a, Precision::kF32_F32_F32, [&](auto a) {
    visit_operand(matmul.b, Precision::kF32_F32_F32, [&](auto b) {
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t i = r * (matmul.m - 1) / (kRows - 1);
        for (int64_t c = 0; c < kColumns; ++c) {
          const int64_t j = c * (matmul.n - 1) / (kColumns - 1);
          double sum = 0;
          for (int64_t p = 0; p < matmul.k; ++p)
            sum += static_cast<double>(a.at(i, p)) * b.at(p, j);
          const int64_t index = i * matmul.out_leading_dimension + j;
          const float found = matmul.out_dtype == DType::kFloat32
                                  ? static_cast<const float*>(matmul.out)[index]
                                  : bfloat16_to_float(static_cast<uint16_t*>(matmul.out)[index]);
          error = std::max(error, std::fabs(found - sum));
          largest = std::max(largest, std::fabs(sum));
        }
      }
    });
  });
  return error / largest;
}

void multiply_nothing(const PanelBlock&) {}

// The rung without its multiplications: only packing and storing. nullptr for rungs that do not
// pack.
std::function<void(const Matmul&, Executor&)> packing_alone(const std::string& rung) {
  if (rung == "amx") {
    return [](const Matmul& matmul, Executor& executor) {
      Kernel kernel = *amx_kernel(matmul.precision);
      kernel.multiply = multiply_nothing;
      packed_matmul(matmul, kernel, executor);
    };
  }
  if (rung == "simd" || rung == "threaded") {
    const bool threaded = rung == "threaded";
    return [threaded](const Matmul& matmul, Executor& executor) {
      Kernel kernel = best_kernel(matmul.precision);
      kernel.multiply = multiply_nothing;
      InlineExecutor alone;
      packed_matmul(matmul, kernel, threaded ? executor : alone);
    };
  }
  return nullptr;
}

struct Total {
  double seconds = 0, packing = 0, flops = 0, error = 0;

  void print(const char* what) const {
    std::printf("  %-22s %9.1f ms %9.1f GFLOP/s", what, seconds * 1e3, flops / seconds * 1e-9);
    if (packing > 0) std::printf("   packing %3.0f%%", 100 * packing / seconds);
    std::printf("   error %.1e\n", error);
  }
};

// Times all products with one rung in one precision.
void bench_rung(const Implementation& rung, Precision precision, Memory& memory, int64_t tokens,
                Executor& executor) {
  constexpr double kBudget = 0.12;  // seconds for each product
  const auto packing = packing_alone(rung.name);
  Total step, all[3];
  bool extrapolated = false;
  std::printf("%s %s\n", rung.name, name(precision));
  for (int kind = 0; kind < 3; ++kind) {
    int64_t first = 0;
    for (const Weight& weight : kWeights) {
      int64_t layer = 0;
      const auto next = [&] {
        const int64_t offset = first + layer++ % weight.layers * weight.outputs * weight.inputs;
        return product(memory, kind, weight, offset, tokens, precision);
      };
      const Matmul whole = next();
      int64_t rows = whole.m;
      if (!packing) {
        // A rung too slow for the whole product computes its first rows: at least one block of
        // them.
        Matmul slice = whole;
        slice.m = std::string(rung.name) == "naive" ? 1 : std::min<int64_t>(64, whole.m);
        const double seconds = median_seconds(0, [&] { rung.run(slice, executor); });
        if (seconds * whole.m > 2 * kBudget * slice.m) {
          rows = std::max<int64_t>(slice.m, kBudget / seconds * slice.m);
        }
      }
      extrapolated |= rows < whole.m;
      Matmul last;
      const auto run = [&](const auto& run_product) {
        return median_seconds(kBudget, [&] {
          last = next();
          last.m = rows;
          run_product(last, executor);
        });
      };
      Total total;
      if (packing) total.packing = run(packing);
      total.seconds = run(rung.run) * whole.m / rows;
      total.flops = 2.0 * whole.m * whole.n * whole.k;
      total.error = max_error(last);
      char what[64];
      std::snprintf(what, sizeof(what), "%-4s%-11s%s", kProducts[kind], weight.name,
                    rows < whole.m ? "slice" : "");
      total.print(what);
      for (Total* sum : {&step, &all[kind]}) {
        sum->seconds += total.seconds * weight.layers;
        sum->packing += total.packing * weight.layers;
        sum->flops += total.flops * weight.layers;
        sum->error = std::max(sum->error, total.error);
      }
      first += weight.layers * weight.outputs * weight.inputs;
    }
  }
  for (int kind = 0; kind < 3; ++kind)
    all[kind].print((std::string("all ") + kProducts[kind]).c_str());
  step.print(extrapolated ? "step, extrapolated" : "step");
}

}  // namespace

void bench_gpt2_products(int64_t tokens, int num_threads, const std::string& rungs) {
  ThreadPool pool(num_threads - 1);  // the calling thread works too
  PoolExecutor executor(pool, num_threads);
  std::printf("GPT-2 124M, %d tokens, %d thread(s), kernel %s; a layer's products count 12 times\n",
              static_cast<int>(tokens), num_threads, best_kernel(Precision::kF32_F32_F32).name);
  for (const Precision precision : {Precision::kF32_F32_F32, Precision::kBF16_BF16_F32}) {
    const Kernel& kernel = fastest_kernel(precision);
    for (const int threads : {1, num_threads}) {
      std::printf("peak in %s, %s on panels in L1: %.0f GFLOP/s with %d thread(s)\n",
                  name(precision), kernel.name, kernel_gflops(kernel, threads, 0.3), threads);
    }
  }
  std::printf("memory: %.1f GB/s read and written\n", memory_gbytes(num_threads, 0.3));
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Memory memory(tokens, dtype);
    for (const Implementation& rung : implementations()) {
      if (!rungs.empty() &&
          ("," + rungs + ",").find("," + std::string(rung.name) + ",") == std::string::npos) {
        continue;
      }
      if (!rung.unavailable().empty()) {
        if (dtype == DType::kFloat32) {
          std::printf("%s: not here: %s\n", rung.name, rung.unavailable().c_str());
        }
        continue;
      }
      for (const Precision precision : kPrecisions) {
        // BF16_BF16_F32 is timed with bfloat16 activations, the other precisions with float32 ones.
        if ((dtype == DType::kBFloat16) != (precision == Precision::kBF16_BF16_F32)) continue;
        const Matmul matmul = product(memory, 0, kWeights[0], 0, tokens, precision);
        if (rung.refuse(matmul).empty()) bench_rung(rung, precision, memory, tokens, executor);
      }
    }
  }
}

}  // namespace gpt2_jax

// Operands and outputs that reach beyond 2^31 elements: an index of 32 bits would lose its upper
// bits. The memory is mapped lazily, so only the pages that a product touches exist.
#include <sys/mman.h>

#include <string>
#include <vector>

#include "check.h"
#include "registry.h"
#include "thread_pool.h"

namespace gpt2_jax {
namespace {

constexpr int64_t kM = 9, kN = 35, kK = 21;
constexpr int64_t kStride = int64_t{1} << 28;  // nine rows of it end beyond 2^31 elements
constexpr int64_t kFloats = 10 * kStride;

// Either the rows are far apart, or the whole matrix begins beyond 2^31 elements.
struct Place {
  int64_t offset, stride;
};

void test_large(const Implementation& implementation, float* memory, Place place) {
  std::vector<float> a(kM * kK), b(kK * kN), expected(kM * kN);
  for (int64_t i = 0; i < kM * kK; ++i) a[i] = static_cast<float>(i * 7 % 23 - 11);
  for (int64_t i = 0; i < kK * kN; ++i) b[i] = static_cast<float>(i * 5 % 19 - 9);
  for (int64_t i = 0; i < kM; ++i) {
    for (int64_t p = 0; p < kK; ++p) memory[place.offset + i * place.stride + p] = a[i * kK + p];
  }
  float* const out = memory + place.offset + 1024;  // the same rows, other columns
  for (int64_t i = 0; i < kM; ++i) {
    for (int64_t j = 0; j < kN; ++j) {
      float sum = 0;
      for (int64_t p = 0; p < kK; ++p) sum += a[i * kK + p] * b[p * kN + j];
      expected[i * kN + j] = sum;
    }
  }
  Matmul matmul;
  matmul.m = kM, matmul.n = kN, matmul.k = kK;
  matmul.a = {memory, place.offset, place.stride, DType::kFloat32, false};
  matmul.b = {b.data(), 0, kN, DType::kFloat32, false};
  matmul.out = out;
  matmul.out_leading_dimension = place.stride;
  matmul.precision = Precision::kBF16_BF16_F32;  // every rung has it, and these integers are exact
  ThreadPool pool(1);
  PoolExecutor executor(pool, 2);
  multiply(implementation, matmul, executor);
  bool equal = true;
  for (int64_t i = 0; i < kM; ++i) {
    for (int64_t j = 0; j < kN; ++j) {
      equal = equal && out[i * place.stride + j] == expected[i * kN + j];
    }
  }
  CHECK(equal, implementation.name << " from element " << place.offset << ", rows "
                                   << place.stride << " apart");
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  using namespace gpt2_jax;
  void* const mapped = mmap(nullptr, kFloats * sizeof(float), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    std::printf("SKIPPED: 10 GiB of addresses cannot be mapped\n");
    return 77;
  }
  for (const Implementation& implementation : implementations()) {
    if (!implementation.unavailable().empty()) continue;
    test_large(implementation, static_cast<float*>(mapped), {7, kStride});
    test_large(implementation, static_cast<float*>(mapped), {(int64_t{1} << 31) + 5, 2048});
  }
  return report("test_large_operands");
}

// Every rung and every micro-kernel against float64.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "amx.h"
#include "cpu_features.h"
#include "custom_calls.h"
#include "kernels/kernel.h"
#include "openblas.h"
#include "problem.h"
#include "registry.h"
#include "schedule.h"
#include "thread_pool.h"
#include "tile_model.h"

namespace gpt2_jax {
namespace {

std::vector<Shape> small_shapes() {
  std::vector<Shape> shapes = {{0, 0, 0},   {0, 5, 3},    {5, 0, 3},    {5, 3, 0},
                               {1, 1, 1},   {1, 33, 7},   {33, 1, 7},   {17, 19, 1},
                               {6, 16, 64}, {14, 32, 13}, {13, 97, 31}, {64, 48, 24}};
  // 25 in all, which is no multiple of 3 or 4: epilogues and transpositions are taken in turn.
  Random random(7);
  for (int i = 0; i < 13; ++i) {
    shapes.push_back({1 + random.below(70), 1 + random.below(70), 1 + random.below(150)});
  }
  return shapes;
}

// Slightly more than one block in m, n or k alone, and in several of them; the last two have few
// rows.
const std::vector<Shape> kLargeShapes = {{1151, 37, 41},  {23, 3203, 29},  {31, 45, 1201},
                                         {1151, 21, 401}, {11, 3203, 401}, {199, 293, 787},
                                         {1, 3203, 401},  {7, 701, 131}};

struct Candidate {
  std::string name;
  std::vector<Shape> shapes;        // tested with every combination of types
  std::vector<Shape> large_shapes;  // tested with some combinations
  Shape shape_of_bits;              // tested for the same bits with any number of threads
  std::vector<Precision> precisions;
  bool in_turn;       // each small shape with one of the four transpositions, not with all
  bool sums_squares;  // sets sum_of_squares
  std::function<void(const Matmul&, Executor&)> run;
};

// True for other people's libraries: they have threads of their own, and their bits may vary.
bool is_foreign(const std::string& rung) { return rung == "accelerate" || rung == "openblas"; }

// A kernel on the model's instructions with the portable packing. Its blocks are small, so that small
// products have several of each kind.
constexpr BlockSizes kSmallBlocks = {/*panel_bytes=*/12 << 10,  /*item_lanes=*/64,
                                     /*shared_lanes=*/64,       /*cached_lanes=*/32,
                                     /*shared_bytes=*/48 << 10, /*cached_bytes=*/24 << 10,
                                     /*sums_bytes=*/24 << 10,
                                     /*stream_bytes=*/4 << 10};

// The kernels on tiles for bfloat16 parts and for digits.
struct TileKernels {
  std::string name;
  Kernel parts, digits;

  const Kernel& of(Precision precision) const {
    return precision == Precision::kS8_S8_S32_X6 ? digits : parts;
  }
  TileKernels with_blocks(const BlockSizes& blocks) const {
    TileKernels kernels = *this;
    kernels.parts.blocks = kernels.digits.blocks = blocks;
    return kernels;
  }
};

TileKernels model_kernels() {
  const auto kernel = [](const char* name, int step_depth, int element_bytes, int trailer_bytes,
                         int max_depth, Pack pack, Multiply multiply) -> Kernel {
    return {name, 0, kPanelLanes, kPanelLanes, step_depth, element_bytes, trailer_bytes, max_depth,
            /*left_runs_along_k=*/true, TileModel::configure, TileModel::release, pack, multiply,
            finish_tiles_portable, kSmallBlocks};
  };
  return {"model",
          kernel("parts", kTileDepth, 2, 0, 1 << 30, pack_tiles_portable,
                 multiply_parts_panels_on_model),
          kernel("digits", kDigitDepth, 1, kScalesBytes, kMaxDigitDepth, pack_digits_portable,
                 multiply_digits_panels_on_model)};
}

// The model with either packing, and the CPU's own tiles if it has them; all with small blocks.
std::vector<TileKernels> tile_kernels() {
  std::vector<TileKernels> all = {model_kernels()};
#if defined(GPT2_JAX_HAS_AMX)
  if (has_all(cpu_features_seen(), kAvx512Code | kAvx512bf16)) {
    TileKernels kernels = model_kernels();
    kernels.name = "model, packing by AVX-512";
    kernels.parts.pack = pack_tiles_avx512;
    kernels.digits.pack = pack_digits_avx512;
    kernels.parts.finish = kernels.digits.finish = finish_tiles_avx512;
    all.push_back(kernels);
  }
  if (amx_unavailable().empty()) {
    all.push_back(TileKernels{"amx, small blocks", *amx_kernel(Precision::kBF16_BF16_F32),
                              *amx_kernel(Precision::kS8_S8_S32_X6)}
                      .with_blocks(kSmallBlocks));
  }
#endif
  return all;
}

bool has_amx_kernel() { return amx_kernel(Precision::kBF16_BF16_F32) != nullptr; }

// The model with the block sizes of AMX.
TileKernels model_with_blocks_of_amx() {
  return model_kernels().with_blocks(amx_kernel(Precision::kBF16_BF16_F32)->blocks);
}

const std::vector<Precision> kOfFloat32 = {Precision::kF32_F32_F32, Precision::kBF16_BF16_F32};
const std::vector<Precision> kOfTiles = {Precision::kBF16_BF16_F32, Precision::kBF16_BF16_F32_X3,
                                         Precision::kBF16_BF16_F32_X6, Precision::kS8_S8_S32_X6};

std::vector<Shape> without_empty(std::vector<Shape> shapes) {
  const auto is_empty = [](const Shape& s) { return s.m == 0 || s.n == 0 || s.k == 0; };
  shapes.erase(std::remove_if(shapes.begin(), shapes.end(), is_empty), shapes.end());
  return shapes;
}

// All rungs of the ladder; then the packed product with each micro-kernel that this CPU can run
// (the mask does not count here); then tiles.
std::vector<Candidate> candidates() {
  const std::vector<Shape> small = small_shapes();
  const Shape none = {0, 0, 0}, ragged = {131, 517, 901};
  std::vector<Candidate> all;
  for (const Implementation& rung : implementations()) {
    if (!rung.unavailable().empty()) continue;
    const std::string name = rung.name;
    // The packed product is tested thoroughly below, kernel by kernel.
    const bool fast = name != "naive" && name != "blocked";
    all.push_back(
        {name, small, fast ? kLargeShapes : std::vector<Shape>(),
         fast && !is_foreign(name) ? ragged : none, name == "amx" ? kOfTiles : kOfFloat32, fast, true,
         [&rung](const Matmul& matmul, Executor& executor) { multiply(rung, matmul, executor); }});
  }
  // Their small products have several blocks of each kind with small blocks, too.
  for (const bool small_blocks : {false, true}) {
    for (Kernel kernel : kernels()) {
      if (kernel.features & ~cpu_features_seen()) continue;
      const std::string name = std::string(kernel.name) + (small_blocks ? ", small blocks" : "");
      if (small_blocks) kernel.blocks = kSmallBlocks;
      all.push_back({name, without_empty(small), small_blocks ? std::vector<Shape>() : kLargeShapes,
                     ragged, kOfFloat32, small_blocks, true,
                     [kernel](const Matmul& matmul, Executor& executor) {
                       packed_matmul(matmul, kernel, executor);
                     }});
    }
  }
  for (Kernel kernel : dot_kernels()) {
    if (kernel.features & ~cpu_features_seen()) continue;
    for (const bool small_blocks : {false, true}) {
      const std::string name = std::string(kernel.name) + (small_blocks ? ", small blocks" : "");
      if (small_blocks) kernel.blocks = kSmallBlocks;
      all.push_back({name, without_empty(small), small_blocks ? std::vector<Shape>() : kLargeShapes,
                     ragged, {Precision::kBF16_BF16_F32}, true, true,
                     [kernel](const Matmul& matmul, Executor& executor) {
                       packed_matmul(matmul, kernel, executor);
                     }});
    }
  }
  for (const TileKernels& kernels : tile_kernels()) {
    const auto run = [kernels](const Matmul& matmul, Executor& executor) {
      packed_matmul(matmul, kernels.of(matmul.precision), executor);
      CHECK(!TileModel::configured(), "tiles left configured");
    };
    all.push_back({kernels.name, without_empty(small), {}, {67, 131, 200}, kOfTiles, true, true, run});
  }
  if (has_amx_kernel()) {
    // The block sizes of amx. Only large shapes, since others do not fill a block: the model is
    // slow.
    const TileKernels kernels = model_with_blocks_of_amx();
    const auto run = [kernels](const Matmul& matmul, Executor& executor) {
      packed_matmul(matmul, kernels.of(matmul.precision), executor);
    };
    all.push_back({"model, blocks of AMX", {}, {{40, 70, 801}}, none, kOfTiles, true, true, run});
  }
  return all;
}

std::vector<Types> all_types(const Candidate& candidate) {
  std::vector<Types> all;
  for (const DType a : {DType::kFloat32, DType::kBFloat16}) {
    for (const DType b : {DType::kFloat32, DType::kBFloat16}) {
      for (const DType out : {DType::kFloat32, DType::kBFloat16}) {
        for (const Precision precision : candidate.precisions) {
          all.push_back({a, b, out, precision});
        }
      }
    }
  }
  return all;
}

void test_against_float64(const Candidate& candidate) {
  ThreadPool pool(2);
  PoolExecutor executor(pool, 3);
  Random random(1);
  int runs = 0;
  const auto run = [&](const Shape& shape, int transposes, const Types& types) {
    // Three epilogues and four transpositions, both in turn: every pair of them is tested.
    Epilogue epilogue = static_cast<Epilogue>(runs++ % 3);
    if (types.out != DType::kFloat32 && epilogue == Epilogue::kAccumulate) {
      epilogue = Epilogue::kStore;
    }
    Problem problem(shape, transposes & 1, transposes & 2, types, random, epilogue);
    candidate.run(problem.matmul(), executor);
    problem.check(candidate.name);
    if (candidate.sums_squares) problem.check_squares(candidate.name);
  };
  for (const Types& types : all_types(candidate)) {
    for (const Shape& shape : candidate.shapes) {
      const int turn = runs % 4;
      for (int transposes = 0; transposes < 4; ++transposes) {
        if (!candidate.in_turn || transposes == turn) run(shape, transposes, types);
      }
    }
  }
  Types wide;
  // The precision of most products of parts, or what the candidate has.
  wide.precision = candidate.precisions == kOfTiles ? Precision::kBF16_BF16_F32_X3
                                                    : candidate.precisions.front();
  for (const Shape& shape : candidate.large_shapes) {
    for (int transposes = 0; transposes < 4; ++transposes) run(shape, transposes, wide);
  }
  const Types narrow = {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16,
                        Precision::kBF16_BF16_F32};
  for (const Shape& shape : candidate.large_shapes) run(shape, 2, narrow);
}

// A non-finite element reaches every result that depends on it, and no other.
void test_non_finite(const Candidate& candidate) {
  InlineExecutor executor;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float value : {nan, infinity, -infinity}) {
    for (int transposes = 0; transposes < 4; ++transposes) {
      for (const Types& types : all_types(candidate)) {
        Random random(3);
        Problem problem({19, 37, 23}, transposes & 1, transposes & 2, types, random);
        problem.set_a(18, 22, value);
        problem.set_b(5, 33, value);
        candidate.run(problem.matmul(), executor);
        if (candidate.sums_squares && types.out == DType::kFloat32) {
          CHECK(!std::isfinite(problem.sum_of_squares()), candidate.name << " with " << value);
        }
        for (int64_t i = 0; i < 19; ++i) {
          for (int64_t j = 0; j < 37; ++j) {
            const bool touched = i == 18 || j == 33;
            CHECK(std::isfinite(problem.result(i, j)) != touched,
                  candidate.name << " with " << value << " at (" << i << "," << j
                                 << "): " << problem.result(i, j));
          }
        }
      }
    }
  }
}

// The same bits for any number of threads, and from run to run.
void test_same_bits(const Candidate& candidate) {
  ThreadPool pool(3);
  const Types narrow = {DType::kBFloat16, DType::kFloat32, DType::kBFloat16,
                        Precision::kBF16_BF16_F32};
  Types wide;
  wide.precision = candidate.precisions.front();
  const std::pair<Types, Epilogue> cases[] = {
      {wide, Epilogue::kStore}, {wide, Epilogue::kAccumulate}, {narrow, Epilogue::kBias}};
  for (const auto& [types, epilogue] : cases) {
    Random random(5);
    Problem problem(candidate.shape_of_bits, true, true, types, random, epilogue);
    InlineExecutor inline_executor;
    candidate.run(problem.matmul(), inline_executor);
    const Elements expected = problem.out();
    const double squares = problem.sum_of_squares();
    for (int threads = 1; threads <= 4; ++threads) {
      for (int repeat = 0; repeat < 3; ++repeat) {
        problem.clear();
        PoolExecutor executor(pool, threads);
        candidate.run(problem.matmul(), executor);
        CHECK(problem.out() == expected && problem.sum_of_squares() == squares,
              candidate.name << " gives other bits with " << threads << " threads");
      }
    }
  }
}

// Forward, dx and dw at the same time, as XLA may call them: each on a thread of its own.
void test_concurrent_calls(const Candidate& candidate) {
  ThreadPool pool(2);
  std::vector<std::thread> callers;
  std::vector<std::unique_ptr<Problem>> problems;
  for (int transposes = 0; transposes < 4; ++transposes) {
    Random random(20 + transposes);
    problems.push_back(std::make_unique<Problem>(Shape{120, 130, 140}, transposes & 1,
                                                 transposes & 2, Types(), random));
  }
  for (const auto& problem : problems) {
    callers.emplace_back([&pool, &candidate, &matmul = problem->matmul()] {
      PoolExecutor executor(pool, 3);
      for (int repeat = 0; repeat < 50; ++repeat) candidate.run(matmul, executor);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& problem : problems) problem->check(candidate.name);
}

void test_openblas_says_what_is_wrong() {
  const Implementation& openblas = *find_implementation("openblas");
  CHECK(openblas.unavailable().find("pip install scipy-openblas32") != std::string::npos, "");
  gpt2_jax_use_openblas("/no/such/library");
  CHECK(openblas.unavailable().find("/no/such/library") != std::string::npos,
        openblas.unavailable());
}

// OpenBLAS uses as many threads as the executor has, and never more than it had at first.
void test_openblas_threads() {
  void* const library = dlopen(std::getenv("GPT2_JAX_OPENBLAS"), RTLD_LAZY);
  const auto threads =
      reinterpret_cast<int (*)()>(dlsym(library, "scipy_openblas_get_num_threads"));
  const int most = threads();
  Random random(11);
  Problem problem({8, 8, 8}, false, false, Types(), random);
  ThreadPool pool(0);
  for (const int wanted : {1, 2, 1, 1000}) {
    PoolExecutor executor(pool, wanted);
    find_implementation("openblas")->run(problem.matmul(), executor);
    CHECK(threads() == std::min(wanted, most), threads() << " threads of " << wanted);
  }
}

double largest_error(const Matmul& matmul, const std::vector<float>& a, const std::vector<float>& b,
                     const std::vector<float>& out) {
  double worst = 0;
  for (int64_t i = 0; i < matmul.m; ++i) {
    for (int64_t j = 0; j < matmul.n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < matmul.k; ++p) {
        sum += static_cast<double>(a[i * matmul.k + p]) * b[p * matmul.n + j];
      }
      worst = std::max(worst, std::fabs(sum - out[i * matmul.n + j]));
    }
  }
  return worst;
}

// BF16_BF16_F32_X6 stands in for float32: its error is at most twice that of float32.
void test_six_products_against_float32() {
  if (!has_amx_kernel()) return;
  Random random(12);
  for (const int64_t k : {int64_t{768}, int64_t{50304}}) {
    Matmul matmul;
    matmul.m = 16, matmul.n = 32, matmul.k = k;
    std::vector<float> a(matmul.m * k), b(k * matmul.n), out(matmul.m * matmul.n);
    for (float& value : a) value = random.uniform();
    for (float& value : b) value = random.uniform();
    matmul.a = {a.data(), 0, k, DType::kFloat32, false};
    matmul.b = {b.data(), 0, matmul.n, DType::kFloat32, false};
    matmul.out = out.data(), matmul.out_leading_dimension = matmul.n;
    InlineExecutor executor;
    packed_matmul(matmul, best_kernel(0, matmul.precision, false), executor);
    const double float32 = largest_error(matmul, a, b, out);
    const TileKernels kernels = model_with_blocks_of_amx();
    for (const Precision precision : {Precision::kBF16_BF16_F32_X6, Precision::kS8_S8_S32_X6}) {
      matmul.precision = precision;
      packed_matmul(matmul, kernels.of(precision), executor);
      const double six = largest_error(matmul, a, b, out);
      CHECK(six <= 2 * float32, name(precision)
                                    << ", k " << k << ": " << six << ", float32 " << float32);
    }
  }
}

// Six products whose sums begin anew in every block of k, and are kept for all items or by each
// worker: with every epilogue, and the same bits with any number of threads.
void test_six_products_in_several_sums() {
  if (!has_amx_kernel()) return;
  ThreadPool pool(2);
  Random random(13);
  int i = 0;
  for (const TileKernels& kernels : {model_kernels(), model_with_blocks_of_amx()}) {
    for (const Shape& shape : {Shape{70, 100, 1100}, Shape{40, 70, 2112}}) {
      for (const Epilogue epilogue : {Epilogue::kStore, Epilogue::kBias, Epilogue::kAccumulate}) {
        Types types;
        types.precision = i % 2 == 0 ? Precision::kBF16_BF16_F32_X6 : Precision::kS8_S8_S32_X6;
        Problem problem(shape, i & 2, i & 4, types, random, epilogue);
        ++i;
        InlineExecutor inline_executor;
        packed_matmul(problem.matmul(), kernels.of(types.precision), inline_executor);
        problem.check("six products");
        problem.check_squares("six products");
        const Elements expected = problem.out();
        problem.clear();
        PoolExecutor executor(pool, 3);
        packed_matmul(problem.matmul(), kernels.of(types.precision), executor);
        CHECK(problem.out() == expected, to_string(problem.matmul()) << " on three threads");
      }
    }
  }
}

// Digits of rows, columns and blocks of k of very different magnitudes, with outliers. The bound
// follows from the units and the omitted products of each block's own largest elements. Also lanes
// whose scales' product exceeds float32.
void test_digits_of_any_size() {
  if (!has_amx_kernel()) return;
  Random random(14);
  constexpr int64_t kM = 20, kN = 40, kK = 700;
  std::vector<float> a(kM * kK), b(kK * kN), out(kM * kN);
  for (int64_t p = 0; p < kK; ++p) {
    const int of_block = static_cast<int>(p / kMaxDigitDepth) * -9;
    for (int64_t i = 0; i < kM; ++i) {
      const int outlier = random.below(200) == 0 ? 10 : 0;
      a[i * kK + p] =
          std::ldexp(random.uniform(), static_cast<int>(i % 5) * 8 - 16 + of_block + outlier);
    }
    for (int64_t j = 0; j < kN; ++j) {
      const int outlier = random.below(200) == 0 ? 6 : 0;
      b[p * kN + j] =
          std::ldexp(random.uniform(), static_cast<int>(j % 7) * 6 - of_block + outlier);
    }
  }
  Matmul matmul;
  matmul.m = kM, matmul.n = kN, matmul.k = kK;
  matmul.a = {a.data(), 0, kK, DType::kFloat32, false};
  matmul.b = {b.data(), 0, kN, DType::kFloat32, false};
  matmul.out = out.data(), matmul.out_leading_dimension = kN;
  matmul.precision = Precision::kS8_S8_S32_X6;
  InlineExecutor executor;
  const Kernel kernel = model_with_blocks_of_amx().digits;
  packed_matmul(matmul, kernel, executor);
  for (int64_t i = 0; i < kM; ++i) {
    for (int64_t j = 0; j < kN; ++j) {
      double sum = 0, allowed = 0;
      for (int64_t first = 0; first < kK; first += kMaxDigitDepth) {
        const int64_t last = std::min<int64_t>(first + kMaxDigitDepth, kK);
        double largest_a = 0, largest_b = 0, sum_a = 0, sum_b = 0, magnitude = 0;
        for (int64_t p = first; p < last; ++p) {
          const double x = a[i * kK + p], y = b[p * kN + j];
          largest_a = std::max(largest_a, std::fabs(x)), sum_a += std::fabs(x);
          largest_b = std::max(largest_b, std::fabs(y)), sum_b += std::fabs(y);
          sum += x * y, magnitude += std::fabs(x * y);
        }
        // The largest element is at least 0x3f8000 units.
        const double a_unit = largest_a / 0x3f8000, b_unit = largest_b / 0x3f8000;
        allowed += (a_unit * sum_b + b_unit * sum_a) / 2 + std::ldexp(8 * magnitude, -24) +
                   static_cast<double>(last - first) * std::ldexp(2.1, 22) * a_unit * b_unit;
      }
      const double error = std::fabs(out[i * kN + j] - sum);
      CHECK(error <= allowed, "(" << i << "," << j << "): " << out[i * kN + j] << ", expected "
                                  << sum << " +- " << allowed);
    }
  }
  matmul.m = matmul.n = 1, matmul.k = 2;
  a = {std::ldexp(1.0f, 100), 0}, b = {0, std::ldexp(1.0f, 100)};
  matmul.a.buffer = a.data(), matmul.a.leading_dimension = 2;
  matmul.b.buffer = b.data(), matmul.b.leading_dimension = 1;
  packed_matmul(matmul, kernel, executor);
  CHECK(out[0] == 0, out[0]);
}

void test_refusals() {
  Random random(9);
  for (const Precision precision :
       {Precision::kBF16_BF16_F32_X3, Precision::kBF16_BF16_F32_X6, Precision::kS8_S8_S32_X6}) {
    Types types;
    types.precision = precision;
    Problem problem({2, 2, 2}, false, false, types, random);
    for (const Implementation& rung : implementations()) {
      if (std::string(rung.name) == "amx") continue;
      const std::string reason = rung.refuse(problem.matmul());
      CHECK(reason.find(name(precision)) != std::string::npos, rung.name << ": " << reason);
    }
  }
  CHECK(find_implementation("no such rung") == nullptr, "");
  for (const char* rung : {"accelerate", "openblas"}) {
    Matmul huge;
    huge.m = int64_t{1} << 31;
    const std::string reason = find_implementation(rung)->refuse(huge);
    CHECK(reason.find("32 bits, this product has 2147483648") != std::string::npos, reason);
  }
}

}  // namespace
}  // namespace gpt2_jax

// test_matmul [candidate]: tests one candidate, or all that this machine can run. OpenBLAS is
// tested only by name, so that the other tests do not load it.
int main(int argc, char** argv) {
  using namespace gpt2_jax;
  const std::string only = argc > 1 ? argv[1] : "";
  if (only == "openblas") {
    if (!use_openblas_of_environment()) return 77;  // ctest shows it as skipped
    const std::string problem = find_implementation("openblas")->unavailable();
    CHECK(problem.empty(), problem);
    test_openblas_threads();
  } else {
    test_openblas_says_what_is_wrong();
  }
  int tested = 0;
  for (const Candidate& candidate : candidates()) {
    if (!only.empty() && candidate.name != only) continue;
    ++tested;
    std::printf("%s\n", candidate.name.c_str());
    test_against_float64(candidate);
    test_non_finite(candidate);
    if (candidate.shape_of_bits.m > 0) test_same_bits(candidate);
    if (is_foreign(candidate.name)) test_concurrent_calls(candidate);
  }
  CHECK(tested > 0, only << " is no candidate on this machine");
  if (only.empty()) {
    test_six_products_against_float32();
    test_six_products_in_several_sums();
    test_digits_of_any_size();
  }
  test_refusals();
  return report("test_matmul");
}

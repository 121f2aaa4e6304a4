// The CPU's tile instructions against the model of them, bit for bit. Skipped without AMX.
#include <cmath>
#include <cstring>
#include <string>

#include "amx.h"
#include "check.h"
#include "problem.h"
#include "schedule.h"
#include "thread_pool.h"
#include "tile_model.h"
#include "workspace.h"

#if defined(GPT2_JAX_HAS_AMX)

namespace gpt2_jax {
namespace {

constexpr int64_t kMaxSteps = 7, kStepBytes = kMaxParts * 2 * kTileBytes;

// A product of random panels; the caller sets its sums.
TileBlock random_block(const Workspace& left, const Workspace& right, const TilePass* passes,
                       int max_passes, Prefetch* prefetch, Random& random) {
  TileBlock block;
  block.left = reinterpret_cast<unsigned char*>(left.data());
  block.right = reinterpret_cast<unsigned char*>(right.data());
  block.left_step = block.right_step = kStepBytes;
  block.left_tiles = 1 + static_cast<int>(random.below(2));
  block.right_tiles = 1 + static_cast<int>(random.below(2));
  block.steps = 1 + random.below(kMaxSteps);
  block.passes = passes;
  block.num_passes = 1 + static_cast<int>(random.below(max_passes));
  block.accumulate = random.below(2);
  block.prefetch = prefetch;
  block.prefetched_lines = 0;
  return block;
}

// Computes the block by the model and by the CPU, from the same sums.
void multiply_both(TileBlock block, void (*on_model)(const TileBlock&),
                   void (*on_cpu)(const TileBlock&), const Workspace& model,
                   const Workspace& hardware) {
  std::memcpy(hardware.data(), model.data(), kBlockSums * 4);
  block.sums = model.data();
  TileModel::configure();
  on_model(block);
  TileModel::release();
  block.sums = hardware.data();
  configure_amx();
  on_cpu(block);
  release_amx();
}

// Random panels of plain numbers, of tiny numbers whose products are denormal, and of numbers of
// every kind.
void test_blocks() {
  constexpr int64_t kPanelBytes = kMaxSteps * kStepBytes;
  const Workspace left(kPanelBytes / 4), right(kPanelBytes / 4);
  const Workspace model(kBlockSums), hardware(kBlockSums);
  static constexpr TilePass kPasses[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}};
  Random random(1);
  for (int i = 0; i < 600; ++i) {
    const int kind = i % 3;
    const auto fill = [&](const Workspace& words) {
      for (int64_t at = 0; at < kPanelBytes / 2; ++at) {
        float value = kind == 2 ? random.any_float() : random.uniform();
        // Makes products on both sides of the smallest normal number, 2^-126.
        if (kind == 1) value = std::ldexp(value, -63 + static_cast<int>(random.below(8)) - 4);
        reinterpret_cast<uint16_t*>(words.data())[at] = float_to_bfloat16(value);
      }
    };
    fill(left);
    fill(right);
    for (int at = 0; at < kBlockSums; ++at) {
      float value = kind == 2 ? random.any_float() : random.uniform();
      if (kind == 1) value = std::ldexp(value, -124);
      model.data()[at] = value;
    }
    Prefetch prefetch;
    multiply_both(random_block(left, right, kPasses, 6, &prefetch, random), multiply_on_model,
                  multiply_tiles_amx, model, hardware);
    for (int at = 0; at < kBlockSums; ++at) {
      const float expected = model.data()[at], found = hardware.data()[at];
      const bool same = std::memcmp(&expected, &found, 4) == 0;
      CHECK(same || (std::isnan(expected) && std::isnan(found)),
            "kind " << kind << ", run " << i << " at " << at << ": " << found
                    << ", the model gives " << expected);
    }
  }
}

// Panels of random bytes.
void test_digit_blocks() {
  constexpr int64_t kPanelBytes = kMaxSteps * kStepBytes;
  const Workspace left(kPanelBytes / 4), right(kPanelBytes / 4);
  const Workspace model(kBlockSums), hardware(kBlockSums);
  static constexpr TilePass kPasses[] = {{0, 2}, {1, 1}, {2, 0}};
  Random random(3);
  for (int i = 0; i < 50; ++i) {
    for (const Workspace* const bytes : {&left, &right, &model}) {
      const int64_t count = bytes == &model ? kBlockSums * 4 : kPanelBytes;
      for (int64_t at = 0; at < count; ++at) {
        reinterpret_cast<unsigned char*>(bytes->data())[at] =
            static_cast<unsigned char>(random.below(256));
      }
    }
    // Sums that cannot overflow an int32, like the schedule's.
    auto* const sums = reinterpret_cast<int32_t*>(model.data());
    for (int at = 0; at < kBlockSums; ++at) sums[at] /= 2;
    Prefetch prefetch;
    multiply_both(random_block(left, right, kPasses, 3, &prefetch, random),
                  multiply_digits_on_model, multiply_digits_amx, model, hardware);
    CHECK(std::memcmp(model.data(), hardware.data(), kBlockSums * 4) == 0, "run " << i);
  }
}

// Whole products, on several threads.
void test_products() {
  ThreadPool pool(2);
  Random random(2);
  for (int i = 0; i < 24; ++i) {
    const Shape shape = {1 + random.below(100), 1 + random.below(100),
                         1 + random.below(i % 4 >= 2 ? 2500 : 500)};
    Types types;
    types.precision = kPrecisions[1 + i % 4];
    Problem problem(shape, i & 4, i & 8, types, random);
    PoolExecutor executor(pool, 3);
    Kernel model = *amx_kernel(types.precision);
    model.configure = TileModel::configure;
    model.release = TileModel::release;
    model.multiply = types.precision == Precision::kS8_S8_S32_X6 ? multiply_digits_panels_on_model
                                                                 : multiply_parts_panels_on_model;
    packed_matmul(problem.matmul(), model, executor);
    const Elements expected = problem.out();
    problem.clear();
    packed_matmul(problem.matmul(), *amx_kernel(types.precision), executor);
    CHECK(problem.out() == expected, to_string(problem.matmul()) << " differs from the model");
  }
}

}  // namespace
}  // namespace gpt2_jax

#endif

int main() {
  using namespace gpt2_jax;
  const std::string reason = amx_unavailable();
  if (!reason.empty()) {
    std::printf("test_amx: skipped, AMX: %s\n", reason.c_str());
    return 77;
  }
#if defined(GPT2_JAX_HAS_AMX)
  test_blocks();
  test_digit_blocks();
  test_products();
#endif
  return report("test_amx");
}

// Packing, finishing, the model of the tile instructions, and products on it: needs no AMX.
#include <cerrno>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "amx.h"
#include "check.h"
#include "cpu_features.h"
#include "problem.h"
#include "registry.h"
#include "tile_model.h"
#include "workspace.h"

namespace gpt2_jax {
namespace {

// An element's parts add up to it and lie where the layout says; everything else is zero.
void test_layout() {
  Random random(1);
  constexpr int64_t kLanes = 39, kDepth = 50, kSteps = 2, kPanels = 2;
  for (const Side side : {Side::kLeft, Side::kRight}) {
    for (int parts = 1; parts <= 3; ++parts) {
      std::vector<float> source(kLanes * kDepth);
      for (float& value : source) value = random.uniform();
      std::vector<uint16_t> packed(kPanels * kSteps * parts * kTileBytes, 0xffff);
      pack_tiles_portable({source.data(), kDepth, 1, false}, kLanes, kDepth, side, parts,
                          reinterpret_cast<unsigned char*>(packed.data()));
      for (int64_t lane = 0; lane < kPanels * 32; ++lane) {
        for (int64_t k = 0; k < kSteps * 32; ++k) {
          float sum = 0;
          for (int part = parts - 1; part >= 0; --part) {
            const int64_t tile =
                ((lane / 32 * kSteps + k / 32) * parts + part) * 2 + lane % 32 / 16;
            const int64_t word = side == Side::kLeft ? lane % 16 * 32 + k % 32
                                                         : k % 32 / 2 * 32 + lane % 16 * 2 + k % 2;
            sum += bfloat16_to_float(packed[tile * 512 + word]);
          }
          const bool inside = lane < kLanes && k < kDepth;
          const float expected = inside ? source[lane * kDepth + k] : 0;
          const float allowed = std::ldexp(std::fabs(expected), -8 * parts);
          CHECK(std::fabs(sum - expected) <= allowed, parts << " parts of lane " << lane << " k "
                                                            << k << ": " << sum << ", expected "
                                                            << expected);
        }
      }
    }
  }
}

struct LargestOfLane {
  float value;
  int integer;
};

// An element's digits equal it to half a unit and lie where the layout says; everything else is
// zero.
void test_digits_layout() {
  Random random(5);
  constexpr int64_t kLanes = 39, kDepth = 100, kSteps = 2, kPanels = 2;
  constexpr int64_t kPanelBytes = kSteps * kDigitStepBytes + kScalesBytes;
  // Magnitudes at which the unit changes: at a power of two, and where a digit would exceed 127.
  // Then those with the smallest and the largest unit.
  const float edge = 2 - std::ldexp(1.0f, -6);
  const LargestOfLane largest_of[] = {{1.0f, 0x400000},
                                      {std::nextafter(1.0f, 0.0f), 0x400000},
                                      {std::nextafter(1.0f, 2.0f), 0x400000},
                                      {edge, 0x3f8000},
                                      {std::nextafter(edge, 0.0f), 0x7f0000},
                                      {std::nextafter(edge, 2.0f), 0x3f8000},
                                      {std::ldexp(1.0f, -105), 0x400000},
                                      {std::ldexp(1.0f, -106), 0x200000},
                                      {FLT_MIN, 2},
                                      {FLT_MAX, 0x400000},
                                      {0.0f, 0}};
  constexpr int kListed = sizeof(largest_of) / sizeof(largest_of[0]);
  constexpr int kNan = kListed, kInfinity = kListed + 1;
  std::vector<float> source(kLanes * kDepth);
  for (int64_t i = 0; i < kLanes * kDepth; ++i) {
    const int lane = static_cast<int>(i / kDepth);
    const float size =
        lane < kListed ? largest_of[lane].value / 2 : std::ldexp(1.0f, lane % 7 * 20 - 60);
    source[i] = random.uniform() * size;
  }
  for (int lane = 0; lane < kListed; ++lane) {
    source[lane * kDepth + 7] = lane % 2 ? largest_of[lane].value : -largest_of[lane].value;
  }
  source[3] = std::ldexp(2.5f, -22);  // half a unit: to even
  source[kNan * kDepth] = std::numeric_limits<float>::quiet_NaN();
  source[kInfinity * kDepth + 99] = -std::numeric_limits<float>::infinity();
  for (const Side side : {Side::kLeft, Side::kRight}) {
    std::vector<unsigned char> packed(kPanels * kPanelBytes, 0xff);
    pack_digits_portable({source.data(), kDepth, 1, false}, kLanes, kDepth, side, kMaxParts,
                         packed.data());
    for (int64_t lane = 0; lane < kPanels * 32; ++lane) {
      const unsigned char* const panel = packed.data() + lane / 32 * kPanelBytes;
      float scale;
      std::memcpy(&scale, panel + kPanelBytes - kScalesBytes + lane % 32 * 4, 4);
      if (lane == kNan || lane == kInfinity) {
        CHECK(std::isnan(scale), "lane " << lane << ": " << scale);
        continue;
      }
      const double unit = std::ldexp(static_cast<double>(scale), -21);
      double largest = 0;
      for (int64_t k = 0; k < kSteps * 64; ++k) {
        double integer = 0;
        for (int digit = 0; digit < 3; ++digit) {
          const int64_t tile = (k / 64 * 3 + digit) * 2 + lane % 32 / 16;
          const int64_t dword = k % 16, byte = k % 64 / 16;
          const int64_t at = side == Side::kLeft ? lane % 16 * 64 + dword * 4 + byte
                                                     : dword * 64 + lane % 16 * 4 + byte;
          integer = integer * 256 + static_cast<int8_t>(panel[tile * kTileBytes + at]);
        }
        const bool inside = lane < kLanes && k < kDepth;
        const double expected = inside ? source[lane * kDepth + k] : 0;
        largest = std::max(largest, std::fabs(integer));
        CHECK(std::fabs(integer * unit - expected) <= unit / 2,
              "lane " << lane << " k " << k << ": " << integer << " times " << unit << ", expected "
                      << expected);
        CHECK(lane != 0 || k != 3 || integer == 2, "a tie to " << integer);
      }
      if (lane < kListed) {
        CHECK(largest == largest_of[lane].integer, "lane " << lane << ": " << largest);
      } else if (lane < kLanes) {
        CHECK(largest >= 0x3f8000 && largest <= 0x7f0000, "lane " << lane << ": " << largest);
      }
    }
  }
}

void test_add_digits() {
  const Workspace sums(kDigitOrders * kBlockSums), total(kBlockSums), scales(2 * kPanelLanes);
  auto* const integers = reinterpret_cast<int32_t*>(sums.data());
  for (const int left_lane : {1, 17}) {
    const int right_lane = left_lane == 1 ? 30 : 14;  // in the other tile of its panel
    const int tile = left_lane / 16 * 2 + right_lane / 16;
    const int at = (tile * 16 + left_lane % 16) * 16 + right_lane % 16;
    for (int i = 0; i < kDigitOrders * kBlockSums; ++i) integers[i] = 0;
    for (int i = 0; i < kBlockSums; ++i) total.data()[i] = 5;
    for (int i = 0; i < 2 * kPanelLanes; ++i) scales.data()[i] = 1;
    integers[at] = 4 << 18, integers[kBlockSums + at] = 8 << 18;
    integers[2 * kBlockSums + at] = 16 << 18;
    // The product of the scales exceeds float32; that of the sum and both scales does not.
    scales.data()[left_lane] = std::ldexp(1.0f, 90);
    scales.data()[32 + right_lane] = std::ldexp(1.0f, -91);
    for (const bool accumulate : {false, true}) {
      add_digits_portable(integers, scales.data(), scales.data() + 32, 2, 2, accumulate, total.data());
      const float once = (4 * 256 + 8 + 16.0f / 256) / 2;
      CHECK(total.data()[at] == once * (accumulate ? 2 : 1), tile << ": " << total.data()[at]);
      CHECK(total.data()[at ^ 1] == 0, total.data()[at ^ 1]);
    }
  }
}

#if defined(GPT2_JAX_HAS_AMX)
bool same_bytes_or_both_nan(float a, float b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

// The AVX-512 packing makes the same bytes as the portable one.
void test_packing_twins() {
  Random random(2);
  for (int i = 0; i < 400; ++i) {
    const int64_t lanes = 1 + random.below(100), depth = 1 + random.below(140);
    const bool along_k = random.below(2), narrow = random.below(2);
    const Side side = random.below(2) ? Side::kLeft : Side::kRight;
    const int parts = narrow ? 1 : 1 + static_cast<int>(random.below(3));
    const int64_t stride = (along_k ? depth : lanes) + random.below(9);
    // The source has no spare element, so that the address sanitizer sees reads beyond it.
    const int64_t count = ((along_k ? lanes : depth) - 1) * stride + (along_k ? depth : lanes);
    std::vector<float> wide(narrow ? 0 : count);
    std::vector<uint16_t> thin(narrow ? count : 0);
    for (float& value : wide) value = random.any_float();
    for (uint16_t& value : thin) value = static_cast<uint16_t>(random.below(1 << 16));
    const PackSource source = {narrow ? static_cast<void*>(thin.data()) : wide.data(),
                               along_k ? stride : 1, along_k ? 1 : stride, narrow};
    const int64_t tiles = (lanes + 31) / 32 * ((depth + 31) / 32) * parts * 2;
    const Workspace expected(tiles * 256), found(tiles * 256);
    std::memset(found.data(), 0xaa, tiles * kTileBytes);
    pack_tiles_portable(source, lanes, depth, side, parts,
                        reinterpret_cast<unsigned char*>(expected.data()));
    pack_tiles_avx512(source, lanes, depth, side, parts,
                      reinterpret_cast<unsigned char*>(found.data()));
    const auto* a = reinterpret_cast<const uint16_t*>(expected.data());
    const auto* b = reinterpret_cast<const uint16_t*>(found.data());
    for (int64_t at = 0; at < tiles * 512; ++at) {
      // infinity - infinity is a NaN of unspecified sign.
      CHECK(a[at] == b[at] ||
                same_bytes_or_both_nan(bfloat16_to_float(a[at]), bfloat16_to_float(b[at])),
            "lanes " << lanes << " depth " << depth << " along_k " << along_k << " narrow "
                     << narrow << " parts " << parts << " right " << (side == Side::kRight)
                     << ", word " << at << ": " << b[at] << ", expected " << a[at]);
    }
  }
}

void test_digit_packing_twins() {
  Random random(6);
  for (int i = 0; i < 400; ++i) {
    const int64_t lanes = 1 + random.below(100), depth = 1 + random.below(kMaxDigitDepth);
    const bool along_k = random.below(2), narrow = random.below(2);
    const Side side = random.below(2) ? Side::kLeft : Side::kRight;
    const int64_t stride = (along_k ? depth : lanes) + random.below(9);
    const int64_t count = ((along_k ? lanes : depth) - 1) * stride + (along_k ? depth : lanes);
    std::vector<float> wide(narrow ? 0 : count);
    std::vector<uint16_t> thin(narrow ? count : 0);
    const int seldom = i % 3 == 0 ? 1 : 500;  // so that most lanes are finite, too
    const auto value = [&] { return random.below(seldom) ? random.uniform() : random.any_float(); };
    for (float& element : wide) element = value();
    for (uint16_t& element : thin) element = float_to_bfloat16(value());
    const PackSource source = {narrow ? static_cast<void*>(thin.data()) : wide.data(),
                               along_k ? stride : 1, along_k ? 1 : stride, narrow};
    const int64_t steps = (depth + 63) / 64, panels = (lanes + 31) / 32;
    const int64_t panel_bytes = steps * kDigitStepBytes + kScalesBytes;
    const Workspace expected(panels * panel_bytes / 4), found(panels * panel_bytes / 4);
    auto* const a = reinterpret_cast<unsigned char*>(expected.data());
    auto* const b = reinterpret_cast<unsigned char*>(found.data());
    std::memset(b, 0xaa, panels * panel_bytes);
    pack_digits_portable(source, lanes, depth, side, kMaxParts, a);
    pack_digits_avx512(source, lanes, depth, side, kMaxParts, b);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * panel_bytes, scales = first + steps * kDigitStepBytes;
      const float* const expected_scales = expected.data() + scales / 4;
      for (int lane = 0; lane < kPanelLanes; ++lane) {
        CHECK(same_bytes_or_both_nan(expected_scales[lane], found.data()[scales / 4 + lane]),
              "scale of lane " << lane << ": " << found.data()[scales / 4 + lane] << ", expected "
                               << expected_scales[lane]);
      }
      for (int64_t at = 0; at < steps * kDigitStepBytes; ++at) {
        const int64_t row = at % kTileBytes / 64, column = at % 64 / 4;
        const int64_t lane = at / kTileBytes % 2 * 16 + (side == Side::kLeft ? row : column);
        if (std::isnan(expected_scales[lane])) continue;  // its digits are unspecified
        CHECK(a[first + at] == b[first + at],
              "lanes " << lanes << " depth " << depth << " along_k " << along_k << " narrow "
                       << narrow << " right " << (side == Side::kRight) << ", byte " << at
                       << ": " << int{b[first + at]} << ", expected " << int{a[first + at]});
      }
    }
  }
}

void test_add_digits_twins() {
  Random random(7);
  const Workspace sums(kDigitOrders * kBlockSums), expected(kBlockSums), found(kBlockSums);
  const Workspace scales(2 * kPanelLanes);
  auto* const integers = reinterpret_cast<int32_t*>(sums.data());
  for (int i = 0; i < kDigitOrders * kBlockSums; ++i) {
    integers[i] = static_cast<int32_t>(random.below(1 << 23)) - (1 << 22);
  }
  for (int i = 0; i < 2 * kPanelLanes; ++i) scales.data()[i] = random.uniform();
  for (const bool accumulate : {false, true}) {
    add_digits_portable(integers, scales.data(), scales.data() + 32, 2, 2, accumulate, expected.data());
    add_digits_avx512(integers, scales.data(), scales.data() + 32, 2, 2, accumulate, found.data());
    for (int i = 0; i < kBlockSums; ++i) {
      CHECK(expected.data()[i] == found.data()[i],
            "at " << i << ": " << found.data()[i] << ", expected " << expected.data()[i]);
    }
  }
}

// The AVX-512 finish writes the same output as the portable one.
void test_finish_twins() {
  Random random(3);
  const Workspace sums(kBlockSums);
  constexpr int64_t kFloats = 32 * 64 + 64;
  for (int i = 0; i < 1000; ++i) {
    // Squares are compared where all of them are finite.
    for (int j = 0; j < kBlockSums; ++j) {
      sums.data()[j] = i % 2 ? random.any_float() : random.uniform();
    }
    const int rows = 1 + static_cast<int>(random.below(32));
    const int columns = 1 + static_cast<int>(random.below(32));
    const DType dtype = random.below(2) ? DType::kFloat32 : DType::kBFloat16;
    const int64_t offset = random.below(2) ? 0 : random.below(16);
    const int64_t stride = random.below(2) ? 64 : 32 + random.below(9);
    const Workspace memory[2] = {Workspace(kFloats), Workspace(kFloats)};
    std::vector<float> bias(columns);
    for (float& value : bias) value = random.uniform();
    const bool accumulate = dtype == DType::kFloat32 && random.below(3) == 0;
    OutputBlock result = {nullptr,
                         stride,
                         dtype == DType::kBFloat16,
                         accumulate,
                         !accumulate && random.below(2) ? bias.data() : nullptr,
                         random.below(2) == 1,
                         !accumulate && random.below(2) == 1,
                         nullptr};
    float squares[2] = {};
    for (int64_t k = 0; k < kFloats; ++k) {
      memory[0].data()[k] = memory[1].data()[k] = random.uniform();
    }
    const int64_t width = result.narrow ? 2 : 4;
    for (int twin = 0; twin < 2; ++twin) {
      result.out = reinterpret_cast<char*>(memory[twin].data()) + offset * width;
      result.squares = result.narrow ? nullptr : &squares[twin];
      (twin ? finish_tiles_avx512 : finish_tiles_portable)(result, sums.data(), rows, columns);
    }
    // The order of additions differs: one rounding for each of at most kBlockSums additions.
    CHECK(squares[0] == squares[1] || !std::isfinite(squares[0] + squares[1]) ||
              std::fabs(squares[0] - squares[1]) <= std::ldexp(kBlockSums, -24) * squares[0],
          "squares " << squares[1] << ", expected " << squares[0]);
    CHECK(std::isnan(squares[0]) == std::isnan(squares[1]), squares[0] << " and " << squares[1]);
    const auto element = [&](int twin, int64_t at) {
      if (!result.narrow) return memory[twin].data()[at];
      return bfloat16_to_float(reinterpret_cast<const uint16_t*>(memory[twin].data())[at]);
    };
    for (int64_t at = 0; at < kFloats * 4 / width; ++at) {
      CHECK(same_bytes_or_both_nan(element(0, at), element(1, at)),
            rows << " x " << columns << " narrow " << result.narrow << " transposed "
                 << result.transposed << " accumulate " << accumulate << " stream " << result.stream
                 << " at " << at << ": " << element(1, at) << ", expected " << element(0, at));
    }
  }
}

void test_add_twins() {
  Random random(4);
  const Workspace sums(kBlockSums), expected(kBlockSums), found(kBlockSums);
  for (int i = 0; i < kBlockSums; ++i) {
    sums.data()[i] = random.any_float();
    expected.data()[i] = found.data()[i] = random.any_float();
  }
  add_tiles_portable(sums.data(), 2, 2, expected.data());
  add_tiles_avx512(sums.data(), 2, 2, found.data());
  for (int i = 0; i < kBlockSums; ++i) {
    CHECK(same_bytes_or_both_nan(expected.data()[i], found.data()[i]),
          "at " << i << ": " << found.data()[i] << ", expected " << expected.data()[i]);
  }
}
#endif

uint16_t words[2][kTileBytes / 2];
float sums[256];

// Multiplies tiles that are zero but for one row and one column; returns sum (0, 0).
float multiply_one(std::initializer_list<float> left, std::initializer_list<float> right,
                   float sum) {
  std::memset(words, 0, sizeof(words));
  std::memset(sums, 0, sizeof(sums));
  sums[0] = sum;
  int k = 0;
  for (const float value : left) words[0][k++] = float_to_bfloat16(value);
  k = 0;
  for (const float value : right) {
    words[1][k / 2 * 32 + k % 2] = float_to_bfloat16(value);
    ++k;
  }
  TileModel::configure();
  TileModel::load<0>(sums);
  TileModel::load<4>(words[0]);
  TileModel::load<6>(words[1]);
  TileModel::multiply<0, 4, 6>();
  TileModel::store<0>(sums);
  TileModel::release();
  return sums[0];
}

void test_model() {
  CHECK(multiply_one({2, 3}, {5, 7}, 100) == 131, "");
  for (int i = 1; i < 256; ++i) CHECK(sums[i] == 0, i << ": " << sums[i]);
  const float big = std::ldexp(1.0f, 24);
  // Even and odd k are summed apart: 2^24 + 1 rounds to 2^24 in the even chain, so 1 is lost there.
  CHECK(multiply_one({big, 0, 1, 0, -big, 0}, {1, 1, 1, 1, 1, 1}, 0) == 0, "");
  CHECK(multiply_one({big, 1, 0, 0, -big, 0}, {1, 1, 1, 1, 1, 1}, 0) == 1, "");
  // The products are added up before they are added to the tile's sum.
  CHECK(multiply_one({1, 1}, {1, 1}, big) == big + 2, "");
  // A product is not rounded before it is added.
  const float three_halves = std::ldexp(1.0f, -12) * 1.5f;
  CHECK(multiply_one({1, 0, three_halves, 0}, {1, 0, three_halves, 0}, 0) ==
            std::fma(three_halves, three_halves, 1.0f),
        "");
  const float tiny = std::ldexp(1.0f, -127);
  CHECK(multiply_one({tiny}, {std::ldexp(1.0f, 100)}, 0) == 0, "a denormal operand");
  CHECK(multiply_one({0}, {0}, tiny) == 0, "a denormal sum");
  const float minus_half = multiply_one({-std::ldexp(1.0f, -100)}, {std::ldexp(1.0f, -27)}, -0.0f);
  CHECK(minus_half == 0, "a denormal result " << minus_half);
  CHECK(multiply_one({std::ldexp(1.0f, -100)}, {std::ldexp(1.0f, -26)}, 0) == FLT_MIN, "");
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(multiply_one({infinity}, {2}, 1) == infinity, "");
  CHECK(std::isnan(multiply_one({infinity, 1}, {1, -infinity}, 1)), "");
}

void test_digit_model() {
  alignas(64) int8_t left[16][64] = {}, right[16][64] = {};
  int32_t result[16][16] = {};
  result[3][5] = 1000;
  left[3][4 * 7 + 2] = -128, right[7][4 * 5 + 2] = -128;
  left[3][63] = 100, right[15][4 * 5 + 3] = -3;
  TileModel::configure();
  DigitModel::load<1>(result);
  DigitModel::load<4>(left);
  DigitModel::load<7>(right);
  DigitModel::multiply<1, 4, 7>();
  DigitModel::store<1>(result);
  TileModel::release();
  for (int at = 0; at < 256; ++at) {
    const int32_t expected = at == 3 * 16 + 5 ? 1000 + 16384 - 300 : 0;
    CHECK(result[at / 16][at % 16] == expected, at << ": " << result[at / 16][at % 16]);
  }
}

int allow() { return 0; }
int never_asked() {
  CHECK(false, "permission asked for without the features");
  return 0;
}

void test_availability() {
  const CpuFeatures all = ~CpuFeatures{0};
  if (amx_kernel(Precision::kBF16_BF16_F32) == nullptr) {
    CHECK(amx_unavailable(all, never_asked).find("no AMX kernel") != std::string::npos, "");
  } else {
    CHECK(amx_unavailable(all, allow).empty(), amx_unavailable(all, allow));
    const std::string refused = amx_unavailable(all, [] { return EPERM; });
    CHECK(refused.find(std::strerror(EPERM)) != std::string::npos, refused);
    for (const CpuFeature missing :
         {kAmxTile, kAmxBf16, kAmxInt8, kAvx512f, kAvx512bw, kAvx512bf16}) {
      const std::string reason = amx_unavailable(all & ~missing, never_asked);
      CHECK(reason.find("CPU_FEATURES: " + cpu_feature_names(missing)) != std::string::npos,
            reason);
    }
  }
  const Implementation& amx = *find_implementation("amx");
  CHECK(amx.unavailable() == amx_unavailable(), amx.unavailable());
  Random random(4);
  const Problem problem({2, 2, 2}, false, false, Types(), random);
  CHECK(amx.refuse(problem.matmul()).find("BF16_BF16_F32_X3") != std::string::npos, "");
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  using namespace gpt2_jax;
  test_layout();
  test_digits_layout();
  test_add_digits();
  test_model();
  test_digit_model();
  test_availability();
#if defined(GPT2_JAX_HAS_AMX)
  if (has_all(cpu_features_seen(), kAvx512Code | kAvx512bf16)) {
    test_packing_twins();
    test_digit_packing_twins();
    test_add_digits_twins();
    test_finish_twins();
    test_add_twins();
  } else {
    std::printf("no AVX-512 with bfloat16 here: only the portable packing is tested\n");
  }
#endif
  return report("test_tiles");
}

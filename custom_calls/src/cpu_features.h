// The CPU's instruction sets, and the mask that forbids some of them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace gpt2_jax {

// A set of features, one bit each.
using CpuFeatures = uint32_t;

enum CpuFeature : CpuFeatures {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kAvx512f = 1u << 2,
  kNeon = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512vl = 1u << 5,
  kAvx512bf16 = 1u << 6,
  kAmxTile = 1u << 7,
  kAmxBf16 = 1u << 8,
  kAmxInt8 = 1u << 9,
};

// The features that code compiled for an instruction set needs; src/CMakeLists.txt has the
// compiler's flags.
constexpr CpuFeatures kAvx2Code = kAvx2 | kFma;
constexpr CpuFeatures kAvx512Code = kAvx512f | kAvx512bw | kAvx512vl;

constexpr bool has_all(CpuFeatures features, CpuFeatures needed) { return !(needed & ~features); }

// The features that CPU and operating system offer. The mask does not count here.
CpuFeatures cpu_features_seen();

// The offered features that GPT2_JAX_CPU_FEATURES allows. The variable is a comma list of features
// ("avx2,fma"), or "none"; unset or empty allows all. Read once, at the first call.
CpuFeatures cpu_features();

// Whether this CPU multiplies pairs of bfloat16 (vdpbf16ps) faster than float32: AMD's Zen 4 and 5 do,
// at about twice the rate; Intel's do not. By the vendor and not by a timing: runs must not differ in
// their bits.
bool dot_products_pay();

// The features that such a list names. Sets `unknown`, when it is not null, to a comma list of the
// names that are no feature; they allow nothing.
CpuFeatures parse_cpu_features(std::string_view list, std::string* unknown);

// "avx2,fma"; "" for none.
std::string cpu_feature_names(CpuFeatures features);

}  // namespace gpt2_jax

#include "cpu_features.h"

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gpt2_jax {
namespace {

struct NamedFeature {
  CpuFeature feature;
  std::string_view name;
};

constexpr NamedFeature kFeatures[] = {
    {kAvx2, "avx2"},
    {kFma, "fma"},
    {kAvx512f, "avx512f"},
    {kNeon, "neon"},
    {kAvx512bw, "avx512bw"},
    {kAvx512vl, "avx512vl"},
    {kAvx512bf16, "avx512bf16"},
    {kAmxTile, "amx_tile"},
    {kAmxBf16, "amx_bf16"},
    {kAmxInt8, "amx_int8"},
};

void append(std::string* list, std::string_view name) {
  if (!list->empty()) *list += ",";
  *list += name;
}

std::string_view trim(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

#if defined(__x86_64__)
// AMX's features and AVX-512 BF16, read by CPUID: only recent compilers' support libraries know
// them.
CpuFeatures tile_features_seen() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
  unsigned saved, unused;  // XCR0: the registers that the operating system saves
  __asm__("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  constexpr unsigned kAvx512State = 0xe6, kTileState = 0x60000;
  CpuFeatures seen = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
  if ((saved & kTileState) == kTileState) {
    if (edx & (1u << 22)) seen |= kAmxBf16;
    if (edx & (1u << 24)) seen |= kAmxTile;
    if (edx & (1u << 25)) seen |= kAmxInt8;
  }
  const unsigned last_subleaf = eax;
  if ((saved & kAvx512State) == kAvx512State && last_subleaf >= 1 &&
      __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5))) {
    seen |= kAvx512bf16;
  }
  return seen;
}
#endif

}  // namespace

CpuFeatures cpu_features_seen() {
  CpuFeatures seen = 0;
#if defined(__x86_64__)
  // The compiler's support library reads CPUID, and XGETBV for what the operating system saves.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) seen |= kAvx2;
  if (__builtin_cpu_supports("fma")) seen |= kFma;
  if (__builtin_cpu_supports("avx512f")) seen |= kAvx512f;
  if (__builtin_cpu_supports("avx512bw")) seen |= kAvx512bw;
  if (__builtin_cpu_supports("avx512vl")) seen |= kAvx512vl;
  seen |= tile_features_seen();
#elif defined(__aarch64__)
  seen |= kNeon;  // part of the base architecture
#endif
  return seen;
}

bool dot_products_pay() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool pays = __builtin_cpu_is("amd");
  return pays;
#else
  return false;
#endif
}

CpuFeatures cpu_features() {
  static const CpuFeatures features = [] {
    const char* list = std::getenv("GPT2_JAX_CPU_FEATURES");
    const CpuFeatures seen = cpu_features_seen();
    return list == nullptr || *list == '\0' ? seen : seen & parse_cpu_features(list, nullptr);
  }();
  return features;
}

CpuFeatures parse_cpu_features(std::string_view list, std::string* unknown) {
  CpuFeatures features = 0;
  while (!list.empty()) {
    const size_t comma = list.find(',');
    const std::string_view name = trim(list.substr(0, comma));
    list = comma == std::string_view::npos ? std::string_view() : list.substr(comma + 1);
    bool known = name.empty() || name == "none";
    for (const NamedFeature& entry : kFeatures) {
      if (name != entry.name) continue;
      features |= entry.feature;
      known = true;
    }
    if (!known && unknown != nullptr) append(unknown, name);
  }
  return features;
}

std::string cpu_feature_names(CpuFeatures features) {
  std::string names;
  for (const NamedFeature& entry : kFeatures) {
    if (features & entry.feature) append(&names, entry.name);
  }
  return names;
}

}  // namespace gpt2_jax

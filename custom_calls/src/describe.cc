#include <cstdlib>
#include <string>

#include "cpu_features.h"
#include "custom_calls.h"
#include "kernels/kernel.h"
#include "registry.h"
#include "xla/ffi/api/c_api.h"

namespace gpt2_jax {
namespace {

std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    // A control character can only come from an environment variable or a path; a space replaces
    // it.
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + "\"";
}

// "avx2,fma" as ["avx2", "fma"].
std::string json_list(std::string_view names) {
  std::string result = "[";
  while (!names.empty()) {
    const size_t comma = names.find(',');
    if (result.size() > 1) result += ", ";
    result += quoted(names.substr(0, comma));
    names = comma == std::string_view::npos ? std::string_view() : names.substr(comma + 1);
  }
  return result + "]";
}

// A comma list of the precisions in which an implementation multiplies f32 operands.
std::string precisions(const Implementation& implementation) {
  std::string names;
  for (const Precision precision : kPrecisions) {
    Matmul matmul;
    matmul.precision = precision;
    if (!implementation.refuse(matmul).empty()) continue;
    if (!names.empty()) names += ",";
    names += name(precision);
  }
  return names;
}

std::string describe() {
  std::string json = "{\"version\": " + quoted(GPT2_JAX_VERSION) + ", \"xla_ffi_api\": \"" +
                     std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR) +
                     "\", \"implementations\": [";
  bool first = true;
  for (const Implementation& implementation : implementations()) {
    const std::string reason = implementation.unavailable();
    if (!first) json += ", ";
    first = false;
    json += "{\"name\": " + quoted(implementation.name) +
            ", \"available\": " + (reason.empty() ? "true" : "false") +
            ", \"reason\": " + quoted(reason) +
            ", \"precisions\": " + json_list(precisions(implementation)) + "}";
  }
  const char* mask = std::getenv("GPT2_JAX_CPU_FEATURES");
  std::string unknown;
  if (mask != nullptr) parse_cpu_features(mask, &unknown);
  return json +
         "], \"cpu_features\": {\"seen\": " + json_list(cpu_feature_names(cpu_features_seen())) +
         ", \"allowed\": " + json_list(cpu_feature_names(cpu_features())) +
         ", \"mask\": " + (mask == nullptr ? "null" : quoted(mask)) +
         ", \"unknown\": " + json_list(unknown) +
         "}, \"kernel\": " + quoted(best_kernel(Precision::kF32_F32_F32).name) +
         ", \"bfloat16_kernel\": " + quoted(best_kernel(Precision::kBF16_BF16_F32).name) + "}";
}

}  // namespace
}  // namespace gpt2_jax

int gpt2_jax_custom_calls_interface() { return GPT2_JAX_INTERFACE; }

const char* gpt2_jax_custom_calls_describe() {
  static const std::string description = gpt2_jax::describe();
  return description.c_str();
}

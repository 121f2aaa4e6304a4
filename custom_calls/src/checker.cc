#include "checker.h"

#include <algorithm>
#include <cctype>
#include <sstream>

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;

// "x f32[256,768]".
std::string to_string(const NamedBuffer& buffer) {
  std::ostringstream dtype;
  dtype << buffer.dtype;
  std::string text = dtype.str();
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  text = std::string(buffer.name) + " " + text + "[";
  for (size_t i = 0; i < buffer.dimensions.size(); ++i) {
    text += (i ? "," : "") + std::to_string(buffer.dimensions[i]);
  }
  return text + "]";
}

}  // namespace

void Checker::fail(const std::string& problem) {
  if (ok()) error_ = message(problem);
}

std::string Checker::message(const std::string& problem) const {
  std::string text = handler_ + (": " + problem);
  const char* separator = "; found ";
  for (const NamedBuffer& buffer : buffers_) {
    text += separator + to_string(buffer);
    separator = ", ";
  }
  return text;
}

DType Checker::dtype(const NamedBuffer& buffer) {
  if (buffer.dtype == ffi::BF16) return DType::kBFloat16;
  expect(buffer.dtype == ffi::F32, std::string(buffer.name) + " of dtype f32 or bf16");
  return DType::kFloat32;
}

void Checker::size(const NamedBuffer& buffer, int64_t expected) {
  expect(buffer.size == expected,
         std::string(buffer.name) + " of size " + std::to_string(expected));
}

int64_t Checker::num_threads(int64_t count) {
  expect(count >= 1, "num_threads >= 1, got " + std::to_string(count));
  return std::max<int64_t>(count, 1);
}

const Implementation* Checker::implementation(std::string_view name) {
  const Implementation* const found = find_implementation(name);
  expect(found != nullptr, "an implementation among " + implementation_names() + ", got \"" +
                               std::string(name) + "\"");
  return found;
}

Precision Checker::precision(std::string_view name) {
  Precision found = Precision::kF32_F32_F32;
  if (parse_precision(name, &found)) return found;
  std::string names;
  for (const Precision precision : kPrecisions) {
    names += (names.empty() ? "" : ", ") + std::string(gpt2_jax::name(precision));
  }
  expect(false, "a precision among " + names + ", got \"" + std::string(name) + "\"");
  return found;
}

ffi::Error Checker::refusal(const Implementation* implementation, const Matmul& matmul) const {
  if (!ok()) return ffi::Error::Success();
  std::string reason = implementation->unavailable();
  if (reason.empty()) reason = implementation->refuse(matmul);
  if (reason.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    std::string(handler_) + ": " + implementation->name + " refuses " +
                        gpt2_jax::to_string(matmul) + ": " + reason);
}

}  // namespace gpt2_jax

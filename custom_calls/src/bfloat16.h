// bfloat16 is the upper half of a float32; it travels as uint16_t.
#pragma once

#include <cstdint>
#include <cstring>

namespace gpt2_jax {

inline float bfloat16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Rounds towards zero.
inline uint16_t upper_half(float value) { return static_cast<uint16_t>(bits_of(value) >> 16); }

// Rounds to nearest, ties to even. A NaN stays a NaN: rounding its payload up could make it an
// infinity.
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

// Rounds as the CPU's bfloat16 instructions do: to nearest even, and a denormal becomes zero.
inline uint16_t float_to_bfloat16_without_denormals(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>((bits >> 16) & 0x8000);
  return float_to_bfloat16(value);
}

}  // namespace gpt2_jax

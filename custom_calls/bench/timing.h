// Random operands for the bench, and a stopwatch.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "matmul.h"

namespace gpt2_jax {

// An array of random values in [-0.5, 0.5), of either dtype.
class Storage {
 public:
  Storage(int64_t count, DType dtype, uint32_t seed)
      : dtype_(dtype), words_(dtype == DType::kFloat32 ? count : (count + 1) / 2) {
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float value = static_cast<float>(seed >> 8) / (1 << 24) - 0.5f;
      const uint16_t narrow = float_to_bfloat16(value);
      if (dtype == DType::kFloat32) {
        words_[i] = value;
      } else {
        std::memcpy(reinterpret_cast<char*>(words_.data()) + 2 * i, &narrow, 2);
      }
    }
  }

  DType dtype() const { return dtype_; }
  void* data() { return words_.data(); }
  const void* data() const { return words_.data(); }

 private:
  DType dtype_;
  std::vector<float> words_;
};

// The median time of a run, over as many runs as fit in `budget` seconds, at least one.
template <typename Run>
double median_seconds(double budget, const Run& run) {
  std::vector<double> seconds;
  double total = 0;
  do {
    const auto start = std::chrono::steady_clock::now();
    run();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    total += seconds.back();
  } while (total < budget && seconds.size() < 1000);
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace gpt2_jax

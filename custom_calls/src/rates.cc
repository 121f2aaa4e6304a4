#include "rates.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "custom_calls.h"
#include "matmul.h"
#include "registry.h"
#include "workspace.h"

namespace gpt2_jax {
namespace {

double thread_cpu_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Calls work(thread), which returns what it has done, again and again on all threads at once.
// Returns what they do in a second of their CPU time together: another program's work on these CPUs
// counts little.
template <typename Work>
double rate(int num_threads, double seconds, const Work& work) {
  std::vector<double> rates(static_cast<size_t>(num_threads));
  const auto repeat = [&](int thread) {
    work(thread);  // the first touch of memory, and the processor's change to wide registers
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto begin = now();
    const double cpu_begin = thread_cpu_seconds();
    double done = 0;
    do {
      done += work(thread);
    } while (std::chrono::duration<double>(now() - begin).count() < seconds);
    rates[static_cast<size_t>(thread)] = done / (thread_cpu_seconds() - cpu_begin);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(repeat, i);
  repeat(0);
  for (std::thread& thread : threads) thread.join();
  double total = 0;
  for (const double of_thread : rates) total += of_thread;
  return total;
}

}  // namespace

double kernel_gflops(const Kernel& kernel, int num_threads, double seconds) {
  constexpr int64_t kDepth = 128, kCalls = 500;
  const int64_t left_floats = kernel.left_lanes * kDepth, right_floats = kernel.right_lanes * kDepth;
  const int64_t sums_floats = int64_t{kernel.left_lanes} * kernel.right_lanes;
  const double flops = 2.0 * static_cast<double>(sums_floats) * kDepth * kCalls;
  return 1e-9 * rate(num_threads, seconds, [&](int) {
    const Workspace memory(sums_floats + left_floats + right_floats);
    std::fill_n(memory.data(), sums_floats + left_floats + right_floats, 0.0f);
    Prefetch prefetch;
    PanelBlock block = {};
    block.left = reinterpret_cast<unsigned char*>(memory.data() + sums_floats);
    block.right = reinterpret_cast<unsigned char*>(memory.data() + sums_floats + left_floats);
    block.left_lanes = kernel.left_lanes, block.right_lanes = kernel.right_lanes;
    block.left_parts = block.right_parts = 1;
    block.depth = kDepth;
    block.sums = memory.data();
    block.accumulate = true;
    block.prefetch = &prefetch;
    if (kernel.configure != nullptr) kernel.configure();
    for (int64_t i = 0; i < kCalls; ++i) kernel.multiply(block);
    if (kernel.release != nullptr) kernel.release();
    return flops;
  });
}

double memory_gbytes(int num_threads, double seconds) {
  constexpr int64_t kFloats = int64_t{64} << 20;
  std::vector<float> values(kFloats);
  const int64_t share = kFloats / num_threads;
  return 1e-9 * rate(num_threads, seconds, [&](int thread) {
    float* const own = values.data() + thread * share;
    for (int64_t i = 0; i < share; ++i) own[i] += 1;
    return 2.0 * sizeof(float) * static_cast<double>(share);
  });
}

const Kernel& fastest_kernel(Precision precision) {
  if (precision == Precision::kBF16_BF16_F32 && find_implementation("amx")->unavailable().empty()) {
    return *amx_kernel(precision);
  }
  return best_kernel(precision);
}

}  // namespace gpt2_jax

const char* gpt2_jax_custom_calls_rates(int num_threads) {
  using namespace gpt2_jax;
  thread_local std::string text;
  try {
    text = "{";
    for (const Precision precision : {Precision::kF32_F32_F32, Precision::kBF16_BF16_F32}) {
      const Kernel& kernel = fastest_kernel(precision);
      text += "\"" + std::string(name(precision)) +
              "\": " + std::to_string(kernel_gflops(kernel, num_threads, 0.4)) + ", ";
    }
    text += "\"memory\": " + std::to_string(memory_gbytes(num_threads, 0.4)) + "}";
  } catch (const std::exception&) {  // out of memory or threads
    return nullptr;
  }
  return text.c_str();
}

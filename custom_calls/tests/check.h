// A small test framework: named cases, checks with messages, an exit status.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gpt2_jax {

// XLA calls the handlers with denormals flushed: operands and results that are denormal are zeros.
// With GPT2_JAX_FLUSH_DENORMALS a test program runs that way too; its threads inherit the mode.
inline bool flush_denormals_if_asked() {
  if (std::getenv("GPT2_JAX_FLUSH_DENORMALS") == nullptr) return false;
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);  // FTZ and DAZ
#elif defined(__aarch64__)
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" ::"r"(control | uint64_t{1} << 24));  // FZ
#endif
  volatile float tiny = 1e-40f;
  volatile float product = tiny * 1.0f;
  if (product != 0) {
    std::fprintf(stderr, "denormals are not flushed\n");
    std::exit(1);
  }
  return true;
}
inline const bool denormals_are_flushed = flush_denormals_if_asked();

inline int& failures() {
  static int count = 0;
  return count;
}

// Counts a failure and prints the first 20: a wrong kernel fails everywhere.
inline void fail(const char* file, int line, const std::string& message) {
  if (++failures() <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
}

inline int report(const char* program) {
  std::printf("%s: %s\n", program, failures() == 0 ? "passed" : "FAILED");
  return failures() == 0 ? 0 : 1;
}

}  // namespace gpt2_jax

// CHECK(condition, what << "was" << seen)
#define CHECK(condition, message)                           \
  do {                                                      \
    if (!(condition)) {                                     \
      std::ostringstream check_text;                        \
      check_text << #condition << ": " << message;          \
      gpt2_jax::fail(__FILE__, __LINE__, check_text.str()); \
    }                                                       \
  } while (false)

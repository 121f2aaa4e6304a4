// A small test framework: named cases, checks with messages, an exit status.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

namespace gpt2_jax {

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

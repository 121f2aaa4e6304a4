// One matrix product, as every implementation gets it.
//
//   out (m x n) = op(a) (m x k) . op(b) (k x n),  all row-major in memory.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace gpt2_jax {

enum class DType : uint8_t { kFloat32, kBFloat16 };

// Arithmetic of the product. All but the last have the names of jax.lax.DotAlgorithmPreset, which
// has nothing like the last.
enum class Precision : uint8_t {
  kF32_F32_F32,       // operands as they are, float32 products and sums
  kBF16_BF16_F32,     // operands rounded to bfloat16 (nearest, ties to even), float32 sums
  kBF16_BF16_F32_X3,  // float32 operands as hi + lo bfloat16, three products
  kBF16_BF16_F32_X6,  // float32 operands as three bfloat16 parts, six products
  kS8_S8_S32_X6,      // operands as integers of three 8-bit digits, six exact products
};
constexpr Precision kPrecisions[] = {Precision::kF32_F32_F32, Precision::kBF16_BF16_F32,
                                     Precision::kBF16_BF16_F32_X3, Precision::kBF16_BF16_F32_X6,
                                     Precision::kS8_S8_S32_X6};

// One operand: a row-major matrix that starts `offset` elements into a buffer, so that a weight can
// be read in place from a flat buffer that holds many.
struct Operand {
  const void* buffer = nullptr;
  int64_t offset = 0;             // elements from the buffer's start
  int64_t leading_dimension = 0;  // elements from one stored row to the next
  DType dtype = DType::kFloat32;
  bool transposed = false;  // op(X) is the transpose of what is stored
};

// `out` must not overlap an operand or the bias. m, n, k >= 0; with k == 0 the product is zeros.
struct Matmul {
  int64_t m = 0, n = 0, k = 0;
  Operand a;  // stored m x k, or k x m when transposed
  Operand b;  // stored k x n, or n x k when transposed
  void* out = nullptr;
  int64_t out_leading_dimension = 0;
  DType out_dtype = DType::kFloat32;  // bfloat16: each float32 sum is rounded once, at the end
  bool accumulate = false;            // out += product; out is float32 and there is no bias
  const float* bias = nullptr;        // n elements added to every row's float32 sums
  // Unless nullptr: set to the sum of the squares of out's new elements; out is then float32. Only
  // an implementation with sums_squares sets it. For the others `multiply` (registry.h) does.
  double* sum_of_squares = nullptr;
  Precision precision = Precision::kF32_F32_F32;
};

const char* name(DType dtype);          // "f32", "bf16"
const char* name(Precision precision);  // "F32_F32_F32", ...
// False, and `precision` untouched, when there is no such name.
bool parse_precision(std::string_view text, Precision* precision);

class Executor;

// Sets sum_of_squares, which must not be nullptr, from the elements of out.
void add_up_squares(const Matmul& matmul, Executor& executor);

// "f32[256,768] . bf16[2304,768]^T + bias -> f32[256,2304], BF16_BF16_F32", for messages.
std::string to_string(const Matmul& matmul);

}  // namespace gpt2_jax

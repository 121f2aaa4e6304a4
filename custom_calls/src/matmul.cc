#include "matmul.h"

#include <sstream>

#include "rows/rows.h"

namespace gpt2_jax {
namespace {

void print(std::ostream& stream, DType dtype, int64_t rows, int64_t columns, bool transposed) {
  stream << name(dtype) << "[" << (transposed ? columns : rows) << ","
         << (transposed ? rows : columns) << "]" << (transposed ? "^T" : "");
}

}  // namespace

const char* name(DType dtype) { return dtype == DType::kFloat32 ? "f32" : "bf16"; }

const char* name(Precision precision) {
  switch (precision) {
    case Precision::kF32_F32_F32:
      return "F32_F32_F32";
    case Precision::kBF16_BF16_F32:
      return "BF16_BF16_F32";
    case Precision::kBF16_BF16_F32_X3:
      return "BF16_BF16_F32_X3";
    case Precision::kBF16_BF16_F32_X6:
      return "BF16_BF16_F32_X6";
    case Precision::kS8_S8_S32_X6:
      return "S8_S8_S32_X6";
  }
  return "?";
}

bool parse_precision(std::string_view text, Precision* precision) {
  for (const Precision known : kPrecisions) {
    if (text == name(known)) {
      *precision = known;
      return true;
    }
  }
  return false;
}

void add_up_squares(const Matmul& matmul, Executor& executor) {
  const float* const out = static_cast<const float*>(matmul.out);
  const int64_t stride = matmul.out_leading_dimension;
  const bool one_piece = stride == matmul.n;
  double sum = 0;
  for (int64_t i = 0; i < (one_piece ? 1 : matmul.m); ++i) {
    sum += sum_of_squares(one_piece ? matmul.m * matmul.n : matmul.n, out + i * stride, executor);
  }
  *matmul.sum_of_squares = sum;
}

std::string to_string(const Matmul& matmul) {
  std::ostringstream stream;
  print(stream, matmul.a.dtype, matmul.m, matmul.k, matmul.a.transposed);
  stream << " . ";
  print(stream, matmul.b.dtype, matmul.k, matmul.n, matmul.b.transposed);
  stream << (matmul.bias ? " + bias" : "") << (matmul.accumulate ? " + out" : "") << " -> ";
  print(stream, matmul.out_dtype, matmul.m, matmul.n, false);
  stream << ", " << name(matmul.precision);
  return stream.str();
}

}  // namespace gpt2_jax

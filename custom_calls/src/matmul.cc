#include "matmul.h"

#include <sstream>

#include "rows/rows.h"

namespace gpt2_jax {
namespace {

struct NamedPrecision {
  Precision precision;
  const char* name;
};

constexpr NamedPrecision kPrecisions[] = {
    {Precision::kF32_F32_F32, "F32_F32_F32"},
    {Precision::kBF16_BF16_F32, "BF16_BF16_F32"},
    {Precision::kBF16_BF16_F32_X3, "BF16_BF16_F32_X3"},
    {Precision::kBF16_BF16_F32_X6, "BF16_BF16_F32_X6"},
};

void print(std::ostream& stream, DType dtype, int64_t rows, int64_t columns, bool transposed) {
  stream << name(dtype) << "[" << (transposed ? columns : rows) << ","
         << (transposed ? rows : columns) << "]" << (transposed ? "^T" : "");
}

}  // namespace

const char* name(DType dtype) { return dtype == DType::kFloat32 ? "f32" : "bf16"; }

const char* name(Precision precision) {
  for (const NamedPrecision& entry : kPrecisions) {
    if (entry.precision == precision) return entry.name;
  }
  return "?";
}

bool parse_precision(std::string_view text, Precision* precision) {
  for (const NamedPrecision& entry : kPrecisions) {
    if (text == entry.name) {
      *precision = entry.precision;
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

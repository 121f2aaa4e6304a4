// Reading an operand: where element (row, column) of op(X) lies, and its value as float32.
//
// Element types are resolved once per block by `visit_operand`, so that the inner loops are written
// once and compiled for each stored type.
#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "matmul.h"

namespace gpt2_jax {

struct LoadFloat32 {
  using Stored = float;
  static float load(Stored value) { return value; }
};

struct LoadFloat32AsBFloat16 {  // rounds a float32 operand, as BF16_BF16_F32 asks
  using Stored = float;
  static float load(Stored value) { return bfloat16_to_float(float_to_bfloat16(value)); }
};

struct LoadBFloat16 {
  using Stored = uint16_t;
  static float load(Stored value) { return bfloat16_to_float(value); }
};

// op(X) as rows and columns with strides in elements; one of the two strides is 1.
template <typename Load>
struct MatrixView {
  const typename Load::Stored* data;
  int64_t row_stride, column_stride;

  float at(int64_t row, int64_t column) const {
    return Load::load(data[row * row_stride + column * column_stride]);
  }
};

// Calls visitor(MatrixView<Load>) with the Load for the operand's stored type and the precision.
template <typename Visitor>
void visit_operand(const Operand& operand, Precision precision, const Visitor& visitor) {
  const auto visit = [&](auto load) {
    using Load = decltype(load);
    using Stored = typename Load::Stored;
    const int64_t row_stride = operand.transposed ? 1 : operand.leading_dimension;
    const int64_t column_stride = operand.transposed ? operand.leading_dimension : 1;
    visitor(MatrixView<Load>{static_cast<const Stored*>(operand.buffer) + operand.offset,
                             row_stride, column_stride});
  };
  if (operand.dtype == DType::kBFloat16) {
    visit(LoadBFloat16{});
  } else if (precision == Precision::kBF16_BF16_F32) {
    visit(LoadFloat32AsBFloat16{});
  } else {
    visit(LoadFloat32{});
  }
}

// Finishes one float32 sum: adds the bias or the old out(row, column), and stores the result there.
inline void store_result(const Matmul& matmul, int64_t row, int64_t column, float value) {
  const int64_t index = row * matmul.out_leading_dimension + column;
  if (matmul.bias != nullptr) value += matmul.bias[column];
  if (matmul.out_dtype == DType::kBFloat16) {
    static_cast<uint16_t*>(matmul.out)[index] = float_to_bfloat16(value);
    return;
  }
  float& element = static_cast<float*>(matmul.out)[index];
  element = matmul.accumulate ? element + value : value;
}

}  // namespace gpt2_jax

// A random product that owns its memory, its float64 reference, and the comparison of the two.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "bfloat16.h"
#include "check.h"
#include "matmul.h"

namespace gpt2_jax {

// The same numbers with every C++ library, unlike the distributions of <random>.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 1) {}
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % limit); }
  float uniform() { return static_cast<float>(next() & 0xffffff) / (1 << 23) - 1.0f; }  // [-1, 1)

  // Mostly plain numbers; also zeros, denormals, infinities, NaNs and numbers of any exponent.
  float any_float() {
    uint32_t bits = static_cast<uint32_t>(below(int64_t{1} << 31)) << 1 | below(2);
    switch (below(8)) {
      case 0:
        bits &= 0x807fffff;  // denormal
        break;
      case 1:
        bits |= 0x7f800000;  // NaN
        break;
      case 2:
        bits = (bits & 0x80000000) | 0x7f800000;  // infinity
        break;
      case 3:
        bits &= 0x80000000;  // zero
        break;
      case 4:
        break;  // of any exponent
      default:
        return uniform();
    }
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

 private:
  uint64_t next() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return (state_ * 0x2545F4914F6CDD1Dull) >> 33;
  }
  uint64_t state_;
};

// An array of either dtype.
class Elements {
 public:
  Elements(int64_t count, DType dtype) : dtype_(dtype), bytes_(count * width()) {}
  float get(int64_t i) const {
    if (dtype_ == DType::kFloat32) {
      float value;
      std::memcpy(&value, &bytes_[i * 4], 4);
      return value;
    }
    uint16_t value;
    std::memcpy(&value, &bytes_[i * 2], 2);
    return bfloat16_to_float(value);
  }
  void set(int64_t i, float value) {
    const uint16_t narrow = float_to_bfloat16(value);
    if (dtype_ == DType::kFloat32) {
      std::memcpy(&bytes_[i * 4], &value, 4);
    } else {
      std::memcpy(&bytes_[i * 2], &narrow, 2);
    }
  }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / width(); }
  void* data() { return bytes_.data(); }
  bool operator==(const Elements& other) const { return bytes_ == other.bytes_; }

 private:
  int64_t width() const { return dtype_ == DType::kFloat32 ? 4 : 2; }
  DType dtype_;
  std::vector<unsigned char> bytes_;
};

struct Shape {
  int64_t m, n, k;
};

struct Types {
  DType a = DType::kFloat32, b = DType::kFloat32, out = DType::kFloat32;
  Precision precision = Precision::kF32_F32_F32;
};

// Whether the product is stored, gets a bias, or is added to the output.
enum class Epilogue { kStore, kBias, kAccumulate };

// Operands lie at random offsets, with random gaps between rows. The elements around them are NaN,
// which would spread if read by mistake. The elements around the output are kCanary, which must
// still be there afterwards.
class Problem {
 public:
  static constexpr float kCanary = -512;  // a bfloat16, too

  Problem(const Shape& shape, bool transpose_a, bool transpose_b, const Types& types,
          Random& random, Epilogue epilogue = Epilogue::kStore)
      : shape_(shape),
        a_(make_operand(transpose_a ? shape.k : shape.m, transpose_a ? shape.m : shape.k, types.a,
                        transpose_a, random, &matmul_.a)),
        b_(make_operand(transpose_b ? shape.n : shape.k, transpose_b ? shape.k : shape.n, types.b,
                        transpose_b, random, &matmul_.b)),
        out_offset_(random.below(8)),
        out_(out_offset_ + shape.m * (shape.n + 3) + 8, types.out),
        bias_(epilogue == Epilogue::kBias ? shape.n + 1 : 0) {
    matmul_.m = shape.m;
    matmul_.n = shape.n;
    matmul_.k = shape.k;
    matmul_.a.buffer = a_.data();
    matmul_.b.buffer = b_.data();
    matmul_.out_leading_dimension = shape.n + random.below(4);
    matmul_.out_dtype = types.out;
    matmul_.out =
        static_cast<char*>(out_.data()) + out_offset_ * (types.out == DType::kFloat32 ? 4 : 2);
    matmul_.precision = types.precision;
    matmul_.accumulate = epilogue == Epilogue::kAccumulate;
    for (float& value : bias_) value = random.uniform();
    if (!bias_.empty()) matmul_.bias = bias_.data() + 1;
    if (types.out == DType::kFloat32) matmul_.sum_of_squares = &sum_of_squares_;
    if (matmul_.accumulate) {
      for (int64_t i = 0; i < shape.m * shape.n; ++i) target_.push_back(random.uniform());
    }
    clear();
  }
  Problem(const Problem&) = delete;

  const Matmul& matmul() const { return matmul_; }
  const Elements& out() const { return out_; }
  float result(int64_t i, int64_t j) const { return out_.get(out_index(i, j)); }
  double sum_of_squares() const { return sum_of_squares_; }
  void set_a(int64_t i, int64_t p, float value) { a_.set(index(matmul_.a, i, p), value); }
  void set_b(int64_t p, int64_t j, float value) { b_.set(index(matmul_.b, p, j), value); }

  // Fills the output's memory with canaries, and with the old values if the product is added to
  // them.
  void clear() {
    for (int64_t i = 0; i < out_.size(); ++i) out_.set(i, kCanary);
    sum_of_squares_ = kCanary;
    if (target_.empty()) return;
    for (int64_t i = 0; i < shape_.m; ++i) {
      for (int64_t j = 0; j < shape_.n; ++j) out_.set(out_index(i, j), target_[i * shape_.n + j]);
    }
  }

  // Checks sum_of_squares against out. The bound: squares rounded to 24 bits, at most 1024 of them
  // added up in float32.
  void check_squares(const std::string& who) const {
    if (matmul_.sum_of_squares == nullptr) return;
    double expected = 0;
    for (int64_t i = 0; i < shape_.m; ++i) {
      for (int64_t j = 0; j < shape_.n; ++j) {
        expected += static_cast<double>(result(i, j)) * result(i, j);
      }
    }
    CHECK(std::fabs(sum_of_squares_ - expected) <= std::ldexp(1025 * expected, -24),
          who << " " << to_string(matmul_) << ": squares " << sum_of_squares_ << ", expected "
              << expected);
  }

  // Checks every element: |out - reference| <= (c + k 2^-24) (|op(a)| |op(b)| + |added|), plus the
  // products that digits leave out. Also checks that nothing else was written.
  void check(const std::string& who) const {
    // At most one more addition than products, and one more for each product of parts.
    const double additions = 2.0 + part_products(matmul_.precision) + static_cast<double>(shape_.k);
    const double epsilon = std::ldexp(additions, -24) + split_error(matmul_.precision);
    const bool rounded = matmul_.precision == Precision::kBF16_BF16_F32;
    const auto a = converted(a_, matmul_.a, shape_.m, shape_.k, rounded);
    const auto b = converted(b_, matmul_.b, shape_.k, shape_.n, rounded);
    std::vector<double> sum(shape_.n), bound(shape_.n);
    for (int64_t i = 0; i < shape_.m; ++i) {
      for (int64_t j = 0; j < shape_.n; ++j) {
        sum[j] = matmul_.bias         ? matmul_.bias[j]
                 : matmul_.accumulate ? target_[i * shape_.n + j]
                                      : 0;
        bound[j] = std::fabs(sum[j]);
      }
      for (int64_t p = 0; p < shape_.k; ++p) {
        for (int64_t j = 0; j < shape_.n; ++j) {
          const double product = a[i * shape_.k + p] * b[p * shape_.n + j];
          sum[j] += product;
          bound[j] += std::fabs(product);
        }
      }
      for (int64_t j = 0; j < shape_.n; ++j) {
        double allowed = epsilon * bound[j] + digits_error();
        // A bfloat16 result is rounded once more, to 8 bits.
        if (matmul_.out_dtype == DType::kBFloat16) {
          allowed += std::ldexp(std::fabs(sum[j]) + allowed, -8);
        }
        const double error = std::fabs(result(i, j) - sum[j]);
        CHECK(error <= allowed, who << " " << to_string(matmul_) << " at (" << i << "," << j
                                    << "): " << result(i, j) << ", expected " << sum[j] << " +- "
                                    << allowed);
      }
    }
    for (int64_t at = 0; at < out_.size(); ++at) {
      const int64_t from_start = at - out_offset_;
      const int64_t stride = matmul_.out_leading_dimension;
      const bool inside = from_start >= 0 && shape_.n > 0 && from_start / stride < shape_.m &&
                          from_start % stride < shape_.n;
      CHECK(inside || out_.get(at) == kCanary,
            who << " " << to_string(matmul_) << " wrote outside its output, at " << at);
    }
  }

 private:
  static int part_products(Precision precision) {
    if (precision == Precision::kBF16_BF16_F32_X3) return 3;
    return precision == Precision::kBF16_BF16_F32_X6 ? 6 : 1;
  }

  // The relative error of splitting float32 into parts.
  //
  // Two parts: rounding a part has an error of at most 2^-8 of the rounded value, so two parts
  // leave out 2^-16 of either operand, and the product of the low parts is left out too. The
  // factors 1 + 2^-8 of the parts add a little.
  //
  // Three parts: the remainder after cutting is less than 2^-7 of the value. Left out are two
  // products of 2^-7 by 2^-15 at most, and one of 2^-15 by 2^-15.
  static double split_error(Precision precision) {
    if (precision == Precision::kBF16_BF16_F32_X3) return std::ldexp(3.1, -16);
    return precision == Precision::kBF16_BF16_F32_X6 ? std::ldexp(8.1, -24) : 0;
  }

  // The error of digits, for operands of at most 1, so units of at most 2^-22. Either operand is
  // off by half a unit. Left out are the products of the fourth and fifth order: in units, two of
  // 2^14 times 2^8 and one of 2^14.
  double digits_error() const {
    if (matmul_.precision != Precision::kS8_S8_S32_X6) return 0;
    return static_cast<double>(shape_.k) * (std::ldexp(1.0, -22) + std::ldexp(2.1, 22 - 44));
  }

  static Elements make_operand(int64_t rows, int64_t columns, DType dtype, bool transposed,
                               Random& random, Operand* operand) {
    operand->offset = random.below(20);
    operand->leading_dimension = columns + random.below(4);
    operand->dtype = dtype;
    operand->transposed = transposed;
    Elements elements(operand->offset + rows * operand->leading_dimension + 5, dtype);
    for (int64_t i = 0; i < elements.size(); ++i) elements.set(i, std::nanf(""));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        elements.set(operand->offset + i * operand->leading_dimension + j, random.uniform());
      }
    }
    return elements;
  }

  int64_t out_index(int64_t i, int64_t j) const {
    return out_offset_ + i * matmul_.out_leading_dimension + j;
  }

  static int64_t index(const Operand& operand, int64_t row, int64_t column) {
    return operand.offset + (operand.transposed ? column * operand.leading_dimension + row
                                                : row * operand.leading_dimension + column);
  }

  static std::vector<double> converted(const Elements& elements, const Operand& operand,
                                       int64_t rows, int64_t columns, bool rounded) {
    std::vector<double> values(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        float value = elements.get(index(operand, i, j));
        if (rounded) value = bfloat16_to_float(float_to_bfloat16(value));
        values[i * columns + j] = value;
      }
    }
    return values;
  }

  Shape shape_;
  Matmul matmul_;
  Elements a_, b_;
  int64_t out_offset_;
  Elements out_;
  std::vector<float> bias_;    // begins with a spare element, so that the bias is not aligned
  std::vector<float> target_;  // out's old elements, when the product is added to them
  double sum_of_squares_ = kCanary;
};

}  // namespace gpt2_jax

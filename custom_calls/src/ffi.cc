// The XLA FFI handlers of products: they check attributes and buffers and pass a Matmul to a rung.
//
// Compiled against headers of API 0.1 they load in every jaxlib since 0.4.34, as long as they never
// call ThreadPool::num_threads() (in 0.4.34 that slot of the API table is another function) nor
// return a Future. That is why the number of threads is an attribute.
#include "xla/ffi/api/ffi.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checker.h"
#include "custom_calls.h"
#include "matmul.h"
#include "registry.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;

// Checks the attributes and buffers of one product.
class ProductChecker : public Checker {
 public:
  ProductChecker(const char* handler, const ffi::Dictionary& attributes,
                 std::vector<NamedBuffer> buffers)
      : Checker(handler, std::move(buffers)), attributes_(attributes) {}

  int64_t integer(const char* name) { return attribute<int64_t>(name, "int64"); }
  std::string_view text(const char* name) { return attribute<std::string_view>(name, "string"); }

  bool flag(const char* name) {
    const int64_t value = integer(name);
    if (value != 0 && value != 1) {
      fail(std::string("expected ") + name + " 0 or 1, got " + std::to_string(value));
    }
    return value == 1;
  }

  // Fails if the call has attributes that were not read. To be called after reading them all.
  void no_other_attributes() {
    if (attributes_.size() != static_cast<size_t>(asked_)) {
      fail("expected " + std::to_string(asked_) + " attributes, got " +
           std::to_string(attributes_.size()));
    }
  }

  // Checks that the stored matrix, rows x columns from `offset` on, lies inside the buffer.
  void matrix(const NamedBuffer& buffer, int64_t offset, int64_t rows, int64_t columns) {
    if (!ok()) return;
    const std::string expected = std::string("expected ") + buffer.name + " to hold a matrix [" +
                                 std::to_string(rows) + "," + std::to_string(columns) +
                                 "] from element " + std::to_string(offset);
    // Written so that no product or sum can overflow.
    const bool empty = rows == 0 || columns == 0;
    const bool fits =
        offset >= 0 && offset <= buffer.size && (empty || rows <= (buffer.size - offset) / columns);
    if (!fits) return fail(expected);
    if (!empty && buffer.dimensions.size() >= 2 && buffer.dimensions.back() != columns) {
      fail(expected + ", so a last dimension of " + std::to_string(columns));
    }
  }

  // Checks that the buffer is flat float32 and has `count` elements from `offset` on.
  void flat(const NamedBuffer& buffer, int64_t offset, int64_t count) {
    if (!ok()) return;
    expect(buffer.dtype == ffi::F32 && buffer.dimensions.size() == 1 && offset >= 0 &&
               count <= buffer.size && offset <= buffer.size - count,
           std::string(buffer.name) + " of dtype f32 and rank 1 to hold " + std::to_string(count) +
               " elements from element " + std::to_string(offset));
  }

 private:
  template <typename T>
  T attribute(const char* name, const char* type) {
    ++asked_;
    const ffi::ErrorOr<T> value = attributes_.get<T>(name);
    if (value.has_value()) return *value;
    fail(std::string("expected an attribute ") + name + " of type " + type);
    return T{};
  }

  const ffi::Dictionary attributes_;
  int asked_ = 0;
};

// A decoded call: the product, the rung that computes it, and the number of threads.
struct Request {
  Matmul matmul;
  const Implementation* implementation;
  int64_t num_threads;
};

Request decode(ProductChecker& check, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
               ffi::AnyBuffer& out) {
  Request request;
  Matmul& matmul = request.matmul;
  const int64_t m = matmul.m = check.integer("m");
  const int64_t n = matmul.n = check.integer("n");
  const int64_t k = matmul.k = check.integer("k");
  if (m < 0 || n < 0 || k < 0) {
    check.fail("expected m, n, k >= 0, got m=" + std::to_string(m) + " n=" + std::to_string(n) +
               " k=" + std::to_string(k));
  }
  matmul.precision = check.precision(check.text("precision"));
  request.num_threads = check.num_threads(check.integer("num_threads"));
  request.implementation = check.implementation(check.text("implementation"));

  const int64_t a_offset = check.integer("a_offset"), b_offset = check.integer("b_offset");
  const bool a_transposed = check.flag("transpose_a"), b_transposed = check.flag("transpose_b");
  const int64_t a_columns = a_transposed ? m : k;
  const int64_t b_columns = b_transposed ? k : n;
  matmul.a = {a.untyped_data(), a_offset, a_columns, check.dtype({"a", a}), a_transposed};
  matmul.b = {b.untyped_data(), b_offset, b_columns, check.dtype({"b", b}), b_transposed};
  check.matrix({"a", a}, a_offset, a_transposed ? k : m, a_columns);
  check.matrix({"b", b}, b_offset, b_transposed ? n : k, b_columns);
  matmul.out = out.untyped_data();
  matmul.out_leading_dimension = n;
  matmul.out_dtype = check.dtype({"out", out});
  return request;
}

// Checks that out holds exactly the product.
void check_whole_output(ProductChecker& check, const Matmul& matmul, const ffi::AnyBuffer& out) {
  check.matrix({"out", out}, 0, matmul.m, matmul.n);
  // Once the matrix fits, m * n cannot overflow.
  if (check.ok() && static_cast<int64_t>(out.element_count()) != matmul.m * matmul.n) {
    check.fail("expected out to hold exactly [" + std::to_string(matmul.m) + "," +
               std::to_string(matmul.n) + "]");
  }
}

ffi::Error run(const ProductChecker& check, const Request& request, const ffi::ThreadPool& pool) {
  ffi::Error refusal = check.refusal(request.implementation, request.matmul);
  if (refusal.failure()) return refusal;
  return check.run([&] {
    XlaExecutor executor(pool, request.num_threads);
    multiply(*request.implementation, request.matmul, executor);
  });
}

ffi::Error matmul_handler(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::AnyBuffer a,
                          ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> out) {
  ProductChecker check("gpt2_jax_matmul", attributes, {{"a", a}, {"b", b}, {"out", *out}});
  const Request request = decode(check, a, b, *out);
  check_whole_output(check, request.matmul, *out);
  check.no_other_attributes();
  return run(check, request, pool);
}

ffi::Error matmul_bias_handler(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::AnyBuffer a,
                               ffi::AnyBuffer b, ffi::AnyBuffer bias,
                               ffi::Result<ffi::AnyBuffer> out) {
  ProductChecker check("gpt2_jax_matmul_bias", attributes,
                       {{"a", a}, {"b", b}, {"bias", bias}, {"out", *out}});
  Request request = decode(check, a, b, *out);
  check_whole_output(check, request.matmul, *out);
  const int64_t offset = check.integer("bias_offset");
  check.flat({"bias", bias}, offset, request.matmul.n);
  check.no_other_attributes();
  if (check.ok()) request.matmul.bias = static_cast<const float*>(bias.untyped_data()) + offset;
  return run(check, request, pool);
}

// True when an operand of `rows` stored rows overlaps the `count` floats at `part`.
bool lies_in(const Operand& operand, int64_t rows, const float* part, int64_t count) {
  const int64_t width = operand.dtype == DType::kFloat32 ? 4 : 2;
  const auto first = reinterpret_cast<uintptr_t>(operand.buffer) + operand.offset * width;
  const auto last = first + rows * operand.leading_dimension * width;
  const auto begin = reinterpret_cast<uintptr_t>(part);
  return count > 0 && first < begin + count * sizeof(float) && begin < last;
}

ffi::Error matmul_into_handler(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::AnyBuffer a,
                               ffi::AnyBuffer b, ffi::AnyBuffer target,
                               ffi::Result<ffi::AnyBuffer> out,
                               ffi::Result<ffi::Buffer<ffi::F32>> squares) {
  ProductChecker check(
      "gpt2_jax_matmul_into", attributes,
      {{"a", a}, {"b", b}, {"target", target}, {"out", *out}, {"squares", *squares}});
  Request request = decode(check, a, b, *out);
  Matmul& matmul = request.matmul;
  const int64_t offset = check.integer("out_offset");
  matmul.accumulate = check.flag("accumulate");
  check.flat({"target", target}, 0, static_cast<int64_t>(out->element_count()));
  check.flat({"out", *out}, 0, static_cast<int64_t>(target.element_count()));
  check.matrix({"out", *out}, offset, matmul.m, matmul.n);
  check.size({"squares", *squares}, 1);
  check.no_other_attributes();
  if (check.ok()) {
    float* const part = static_cast<float*>(out->untyped_data()) + offset;
    if (lies_in(matmul.a, matmul.a.transposed ? matmul.k : matmul.m, part, matmul.m * matmul.n) ||
        lies_in(matmul.b, matmul.b.transposed ? matmul.n : matmul.k, part, matmul.m * matmul.n)) {
      check.fail("expected a and b outside the part of out that is written");
    }
    matmul.out = part;
  }
  if (check.ok()) copy_unless_aliased(target, *out);
  double sum_of_squares = 0;
  matmul.sum_of_squares = &sum_of_squares;
  ffi::Error error = run(check, request, pool);
  if (error.success()) squares->typed_data()[0] = static_cast<float>(sum_of_squares);
  return error;
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_matmul, gpt2_jax::guarded<gpt2_jax::matmul_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attrs()
                                  .Arg<xla::ffi::AnyBuffer>()  // a
                                  .Arg<xla::ffi::AnyBuffer>()  // b
                                  .Ret<xla::ffi::AnyBuffer>()  // out
);

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_matmul_bias, gpt2_jax::guarded<gpt2_jax::matmul_bias_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attrs()
                                  .Arg<xla::ffi::AnyBuffer>()  // a
                                  .Arg<xla::ffi::AnyBuffer>()  // b
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Ret<xla::ffi::AnyBuffer>()  // out
);

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_matmul_into, gpt2_jax::guarded<gpt2_jax::matmul_into_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attrs()
                                  .Arg<xla::ffi::AnyBuffer>()              // a
                                  .Arg<xla::ffi::AnyBuffer>()              // b
                                  .Arg<xla::ffi::AnyBuffer>()              // target
                                  .Ret<xla::ffi::AnyBuffer>()              // out
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // squares
);

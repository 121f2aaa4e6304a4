// The XLA FFI handlers: attributes and buffers in, a checked Matmul to the registry.
//
// Compiled against API 0.1 headers they load in every jaxlib since 0.4.34, as long as they never
// call ThreadPool::num_threads() (in 0.4.34 that slot of the API table is another function) nor
// return a Future. Hence the thread count as an attribute.
#include "xla/ffi/api/ffi.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "custom_calls.h"
#include "matmul.h"
#include "registry.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;

// What a message needs to know of a buffer: "f32[256,768]".
std::string shape_of(const ffi::AnyBuffer& buffer) {
  std::ostringstream text;
  switch (buffer.element_type()) {
    case ffi::F32:
      text << "f32";
      break;
    case ffi::BF16:
      text << "bf16";
      break;
    default:
      text << buffer.element_type();
  }
  text << "[";
  const auto dimensions = buffer.dimensions();
  for (size_t i = 0; i < dimensions.size(); ++i) text << (i ? "," : "") << dimensions[i];
  text << "]";
  return text.str();
}

struct NamedBuffer {
  const char* name;
  const ffi::AnyBuffer& buffer;
};

// One call's attributes and buffers, and the first thing that is wrong with them; the message ends
// with every buffer's shape as it was found.
class Checker {
 public:
  Checker(const char* handler, const ffi::Dictionary& attributes, std::vector<NamedBuffer> buffers)
      : handler_(handler), attributes_(attributes), buffers_(std::move(buffers)) {}

  void fail(const std::string& message) {
    if (!ok()) return;
    error_ = handler_ + (": " + message + "; found ");
    const char* separator = "";
    for (const NamedBuffer& entry : buffers_) {
      error_ += separator + std::string(entry.name) + " " + shape_of(entry.buffer);
      separator = ", ";
    }
  }
  bool ok() const { return error_.empty(); }
  const char* handler() const { return handler_; }
  const std::string& error() const { return error_; }

  int64_t integer(const char* name) { return attribute<int64_t>(name, "int64"); }
  std::string_view text(const char* name) { return attribute<std::string_view>(name, "string"); }

  bool flag(const char* name) {
    const int64_t value = integer(name);
    if (value != 0 && value != 1) {
      fail(std::string("expected ") + name + " 0 or 1, got " + std::to_string(value));
    }
    return value == 1;
  }

  // To be called when every attribute was asked for: another is misspelt or of another handler.
  void no_other_attributes() {
    if (attributes_.size() != static_cast<size_t>(asked_)) {
      fail("expected " + std::to_string(asked_) + " attributes, got " +
           std::to_string(attributes_.size()));
    }
  }

  DType dtype(const NamedBuffer& entry) {
    if (entry.buffer.element_type() == ffi::BF16) return DType::kBFloat16;
    if (entry.buffer.element_type() != ffi::F32) {
      fail(std::string("expected ") + entry.name + " of dtype f32 or bf16");
    }
    return DType::kFloat32;
  }

  // The stored matrix, rows x columns from `offset` on, must lie inside the buffer.
  void matrix(const NamedBuffer& entry, int64_t offset, int64_t rows, int64_t columns) {
    if (!ok()) return;
    const auto dimensions = entry.buffer.dimensions();
    const int64_t count = static_cast<int64_t>(entry.buffer.element_count());
    const std::string expected = std::string("expected ") + entry.name + " to hold a matrix [" +
                                 std::to_string(rows) + "," + std::to_string(columns) +
                                 "] from element " + std::to_string(offset);
    // Written so that no product or sum can overflow.
    const bool empty = rows == 0 || columns == 0;
    const bool fits =
        offset >= 0 && offset <= count && (empty || rows <= (count - offset) / columns);
    if (!fits) return fail(expected);
    if (!empty && dimensions.size() >= 2 && dimensions.back() != columns) {
      fail(expected + ", so a last dimension of " + std::to_string(columns));
    }
  }

  // A flat float32 buffer that holds `count` elements from `offset` on.
  void flat(const NamedBuffer& entry, int64_t offset, int64_t count) {
    if (!ok()) return;
    const int64_t size = static_cast<int64_t>(entry.buffer.element_count());
    if (entry.buffer.element_type() != ffi::F32 || entry.buffer.dimensions().size() != 1 ||
        offset < 0 || count > size || offset > size - count) {
      fail(std::string("expected ") + entry.name + " of dtype f32 and rank 1 to hold " +
           std::to_string(count) + " elements from element " + std::to_string(offset));
    }
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

  const char* const handler_;
  const ffi::Dictionary attributes_;
  const std::vector<NamedBuffer> buffers_;
  std::string error_;
  int asked_ = 0;
};

// What the handlers share: the product, and who computes it.
struct Request {
  const char* handler;
  Matmul matmul;
  const Implementation* implementation;
  int num_threads;
};

Request decode(Checker& check, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
               ffi::AnyBuffer& out) {
  Request request;
  request.handler = check.handler();
  Matmul& matmul = request.matmul;
  const int64_t m = matmul.m = check.integer("m");
  const int64_t n = matmul.n = check.integer("n");
  const int64_t k = matmul.k = check.integer("k");
  if (m < 0 || n < 0 || k < 0) {
    check.fail("expected m, n, k >= 0, got m=" + std::to_string(m) + " n=" + std::to_string(n) +
               " k=" + std::to_string(k));
  }
  const std::string_view precision = check.text("precision");
  if (!parse_precision(precision, &matmul.precision)) {
    check.fail(
        "expected a precision named as in jax.lax.DotAlgorithmPreset (F32_F32_F32, "
        "BF16_BF16_F32, BF16_BF16_F32_X3, BF16_BF16_F32_X6), got \"" +
        std::string(precision) + "\"");
  }
  const int64_t num_threads = check.integer("num_threads");
  if (num_threads < 1) {
    check.fail("expected num_threads >= 1, got " + std::to_string(num_threads));
  }
  request.num_threads = static_cast<int>(std::min<int64_t>(num_threads, 1024));
  const std::string_view implementation = check.text("implementation");
  request.implementation = find_implementation(implementation);
  if (request.implementation == nullptr) {
    check.fail("expected an implementation among " + implementation_names() + ", got \"" +
               std::string(implementation) + "\"");
  }

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

// out is the product and nothing else.
void check_whole_output(Checker& check, const Matmul& matmul, const ffi::AnyBuffer& out) {
  check.matrix({"out", out}, 0, matmul.m, matmul.n);
  // Once the matrix fits, m * n cannot overflow.
  if (check.ok() && static_cast<int64_t>(out.element_count()) != matmul.m * matmul.n) {
    check.fail("expected out to hold exactly [" + std::to_string(matmul.m) + "," +
               std::to_string(matmul.n) + "]");
  }
}

// Everything that can be wrong with the call: its arguments, or that nobody here computes it.
ffi::Error check_request(const Checker& check, const Request& request) {
  if (!check.ok()) return ffi::Error::InvalidArgument(check.error());
  std::string refusal = request.implementation->unavailable();
  if (refusal.empty()) refusal = request.implementation->refuse(request.matmul);
  if (refusal.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kUnimplemented, std::string(request.handler) + ": " +
                                                        request.implementation->name + " refuses " +
                                                        to_string(request.matmul) + ": " + refusal);
}

ffi::Error run(const Request& request, const ffi::ThreadPool& pool) {
  try {
    XlaExecutor executor(pool, request.num_threads);
    request.implementation->run(request.matmul, executor);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      std::string(request.handler) + ": out of memory for the workspace of " +
                          to_string(request.matmul));
  }
  return ffi::Error::Success();
}

ffi::Error matmul_handler(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::AnyBuffer a,
                          ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> out) {
  Checker check("gpt2_jax_matmul", attributes, {{"a", a}, {"b", b}, {"out", *out}});
  const Request request = decode(check, a, b, *out);
  check_whole_output(check, request.matmul, *out);
  check.no_other_attributes();
  if (ffi::Error error = check_request(check, request); error.failure()) return error;
  return run(request, pool);
}

ffi::Error matmul_bias_handler(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::AnyBuffer a,
                               ffi::AnyBuffer b, ffi::AnyBuffer bias,
                               ffi::Result<ffi::AnyBuffer> out) {
  Checker check("gpt2_jax_matmul_bias", attributes,
                {{"a", a}, {"b", b}, {"bias", bias}, {"out", *out}});
  Request request = decode(check, a, b, *out);
  check_whole_output(check, request.matmul, *out);
  const int64_t offset = check.integer("bias_offset");
  check.flat({"bias", bias}, offset, request.matmul.n);
  check.no_other_attributes();
  if (check.ok()) request.matmul.bias = static_cast<const float*>(bias.untyped_data()) + offset;
  if (ffi::Error error = check_request(check, request); error.failure()) return error;
  return run(request, pool);
}

// Whether any of an operand's `rows` stored rows lies in the `count` floats at `part`.
bool lies_in(const Operand& operand, int64_t rows, const float* part, int64_t count) {
  const int64_t width = operand.dtype == DType::kFloat32 ? 4 : 2;
  const auto first = reinterpret_cast<uintptr_t>(operand.buffer) + operand.offset * width;
  const auto last = first + rows * operand.leading_dimension * width;
  const auto begin = reinterpret_cast<uintptr_t>(part);
  return count > 0 && first < begin + count * sizeof(float) && begin < last;
}

ffi::Error matmul_into_handler(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::AnyBuffer a,
                               ffi::AnyBuffer b, ffi::AnyBuffer target,
                               ffi::Result<ffi::AnyBuffer> out) {
  Checker check("gpt2_jax_matmul_into", attributes,
                {{"a", a}, {"b", b}, {"target", target}, {"out", *out}});
  Request request = decode(check, a, b, *out);
  Matmul& matmul = request.matmul;
  const int64_t offset = check.integer("out_offset");
  matmul.accumulate = check.flag("accumulate");
  const int64_t count = static_cast<int64_t>(out->element_count());
  check.flat({"target", target}, 0, count);
  check.flat({"out", *out}, 0, static_cast<int64_t>(target.element_count()));
  check.matrix({"out", *out}, offset, matmul.m, matmul.n);
  check.no_other_attributes();
  float* const data = static_cast<float*>(out->untyped_data());
  if (check.ok()) {
    float* const part = data + offset;
    if (lies_in(matmul.a, matmul.a.transposed ? matmul.k : matmul.m, part, matmul.m * matmul.n) ||
        lies_in(matmul.b, matmul.b.transposed ? matmul.n : matmul.k, part, matmul.m * matmul.n)) {
      check.fail("expected a and b outside the part of out that is written");
    }
    matmul.out = part;
  }
  if (ffi::Error error = check_request(check, request); error.failure()) return error;
  if (data != target.untyped_data() && count > 0) {
    std::memcpy(data, target.untyped_data(), count * sizeof(float));
  }
  return run(request, pool);
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_matmul, gpt2_jax::matmul_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attrs()
                                  .Arg<xla::ffi::AnyBuffer>()  // a
                                  .Arg<xla::ffi::AnyBuffer>()  // b
                                  .Ret<xla::ffi::AnyBuffer>()  // out
);

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_matmul_bias, gpt2_jax::matmul_bias_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attrs()
                                  .Arg<xla::ffi::AnyBuffer>()  // a
                                  .Arg<xla::ffi::AnyBuffer>()  // b
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Ret<xla::ffi::AnyBuffer>()  // out
);

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_matmul_into, gpt2_jax::matmul_into_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attrs()
                                  .Arg<xla::ffi::AnyBuffer>()  // a
                                  .Arg<xla::ffi::AnyBuffer>()  // b
                                  .Arg<xla::ffi::AnyBuffer>()  // target
                                  .Ret<xla::ffi::AnyBuffer>()  // out
);

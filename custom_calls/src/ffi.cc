// The XLA FFI handler: attributes and buffers in, a checked Matmul to the registry.
//
// Compiled against API 0.1 headers it loads in every jaxlib since 0.4.34, as long as it never calls
// ThreadPool::num_threads() (in 0.4.34 that slot of the API table is another function) nor returns
// a Future. Hence the thread count as an attribute.
#include "xla/ffi/api/ffi.h"

#include <new>
#include <sstream>
#include <string>
#include <string_view>

#include "custom_calls.h"
#include "executor.h"
#include "matmul.h"
#include "registry.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;

class XlaExecutor final : public Executor {
 public:
  XlaExecutor(const ffi::ThreadPool& pool, int num_threads)
      : pool_(pool), num_threads_(num_threads) {}
  int num_threads() const override { return num_threads_; }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool pool_;
  int num_threads_;
};

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

// Collects the first thing that is wrong; every message ends with both shapes as they were found.
class Checker {
 public:
  Checker(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b, const ffi::AnyBuffer& out)
      : found_("a " + shape_of(a) + ", b " + shape_of(b) + ", out " + shape_of(out)) {}

  void fail(const std::string& message) {
    if (error_.empty()) error_ = "gpt2_jax_matmul: " + message + "; found " + found_;
  }
  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }

  DType dtype(const char* which, const ffi::AnyBuffer& buffer) {
    if (buffer.element_type() == ffi::BF16) return DType::kBFloat16;
    if (buffer.element_type() != ffi::F32) {
      fail(std::string("expected ") + which + " of dtype f32 or bf16");
    }
    return DType::kFloat32;
  }

  bool flag(const char* which, int64_t value) {
    if (value != 0 && value != 1) {
      fail(std::string("expected ") + which + " 0 or 1, got " + std::to_string(value));
    }
    return value == 1;
  }

  // The stored matrix, rows x columns from `offset` on, must lie inside the buffer.
  void matrix(const char* which, const ffi::AnyBuffer& buffer, int64_t offset, int64_t rows,
              int64_t columns) {
    const auto dimensions = buffer.dimensions();
    const int64_t count = static_cast<int64_t>(buffer.element_count());
    const std::string expected = std::string("expected ") + which + " to hold a matrix [" +
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

 private:
  const std::string found_;
  std::string error_;
};

ffi::Error matmul_handler(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
                          ffi::Result<ffi::AnyBuffer> out, int64_t m, int64_t n, int64_t k,
                          int64_t transpose_a, int64_t transpose_b, int64_t a_offset,
                          int64_t b_offset, std::string_view implementation_name,
                          std::string_view precision, int64_t num_threads) {
  Checker check(a, b, *out);
  Matmul matmul;
  matmul.m = m;
  matmul.n = n;
  matmul.k = k;
  if (m < 0 || n < 0 || k < 0) {
    check.fail("expected m, n, k >= 0, got m=" + std::to_string(m) + " n=" + std::to_string(n) +
               " k=" + std::to_string(k));
  }
  if (!parse_precision(precision, &matmul.precision)) {
    check.fail(
        "expected a precision named as in jax.lax.DotAlgorithmPreset (F32_F32_F32, "
        "BF16_BF16_F32, BF16_BF16_F32_X3, BF16_BF16_F32_X6), got \"" +
        std::string(precision) + "\"");
  }
  if (num_threads < 1) {
    check.fail("expected num_threads >= 1, got " + std::to_string(num_threads));
  }
  const Implementation* implementation = find_implementation(implementation_name);
  if (implementation == nullptr) {
    check.fail("expected an implementation among " + implementation_names() + ", got \"" +
               std::string(implementation_name) + "\"");
  }

  const bool a_transposed = check.flag("transpose_a", transpose_a);
  const bool b_transposed = check.flag("transpose_b", transpose_b);
  const int64_t a_columns = a_transposed ? m : k;
  const int64_t b_columns = b_transposed ? k : n;
  matmul.a = {a.untyped_data(), a_offset, a_columns, check.dtype("a", a), a_transposed};
  matmul.b = {b.untyped_data(), b_offset, b_columns, check.dtype("b", b), b_transposed};
  matmul.out = out->untyped_data();
  matmul.out_leading_dimension = n;
  matmul.out_dtype = check.dtype("out", *out);
  if (check.ok()) {
    check.matrix("a", a, a_offset, a_transposed ? k : m, a_columns);
    check.matrix("b", b, b_offset, b_transposed ? n : k, b_columns);
    check.matrix("out", *out, 0, m, n);
    if (check.ok() && static_cast<int64_t>(out->element_count()) != m * n) {
      check.fail("expected out to hold exactly [" + std::to_string(m) + "," + std::to_string(n) +
                 "]");
    }
  }
  if (!check.ok()) return ffi::Error::InvalidArgument(check.error());

  std::string refusal = implementation->unavailable();
  if (refusal.empty()) refusal = implementation->refuse(matmul);
  if (!refusal.empty()) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "gpt2_jax_matmul: " + std::string(implementation_name) + " refuses " +
                          to_string(matmul) + ": " + refusal);
  }
  try {
    XlaExecutor executor(pool, static_cast<int>(std::min<int64_t>(num_threads, 1024)));
    implementation->run(matmul, executor);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "gpt2_jax_matmul: out of memory for the workspace of " + to_string(matmul));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_matmul, gpt2_jax::matmul_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // a
                                  .Arg<xla::ffi::AnyBuffer>()  // b
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("transpose_a")
                                  .Attr<int64_t>("transpose_b")
                                  .Attr<int64_t>("a_offset")
                                  .Attr<int64_t>("b_offset")
                                  .Attr<std::string_view>("implementation")
                                  .Attr<std::string_view>("precision")
                                  .Attr<int64_t>("num_threads"));

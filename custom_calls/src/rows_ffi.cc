// The XLA FFI handlers of rows/: buffers in, checked, to the loops.
#include <cstdint>
#include <string>

#include "custom_calls.h"
#include "rows/rows.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

// Collects the first thing that is wrong with a call.
class Checker {
 public:
  explicit Checker(const char* target) : target_(target) {}

  void expect(bool condition, const std::string& expected) {
    if (!condition && error_.empty()) error_ = std::string(target_) + ": expected " + expected;
  }

  // A matrix of f32 or bf16: all dimensions but the last are its rows.
  Rows rows(const char* name, const ffi::AnyBuffer& buffer) {
    const auto dimensions = buffer.dimensions();
    const bool narrow = buffer.element_type() == ffi::BF16;
    expect(narrow || buffer.element_type() == ffi::F32, std::string(name) + " of f32 or bf16");
    expect(dimensions.size() > 0, std::string(name) + " of rank 1 or more");
    if (dimensions.size() == 0) return {};
    const int64_t columns = dimensions.back();
    const int64_t count = static_cast<int64_t>(buffer.element_count());
    return {buffer.untyped_data(), columns == 0 ? 0 : count / columns, columns, narrow};
  }

  void alike(const char* names, const Rows& a, const Rows& b) {
    expect(a.rows == b.rows && a.columns == b.columns,
           std::string(names) + " of one shape, found " + shape(a) + " and " + shape(b));
  }

  void length(const char* name, size_t count, int64_t expected) {
    expect(static_cast<int64_t>(count) == expected,
           std::string(name) + " of " + std::to_string(expected) + " elements, found " +
               std::to_string(count));
  }

  bool ok() const { return error_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(error_);
  }

 private:
  static std::string shape(const Rows& x) {
    return "[" + std::to_string(x.rows) + "," + std::to_string(x.columns) + "]";
  }

  const char* target_;
  std::string error_;
};

ffi::Error layer_norm_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats gain, Floats bias,
                              ffi::Result<ffi::AnyBuffer> out, int64_t num_threads) {
  Checker check("gpt2_jax_layer_norm");
  const Rows x_rows = check.rows("x", x), out_rows = check.rows("out", *out);
  check.alike("x and out", x_rows, out_rows);
  check.expect(x_rows.narrow == out_rows.narrow, "x and out of one dtype");
  check.length("gain", gain.element_count(), x_rows.columns);
  check.length("bias", bias.element_count(), x_rows.columns);
  if (!check.ok()) return check.error();
  XlaExecutor executor(pool, num_threads);
  layer_norm(x_rows, gain.typed_data(), bias.typed_data(), out_rows, executor);
  return ffi::Error::Success();
}

ffi::Error layer_norm_backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats gain,
                                       ffi::AnyBuffer dout, ffi::AnyBuffer dresidual,
                                       ffi::Result<ffi::AnyBuffer> dx, ffi::Result<Floats> dgain,
                                       ffi::Result<Floats> dbias, int64_t num_threads) {
  Checker check("gpt2_jax_layer_norm_backward");
  const Rows x_rows = check.rows("x", x);
  const Rows others[] = {check.rows("dout", dout), check.rows("dresidual", dresidual),
                         check.rows("dx", *dx)};
  for (const Rows& other : others) {
    check.alike("x, dout, dresidual and dx", x_rows, other);
    check.expect(x_rows.narrow == other.narrow, "x, dout, dresidual and dx of one dtype");
  }
  check.length("gain", gain.element_count(), x_rows.columns);
  check.length("dgain", dgain->element_count(), x_rows.columns);
  check.length("dbias", dbias->element_count(), x_rows.columns);
  if (!check.ok()) return check.error();
  XlaExecutor executor(pool, num_threads);
  layer_norm_backward(x_rows, gain.typed_data(), others[0], others[1], others[2],
                      dgain->typed_data(), dbias->typed_data(), executor);
  return ffi::Error::Success();
}

ffi::Error gelu_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out,
                        int64_t num_threads) {
  Checker check("gpt2_jax_gelu");
  const Rows x_rows = check.rows("x", x), out_rows = check.rows("out", *out);
  check.alike("x and out", x_rows, out_rows);
  check.expect(x_rows.narrow == out_rows.narrow, "x and out of one dtype");
  if (!check.ok()) return check.error();
  XlaExecutor executor(pool, num_threads);
  gelu(x_rows, out_rows, executor);
  return ffi::Error::Success();
}

ffi::Error gelu_backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dout,
                                 ffi::Result<ffi::AnyBuffer> dx, int64_t num_threads) {
  Checker check("gpt2_jax_gelu_backward");
  const Rows x_rows = check.rows("x", x), dout_rows = check.rows("dout", dout);
  const Rows dx_rows = check.rows("dx", *dx);
  check.alike("x and dout", x_rows, dout_rows);
  check.alike("x and dx", x_rows, dx_rows);
  check.expect(x_rows.narrow == dout_rows.narrow && x_rows.narrow == dx_rows.narrow,
               "x, dout and dx of one dtype");
  if (!check.ok()) return check.error();
  XlaExecutor executor(pool, num_threads);
  gelu_backward(x_rows, dout_rows, dx_rows, executor);
  return ffi::Error::Success();
}

ffi::Error softmax_cross_entropy_handler(ffi::ThreadPool pool, Floats logits,
                                         ffi::Buffer<ffi::S32> targets, ffi::Result<Floats> losses,
                                         ffi::Result<ffi::AnyBuffer> dlogits, int64_t vocab_size,
                                         float scale, int64_t num_threads) {
  Checker check("gpt2_jax_softmax_cross_entropy");
  const auto dimensions = logits.dimensions();
  check.expect(dimensions.size() == 2, "logits of rank 2");
  if (!check.ok()) return check.error();
  const Rows rows = {logits.untyped_data(), dimensions[0], dimensions[1], false};
  const Rows dlogits_rows = check.rows("dlogits", *dlogits);
  check.alike("logits and dlogits", rows, dlogits_rows);
  check.length("targets", targets.element_count(), rows.rows);
  check.length("losses", losses->element_count(), rows.rows);
  check.expect(vocab_size > 0 && vocab_size <= rows.columns, "a vocabulary within the columns");
  if (!check.ok()) return check.error();
  for (int64_t i = 0; i < rows.rows; ++i) {
    const int32_t target = targets.typed_data()[i];
    check.expect(target >= 0 && target < vocab_size,
                 "targets in the vocabulary, found " + std::to_string(target));
  }
  if (!check.ok()) return check.error();
  XlaExecutor executor(pool, num_threads);
  softmax_cross_entropy(rows, targets.typed_data(), vocab_size, scale, losses->typed_data(),
                        dlogits_rows, executor);
  return ffi::Error::Success();
}

ffi::Error column_sums_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<Floats> sums,
                               int64_t num_threads) {
  Checker check("gpt2_jax_column_sums");
  const Rows rows = check.rows("x", x);
  check.length("sums", sums->element_count(), rows.columns);
  if (!check.ok()) return check.error();
  XlaExecutor executor(pool, num_threads);
  column_sums(rows, sums->typed_data(), executor);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_layer_norm, gpt2_jax::layer_norm_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // gain
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // bias
                                  .Ret<xla::ffi::AnyBuffer>()              // out
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_layer_norm_backward, gpt2_jax::layer_norm_backward_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // gain
                                  .Arg<xla::ffi::AnyBuffer>()              // dout
                                  .Arg<xla::ffi::AnyBuffer>()              // dresidual
                                  .Ret<xla::ffi::AnyBuffer>()              // dx
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // dgain
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // dbias
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_gelu, gpt2_jax::gelu_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_gelu_backward, gpt2_jax::gelu_backward_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // dout
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_softmax_cross_entropy,
                              gpt2_jax::softmax_cross_entropy_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // logits
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // targets
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // losses
                                  .Ret<xla::ffi::AnyBuffer>()              // dlogits
                                  .Attr<int64_t>("vocab_size")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_column_sums, gpt2_jax::column_sums_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // sums
                                  .Attr<int64_t>("num_threads"));

// The XLA FFI handlers of rows/: they check the buffers and call the loops.
#include <cstdint>
#include <string>

#include "checker.h"
#include "custom_calls.h"
#include "rows/rows.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

// A buffer as a matrix of f32 or bf16: its last dimension is the columns, the others are rows.
Rows matrix(Checker& check, const NamedBuffer& buffer) {
  const bool narrow = check.dtype(buffer) == DType::kBFloat16;
  if (buffer.dimensions.size() == 0) {
    check.fail(std::string("expected ") + buffer.name + " of rank 1 or more");
    return {};
  }
  const int64_t columns = buffer.dimensions.back();
  return {buffer.data, columns == 0 ? 0 : buffer.size / columns, columns, narrow};
}

bool alike(const Rows& a, const Rows& b) {
  return a.rows == b.rows && a.columns == b.columns && a.narrow == b.narrow;
}

ffi::Error layer_norm_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats gain, Floats bias,
                              ffi::Result<ffi::AnyBuffer> out, int64_t num_threads) {
  Checker check("gpt2_jax_layer_norm", {{"x", x}, {"gain", gain}, {"bias", bias}, {"out", *out}});
  const Rows x_rows = matrix(check, {"x", x}), out_rows = matrix(check, {"out", *out});
  check.expect(alike(x_rows, out_rows), "x and out of one shape and dtype");
  check.size({"gain", gain}, x_rows.columns);
  check.size({"bias", bias}, x_rows.columns);
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run(
      [&] { layer_norm(x_rows, gain.typed_data(), bias.typed_data(), out_rows, executor); });
}

ffi::Error layer_norm_backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats gain,
                                       ffi::AnyBuffer dout, ffi::AnyBuffer dresidual,
                                       ffi::Result<ffi::AnyBuffer> dx, ffi::Result<Floats> dgain,
                                       ffi::Result<Floats> dbias, int64_t num_threads) {
  Checker check("gpt2_jax_layer_norm_backward", {{"x", x},
                                                 {"gain", gain},
                                                 {"dout", dout},
                                                 {"dresidual", dresidual},
                                                 {"dx", *dx},
                                                 {"dgain", *dgain},
                                                 {"dbias", *dbias}});
  const Rows x_rows = matrix(check, {"x", x}), dout_rows = matrix(check, {"dout", dout});
  const Rows dresidual_rows = matrix(check, {"dresidual", dresidual});
  const Rows dx_rows = matrix(check, {"dx", *dx});
  check.expect(alike(x_rows, dout_rows) && alike(x_rows, dresidual_rows) && alike(x_rows, dx_rows),
               "x, dout, dresidual and dx of one shape and dtype");
  check.size({"gain", gain}, x_rows.columns);
  check.size({"dgain", *dgain}, x_rows.columns);
  check.size({"dbias", *dbias}, x_rows.columns);
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run([&] {
    layer_norm_backward(x_rows, gain.typed_data(), dout_rows, dresidual_rows, dx_rows,
                        dgain->typed_data(), dbias->typed_data(), executor);
  });
}

ffi::Error gelu_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out,
                        int64_t num_threads) {
  Checker check("gpt2_jax_gelu", {{"x", x}, {"out", *out}});
  const Rows x_rows = matrix(check, {"x", x}), out_rows = matrix(check, {"out", *out});
  check.expect(alike(x_rows, out_rows), "x and out of one shape and dtype");
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run([&] { gelu(x_rows, out_rows, executor); });
}

ffi::Error gelu_backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dout,
                                 ffi::Result<ffi::AnyBuffer> dx, int64_t num_threads) {
  Checker check("gpt2_jax_gelu_backward", {{"x", x}, {"dout", dout}, {"dx", *dx}});
  const Rows x_rows = matrix(check, {"x", x}), dout_rows = matrix(check, {"dout", dout});
  const Rows dx_rows = matrix(check, {"dx", *dx});
  check.expect(alike(x_rows, dout_rows) && alike(x_rows, dx_rows),
               "x, dout and dx of one shape and dtype");
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run([&] { gelu_backward(x_rows, dout_rows, dx_rows, executor); });
}

ffi::Error softmax_cross_entropy_handler(ffi::ThreadPool pool, Floats logits,
                                         ffi::Buffer<ffi::S32> targets, ffi::Result<Floats> losses,
                                         ffi::Result<ffi::AnyBuffer> dlogits, int64_t vocab_size,
                                         float scale, int64_t num_threads) {
  Checker check(
      "gpt2_jax_softmax_cross_entropy",
      {{"logits", logits}, {"targets", targets}, {"losses", *losses}, {"dlogits", *dlogits}});
  const Rows rows = matrix(check, {"logits", logits});
  const Rows dlogits_rows = matrix(check, {"dlogits", *dlogits});
  check.expect(rows.rows == dlogits_rows.rows && rows.columns == dlogits_rows.columns,
               "logits and dlogits of one shape");
  check.size({"targets", targets}, rows.rows);
  check.size({"losses", *losses}, rows.rows);
  check.expect(vocab_size > 0 && vocab_size <= rows.columns,
               "vocab_size from 1 to the columns, got " + std::to_string(vocab_size));
  for (int64_t i = 0; check.ok() && i < rows.rows; ++i) {
    const int32_t target = targets.typed_data()[i];
    if (target >= 0 && target < vocab_size) continue;
    check.fail("expected targets below " + std::to_string(vocab_size) + ", got " +
               std::to_string(target));
  }
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run([&] {
    softmax_cross_entropy(rows, targets.typed_data(), vocab_size, scale, losses->typed_data(),
                          dlogits_rows, executor);
  });
}

ffi::Error column_sums_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<Floats> sums,
                               int64_t num_threads) {
  Checker check("gpt2_jax_column_sums", {{"x", x}, {"sums", *sums}});
  const Rows rows = matrix(check, {"x", x});
  check.size({"sums", *sums}, rows.columns);
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run([&] { column_sums(rows, sums->typed_data(), executor); });
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_layer_norm, gpt2_jax::guarded<gpt2_jax::layer_norm_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // gain
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // bias
                                  .Ret<xla::ffi::AnyBuffer>()              // out
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_layer_norm_backward, gpt2_jax::guarded<gpt2_jax::layer_norm_backward_handler>,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_gelu, gpt2_jax::guarded<gpt2_jax::gelu_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_gelu_backward, gpt2_jax::guarded<gpt2_jax::gelu_backward_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // dout
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_softmax_cross_entropy,
                              gpt2_jax::guarded<gpt2_jax::softmax_cross_entropy_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // logits
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // targets
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // losses
                                  .Ret<xla::ffi::AnyBuffer>()              // dlogits
                                  .Attr<int64_t>("vocab_size")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_column_sums, gpt2_jax::guarded<gpt2_jax::column_sums_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // sums
                                  .Attr<int64_t>("num_threads"));

// The XLA FFI handlers of attention: buffers and attributes in, checked, to attention.cc.
#include <cstdint>
#include <new>
#include <string>
#include <string_view>

#include "attention.h"
#include "custom_calls.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

struct Attributes {
  int64_t num_heads;
  std::string_view implementation, precision;
};

// Fills `attention` from qkv (batch, time, 3 channels), or says what is wrong.
ffi::Error describe_attention(const ffi::AnyBuffer& qkv, const Attributes& attributes,
                              Attention* attention) {
  const auto fail = [](const std::string& message) {
    return ffi::Error::InvalidArgument("gpt2_jax_attention: " + message);
  };
  const auto dimensions = qkv.dimensions();
  const bool narrow = qkv.element_type() == ffi::BF16;
  if (!narrow && qkv.element_type() != ffi::F32) return fail("expected qkv of f32 or bf16");
  if (dimensions.size() != 3 || attributes.num_heads < 1 ||
      dimensions[2] % (3 * attributes.num_heads) != 0) {
    return fail("expected qkv [batch,time,3 channels] with channels a multiple of " +
                std::to_string(attributes.num_heads) + " heads");
  }
  attention->batch = dimensions[0];
  attention->time = dimensions[1];
  attention->heads = attributes.num_heads;
  attention->head_size = dimensions[2] / 3 / attributes.num_heads;
  attention->qkv = qkv.untyped_data();
  attention->dtype = narrow ? DType::kBFloat16 : DType::kFloat32;
  attention->implementation = find_implementation(attributes.implementation);
  if (attention->implementation == nullptr) {
    return fail("expected implementation one of " + implementation_names() + ", got " +
                std::string(attributes.implementation));
  }
  if (!parse_precision(attributes.precision, &attention->precision)) {
    return fail("expected a precision, got " + std::string(attributes.precision));
  }
  Matmul matmul;
  matmul.precision = attention->precision;
  std::string refusal = attention->implementation->unavailable();
  if (refusal.empty()) refusal = attention->implementation->refuse(matmul);
  if (!refusal.empty()) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "gpt2_jax_attention: " + std::string(attributes.implementation) +
                          " refuses its products: " + refusal);
  }
  return ffi::Error::Success();
}

bool holds(const ffi::AnyBuffer& buffer, const Attention& attention, int64_t parts) {
  const int64_t count = attention.batch * attention.time * attention.heads * attention.head_size;
  const bool narrow = buffer.element_type() == ffi::BF16;
  return static_cast<int64_t>(buffer.element_count()) == parts * count &&
         (narrow || buffer.element_type() == ffi::F32) &&
         narrow == (attention.dtype == DType::kBFloat16);
}

bool holds_log_sums(const Floats& buffer, const Attention& attention) {
  return static_cast<int64_t>(buffer.element_count()) ==
         attention.batch * attention.heads * attention.time;
}

ffi::Error wrong_buffers() {
  return ffi::Error::InvalidArgument(
      "gpt2_jax_attention: expected out and dout [batch,time,channels] and dqkv as qkv, in its "
      "dtype, and log_sums [batch,heads,time]");
}

template <typename Work>
ffi::Error guarded(const Work& work) {
  try {
    work();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "gpt2_jax_attention: out of memory for its scores");
  }
  return ffi::Error::Success();
}

ffi::Error attention_handler(ffi::ThreadPool pool, ffi::AnyBuffer qkv,
                             ffi::Result<ffi::AnyBuffer> out, ffi::Result<Floats> log_sums,
                             int64_t num_heads, std::string_view implementation,
                             std::string_view precision, int64_t num_threads) {
  Attention attention;
  ffi::Error error = describe_attention(qkv, {num_heads, implementation, precision}, &attention);
  if (error.failure()) return error;
  if (!holds(*out, attention, 1) || !holds_log_sums(*log_sums, attention)) return wrong_buffers();
  XlaExecutor executor(pool, num_threads);
  return guarded(
      [&] { attention_forward(attention, out->untyped_data(), log_sums->typed_data(), executor); });
}

ffi::Error attention_backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer out,
                                      Floats log_sums, ffi::AnyBuffer dout,
                                      ffi::Result<ffi::AnyBuffer> dqkv, int64_t num_heads,
                                      std::string_view implementation, std::string_view precision,
                                      int64_t num_threads) {
  Attention attention;
  ffi::Error error = describe_attention(qkv, {num_heads, implementation, precision}, &attention);
  if (error.failure()) return error;
  if (!holds(out, attention, 1) || !holds(dout, attention, 1) || !holds(*dqkv, attention, 3) ||
      !holds_log_sums(log_sums, attention)) {
    return wrong_buffers();
  }
  XlaExecutor executor(pool, num_threads);
  return guarded([&] {
    attention_backward(attention, out.untyped_data(), log_sums.typed_data(), dout.untyped_data(),
                       dqkv->untyped_data(), executor);
  });
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_attention, gpt2_jax::attention_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // qkv
                                  .Ret<xla::ffi::AnyBuffer>()              // out
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // log_sums
                                  .Attr<int64_t>("num_heads")
                                  .Attr<std::string_view>("implementation")
                                  .Attr<std::string_view>("precision")
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_attention_backward, gpt2_jax::attention_backward_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // qkv
                                  .Arg<xla::ffi::AnyBuffer>()              // out
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // log_sums
                                  .Arg<xla::ffi::AnyBuffer>()              // dout
                                  .Ret<xla::ffi::AnyBuffer>()              // dqkv
                                  .Attr<int64_t>("num_heads")
                                  .Attr<std::string_view>("implementation")
                                  .Attr<std::string_view>("precision")
                                  .Attr<int64_t>("num_threads"));

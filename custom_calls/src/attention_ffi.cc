// The XLA FFI handlers of attention: they check buffers and attributes and call attention.cc.
#include <cstdint>
#include <string>
#include <string_view>

#include "attention.h"
#include "checker.h"
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

Attention decode(Checker& check, const NamedBuffer& qkv, const Attributes& attributes) {
  Attention attention = {};
  attention.dtype = check.dtype(qkv);
  attention.implementation = check.implementation(attributes.implementation);
  attention.precision = check.precision(attributes.precision);
  const int64_t heads = attributes.num_heads;
  if (qkv.dimensions.size() != 3 || heads < 1 || qkv.dimensions[2] % 3 != 0 ||
      qkv.dimensions[2] / 3 % heads != 0) {
    check.fail("expected qkv [batch,time,3 channels] with channels a multiple of " +
               std::to_string(heads) + " heads");
    return attention;
  }
  attention.batch = qkv.dimensions[0];
  attention.time = qkv.dimensions[1];
  attention.heads = heads;
  attention.head_size = qkv.dimensions[2] / 3 / heads;
  attention.qkv = qkv.data;
  return attention;
}

// Checks that a buffer has `parts` times the output's elements, in the output's dtype.
void expect_parts(Checker& check, const NamedBuffer& buffer, const Attention& attention,
                  int64_t parts) {
  check.expect(check.dtype(buffer) == attention.dtype,
               std::string(buffer.name) + " of qkv's dtype");
  check.size(buffer,
             parts * attention.batch * attention.time * attention.heads * attention.head_size);
}

void expect_log_sums(Checker& check, const Floats& log_sums, const Attention& attention) {
  check.size({"log_sums", log_sums}, attention.batch * attention.heads * attention.time);
}

// Calls work(), unless the rung refuses one of attention's products.
template <typename Work>
ffi::Error run(const Checker& check, const Attention& attention, const Work& work) {
  Matmul scores;
  scores.m = scores.n = attention.time;
  scores.k = attention.head_size;
  const int64_t row = 3 * attention.heads * attention.head_size;
  scores.a = {attention.qkv, 0, row, attention.dtype, false};
  scores.b = {attention.qkv, 0, row, attention.dtype, true};
  scores.out_leading_dimension = attention.time;
  scores.precision = attention.precision;
  ffi::Error refusal = check.refusal(attention.implementation, scores);
  if (refusal.failure()) return refusal;
  return check.run(work);
}

ffi::Error attention_handler(ffi::ThreadPool pool, ffi::AnyBuffer qkv,
                             ffi::Result<ffi::AnyBuffer> out, ffi::Result<Floats> log_sums,
                             int64_t num_heads, std::string_view implementation,
                             std::string_view precision, int64_t num_threads) {
  Checker check("gpt2_jax_attention", {{"qkv", qkv}, {"out", *out}, {"log_sums", *log_sums}});
  const Attention attention = decode(check, {"qkv", qkv}, {num_heads, implementation, precision});
  expect_parts(check, {"out", *out}, attention, 1);
  expect_log_sums(check, *log_sums, attention);
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return run(check, attention, [&] {
    attention_forward(attention, out->untyped_data(), log_sums->typed_data(), executor);
  });
}

ffi::Error attention_backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer out,
                                      Floats log_sums, ffi::AnyBuffer dout,
                                      ffi::Result<ffi::AnyBuffer> dqkv, int64_t num_heads,
                                      std::string_view implementation, std::string_view precision,
                                      int64_t num_threads) {
  Checker check(
      "gpt2_jax_attention_backward",
      {{"qkv", qkv}, {"out", out}, {"log_sums", log_sums}, {"dout", dout}, {"dqkv", *dqkv}});
  const Attention attention = decode(check, {"qkv", qkv}, {num_heads, implementation, precision});
  expect_parts(check, {"out", out}, attention, 1);
  expect_parts(check, {"dout", dout}, attention, 1);
  expect_parts(check, {"dqkv", *dqkv}, attention, 3);
  expect_log_sums(check, log_sums, attention);
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return run(check, attention, [&] {
    attention_backward(attention, out.untyped_data(), log_sums.typed_data(), dout.untyped_data(),
                       dqkv->untyped_data(), executor);
  });
}

ffi::Error cached_attention_handler(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys,
                                    ffi::AnyBuffer values, ffi::Buffer<ffi::S32> start,
                                    ffi::Result<ffi::AnyBuffer> out,
                                    std::string_view implementation, std::string_view precision,
                                    int64_t num_threads) {
  const NamedBuffer queries = {"q", q}, cache = {"keys", keys};
  Checker check("gpt2_jax_cached_attention",
                {queries, cache, {"values", values}, {"start", start}, {"out", *out}});
  CachedAttention attention = {};
  attention.dtype = check.dtype(queries);
  attention.implementation = check.implementation(implementation);
  attention.precision = check.precision(precision);
  check.size({"start", start}, 1);
  check.size({"values", values}, cache.size);
  check.size({"out", *out}, queries.size);
  for (const NamedBuffer& other : {cache, NamedBuffer("values", values), NamedBuffer("out", *out)}) {
    check.expect(check.dtype(other) == attention.dtype, std::string(other.name) + " of q's dtype");
  }
  check.expect(queries.dimensions.size() == 3 && cache.dimensions.size() == 4,
               "q [batch,time,channels] and keys [batch,heads,positions,head size]");
  if (check.ok()) {
    attention.batch = cache.dimensions[0];
    attention.heads = cache.dimensions[1];
    attention.positions = cache.dimensions[2];
    attention.head_size = cache.dimensions[3];
    attention.time = queries.dimensions[1];
    attention.start = *start.typed_data();
    check.expect(queries.dimensions[0] == attention.batch &&
                     queries.dimensions[2] == attention.heads * attention.head_size,
                 "q and keys of the same batch and channels");
    check.expect(attention.start >= 0 && attention.start <= attention.positions - attention.time,
                 std::to_string(attention.time) + " queries within the cached positions, got start " +
                     std::to_string(attention.start));
  }
  attention.q = q.untyped_data();
  attention.keys = keys.untyped_data();
  attention.values = values.untyped_data();
  Matmul scores;
  scores.m = attention.time, scores.n = attention.positions, scores.k = attention.head_size;
  scores.a = {attention.q, 0, attention.heads * attention.head_size, attention.dtype, false};
  scores.b = {attention.keys, 0, attention.head_size, attention.dtype, true};
  scores.out_leading_dimension = attention.positions;
  scores.precision = attention.precision;
  ffi::Error refusal = check.refusal(attention.implementation, scores);
  if (refusal.failure()) return refusal;
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run([&] { cached_attention(attention, out->untyped_data(), executor); });
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_attention, gpt2_jax::guarded<gpt2_jax::attention_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // qkv
                                  .Ret<xla::ffi::AnyBuffer>()              // out
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // log_sums
                                  .Attr<int64_t>("num_heads")
                                  .Attr<std::string_view>("implementation")
                                  .Attr<std::string_view>("precision")
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_attention_backward, gpt2_jax::guarded<gpt2_jax::attention_backward_handler>,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_cached_attention, gpt2_jax::guarded<gpt2_jax::cached_attention_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // q
                                  .Arg<xla::ffi::AnyBuffer>()              // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // start
                                  .Ret<xla::ffi::AnyBuffer>()              // out
                                  .Attr<std::string_view>("implementation")
                                  .Attr<std::string_view>("precision")
                                  .Attr<int64_t>("num_threads"));

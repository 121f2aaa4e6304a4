// The XLA FFI handlers of the optimizer: they check buffers and constants and call adamw/.
#include <cstdint>
#include <string>
#include <vector>

#include "adamw/adamw.h"
#include "checker.h"
#include "custom_calls.h"
#include "rows/rows.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error sums_of_squares_handler(ffi::ThreadPool pool, Floats values, ffi::Result<Floats> sums,
                                   ffi::Span<const int64_t> spans, int64_t num_threads) {
  const int64_t count = static_cast<int64_t>(values.element_count());
  const size_t num_sums = sums->element_count();
  Checker check("gpt2_jax_sums_of_squares", {{"values", values}, {"sums", *sums}});
  check.expect(spans.size() == 2 * num_sums, "starts and stops of " + std::to_string(num_sums) +
                                                 " spans, got " + std::to_string(spans.size()) +
                                                 " bounds");
  for (size_t i = 0; check.ok() && i < spans.size(); i += 2) {
    check.expect(0 <= spans[i] && spans[i] <= spans[i + 1] && spans[i + 1] <= count,
                 "spans within " + std::to_string(count) + " elements, got [" +
                     std::to_string(spans[i]) + "," + std::to_string(spans[i + 1]) + ")");
  }
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run([&] {
    for (size_t i = 0; i < num_sums; ++i) {
      const int64_t start = spans[2 * i], stop = spans[2 * i + 1];
      sums->typed_data()[i] =
          static_cast<float>(sum_of_squares(stop - start, values.typed_data() + start, executor));
    }
  });
}

ffi::Error adamw_handler(ffi::ThreadPool pool, Floats gradients, Floats params, Floats m, Floats v,
                         Floats scalars, ffi::Result<Floats> params_out, ffi::Result<Floats> m_out,
                         ffi::Result<Floats> v_out, ffi::Span<const int64_t> spans,
                         float weight_decay, float beta1, float beta2, float epsilon,
                         int64_t num_threads) {
  std::vector<NamedBuffer> buffers = {
      {"gradients", gradients},    {"params", params}, {"m", m},          {"v", v},
      {"params_out", *params_out}, {"m_out", *m_out},  {"v_out", *v_out}, {"scalars", scalars}};
  Checker check("gpt2_jax_adamw", buffers);
  const int64_t count = buffers[0].size;
  check.size(buffers.back(), 5);
  buffers.pop_back();
  for (const NamedBuffer& buffer : buffers) check.size(buffer, count);
  check.expect(spans.size() % 3 == 0, "spans of start, stop and whether they decay, got " +
                                          std::to_string(spans.size()) + " numbers");
  std::vector<DecaySpan> updated_spans;
  int64_t position = 0;
  for (size_t i = 0; check.ok() && i < spans.size(); i += 3) {
    const int64_t start = spans[i], stop = spans[i + 1];
    check.expect(position <= start && start <= stop && stop <= count,
                 "spans in order within " + std::to_string(count) + " elements, got [" +
                     std::to_string(start) + "," + std::to_string(stop) + ")");
    updated_spans.push_back({start, stop, spans[i + 2] != 0 ? weight_decay : 0.0f});
    position = stop;
  }
  XlaExecutor executor(pool, check.num_threads(num_threads));
  return check.run([&] {
    const float* const s = scalars.typed_data();
    const AdamWConstants constants = {s[0], s[1], beta1, beta2, s[2], s[3], epsilon};
    const AdamWUpdate update = {count,
                                gradients.typed_data(),
                                updated(params, params_out),
                                updated(m, m_out),
                                updated(v, v_out),
                                updated_spans.data(),
                                static_cast<int64_t>(updated_spans.size())};
    if (s[4] != 0.0f) adamw_update(update, constants, executor);
  });
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_sums_of_squares, gpt2_jax::guarded<gpt2_jax::sums_of_squares_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // sums
                                  .Attr<xla::ffi::Span<const int64_t>>("spans")
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_adamw, gpt2_jax::guarded<gpt2_jax::adamw_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // gradients
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // params
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // m
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // v
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // scalars
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // params
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // m
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // v
                                  .Attr<xla::ffi::Span<const int64_t>>("spans")
                                  .Attr<float>("weight_decay")
                                  .Attr<float>("beta1")
                                  .Attr<float>("beta2")
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("num_threads"));

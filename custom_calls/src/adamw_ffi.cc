// The XLA FFI handlers of the optimizer: buffers and constants in, checked, to adamw/.
#include <string>
#include <vector>

#include "adamw/adamw.h"
#include "custom_calls.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error sums_of_squares_handler(ffi::ThreadPool pool, Floats values, ffi::Result<Floats> out,
                                   ffi::Span<const int64_t> bounds, int64_t num_threads) {
  const auto fail = [](const std::string& message) {
    return ffi::Error::InvalidArgument("gpt2_jax_sums_of_squares: " + message);
  };
  const size_t spans = out->element_count();
  if (bounds.size() != spans + 1) {
    return fail("expected bounds of each of " + std::to_string(spans) + " results and an end, found " +
                std::to_string(bounds.size()));
  }
  for (size_t i = 0; i < spans; ++i) {
    if (bounds[i] < 0 || bounds[i + 1] < bounds[i] ||
        static_cast<size_t>(bounds[i + 1]) > values.element_count()) {
      return fail("expected bounds in order within " + std::to_string(values.element_count()) +
                  " elements, found [" + std::to_string(bounds[i]) + "," +
                  std::to_string(bounds[i + 1]) + ")");
    }
  }
  XlaExecutor executor(pool, num_threads);
  for (size_t i = 0; i < spans; ++i) {
    const float* const first = values.typed_data() + bounds[i];
    out->typed_data()[i] =
        static_cast<float>(sum_of_squares(first, bounds[i + 1] - bounds[i], executor));
  }
  return ffi::Error::Success();
}

ffi::Error adamw_handler(ffi::ThreadPool pool, Floats gradients, Floats params, Floats m, Floats v,
                         Floats scalars, ffi::Result<Floats> params_out, ffi::Result<Floats> m_out,
                         ffi::Result<Floats> v_out, ffi::Span<const int64_t> decay_spans,
                         float weight_decay, float beta1, float beta2, float epsilon,
                         int64_t num_threads) {
  const size_t count = gradients.element_count();
  for (const size_t found :
       {params.element_count(), m.element_count(), v.element_count(), params_out->element_count(),
        m_out->element_count(), v_out->element_count()}) {
    if (found != count) {
      return ffi::Error::InvalidArgument(
          "gpt2_jax_adamw: expected buffers of one length, found gradients of " +
          std::to_string(count) + " and another of " + std::to_string(found));
    }
  }
  if (scalars.element_count() != 5 || decay_spans.size() % 2 != 0) {
    return ffi::Error::InvalidArgument(
        "gpt2_jax_adamw: expected 5 scalars and pairs of decay spans, found " +
        std::to_string(scalars.element_count()) + " and " + std::to_string(decay_spans.size()) +
        " bounds");
  }
  // The whole range, in runs of one weight decay.
  std::vector<DecaySpan> spans;
  int64_t position = 0;
  for (size_t i = 0; i < decay_spans.size(); i += 2) {
    const int64_t start = decay_spans[i], stop = decay_spans[i + 1];
    if (start < position || stop < start || stop > static_cast<int64_t>(count)) {
      return ffi::Error::InvalidArgument("gpt2_jax_adamw: expected decay spans in order within " +
                                         std::to_string(count) + " elements, found [" +
                                         std::to_string(start) + "," + std::to_string(stop) + ")");
    }
    spans.push_back({position, start, 0.0f});
    spans.push_back({start, stop, weight_decay});
    position = stop;
  }
  spans.push_back({position, static_cast<int64_t>(count), 0.0f});

  const float* const s = scalars.typed_data();
  const AdamWConstants constants = {s[0], s[1], beta1, beta2, s[2], s[3], epsilon};
  const AdamWUpdate update = {static_cast<int64_t>(count),
                              gradients.typed_data(),
                              updated(params, params_out),
                              updated(m, m_out),
                              updated(v, v_out),
                              spans.data(),
                              static_cast<int64_t>(spans.size())};
  if (s[4] == 0.0f) return ffi::Error::Success();
  XlaExecutor executor(pool, num_threads);
  adamw_update(update, constants, executor);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_sums_of_squares, gpt2_jax::sums_of_squares_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // sums
                                  .Attr<xla::ffi::Span<const int64_t>>("bounds")
                                  .Attr<int64_t>("num_threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_adamw, gpt2_jax::adamw_handler,
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
                                  .Attr<xla::ffi::Span<const int64_t>>("decay_spans")
                                  .Attr<float>("weight_decay")
                                  .Attr<float>("beta1")
                                  .Attr<float>("beta2")
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("num_threads"));

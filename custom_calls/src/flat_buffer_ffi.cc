// The XLA FFI handlers that write small pieces into a flat buffer in place, and the one that orders
// such calls.
#include <algorithm>
#include <cstdint>
#include <string>

#include "bfloat16.h"
#include "checker.h"
#include "custom_calls.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error write_into_handler(Floats target, ffi::RemainingArgs pieces, ffi::Result<Floats> out,
                              ffi::Span<const int64_t> offsets, int64_t accumulate) {
  const int64_t size = static_cast<int64_t>(target.element_count());
  Checker check("gpt2_jax_write_into", {{"target", target}, {"out", *out}});
  check.size({"out", *out}, size);
  check.expect(offsets.size() == pieces.size(),
               "one offset for each of " + std::to_string(pieces.size()) + " pieces, got " +
                   std::to_string(offsets.size()));
  for (size_t i = 0; check.ok() && i < pieces.size(); ++i) {
    const std::string name = "piece " + std::to_string(i);
    const NamedBuffer piece(name.c_str(), *pieces.get<ffi::AnyBuffer>(i));
    check.expect(piece.dtype == ffi::F32, name + " of dtype f32");
    check.expect(offsets[i] >= 0 && piece.size <= size && offsets[i] <= size - piece.size,
                 name + " within target, got " + std::to_string(piece.size) +
                     " elements from element " + std::to_string(offsets[i]));
  }
  return check.run([&] {
    float* const data = updated(target, out);
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Floats piece = *pieces.get<Floats>(i);
      const float* const values = piece.typed_data();
      float* const place = data + offsets[i];
      for (size_t j = 0; j < piece.element_count(); ++j) {
        place[j] = accumulate ? place[j] + values[j] : values[j];
      }
    }
  });
}

ffi::Error barrier_handler(ffi::AnyBuffer x, ffi::RemainingArgs, ffi::Result<ffi::AnyBuffer> out) {
  Checker check("gpt2_jax_barrier", {{"x", x}, {"out", *out}});
  check.expect(out->element_type() == x.element_type(), "out of x's dtype");
  check.size({"out", *out}, static_cast<int64_t>(x.element_count()));
  return check.run([&] { copy_unless_aliased(x, *out); });
}

ffi::Error add_rows_into_handler(Floats target, ffi::Buffer<ffi::S32> indices, ffi::AnyBuffer rows,
                                 ffi::Result<Floats> out, ffi::Result<Floats> change,
                                 int64_t out_offset) {
  const NamedBuffer all_rows = {"rows", rows};
  const int64_t size = static_cast<int64_t>(target.element_count());
  const int64_t count = static_cast<int64_t>(indices.element_count());
  Checker check(
      "gpt2_jax_add_rows_into",
      {{"target", target}, {"indices", indices}, all_rows, {"out", *out}, {"change", *change}});
  const bool narrow = check.dtype(all_rows) == DType::kBFloat16;
  check.size({"out", *out}, size);
  check.size({"change", *change}, 1);
  check.expect(all_rows.dimensions.size() > 0, "rows of rank 1 or more");
  const int64_t width = check.ok() ? all_rows.dimensions.back() : 0;
  check.expect(all_rows.size == count * width,
               "a row for each of " + std::to_string(count) + " indices");
  check.expect(out_offset >= 0 && out_offset <= size,
               "out_offset within target, got " + std::to_string(out_offset));
  const int64_t places = check.ok() ? (size - out_offset) / std::max<int64_t>(width, 1) : 0;
  for (int64_t i = 0; check.ok() && i < count; ++i) {
    const int32_t index = indices.typed_data()[i];
    if (index >= 0 && index < places) continue;
    check.fail("expected indices of the " + std::to_string(places) + " rows from element " +
               std::to_string(out_offset) + " on, got " + std::to_string(index));
  }
  return check.run([&] {
    float* const matrix = updated(target, out) + out_offset;
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      float* const place = matrix + indices.typed_data()[i] * width;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t from = i * width + j;
        const double before = place[j];
        place[j] += narrow ? bfloat16_to_float(static_cast<uint16_t*>(rows.untyped_data())[from])
                           : static_cast<float*>(rows.untyped_data())[from];
        sum += static_cast<double>(place[j]) * place[j] - before * before;
      }
    }
    change->typed_data()[0] = static_cast<float>(sum);
  });
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_write_into, gpt2_jax::guarded<gpt2_jax::write_into_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // target
                                  .RemainingArgs()                         // pieces
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // out
                                  .Attr<xla::ffi::Span<const int64_t>>("offsets")
                                  .Attr<int64_t>("accumulate"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_barrier, gpt2_jax::guarded<gpt2_jax::barrier_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()    // x
                                  .RemainingArgs()               // values that must exist before x
                                  .Ret<xla::ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_add_rows_into, gpt2_jax::guarded<gpt2_jax::add_rows_into_handler>,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // target
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // indices
                                  .Arg<xla::ffi::AnyBuffer>()              // rows
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // out
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // change
                                  .Attr<int64_t>("out_offset"));

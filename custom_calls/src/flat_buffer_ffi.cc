// The XLA FFI handlers that write small pieces into a flat buffer in place, and the one that orders such calls.
#include <cstdint>
#include <cstring>
#include <string>

#include "bfloat16.h"
#include "custom_calls.h"
#include "xla_ffi.h"

namespace gpt2_jax {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

bool fits(const Floats& target, int64_t offset, size_t count) {
  return offset >= 0 && count <= target.element_count() &&
         static_cast<size_t>(offset) <= target.element_count() - count;
}

ffi::Error write_into_handler(Floats target, ffi::RemainingArgs pieces, ffi::Result<Floats> out,
                              ffi::Span<const int64_t> offsets, int64_t accumulate) {
  const auto fail = [](const std::string& message) {
    return ffi::Error::InvalidArgument("gpt2_jax_write_into: " + message);
  };
  if (out->element_count() != target.element_count()) {
    return fail("expected out of target's length " + std::to_string(target.element_count()) +
                ", found " + std::to_string(out->element_count()));
  }
  if (offsets.size() != pieces.size()) {
    return fail("expected one offset for each of " + std::to_string(pieces.size()) +
                " pieces, found " + std::to_string(offsets.size()));
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto piece = pieces.get<Floats>(i);
    if (!piece.has_value()) return piece.error();
    if (!fits(target, offsets[i], piece->element_count())) {
      return fail("expected piece " + std::to_string(i) + " within " +
                  std::to_string(target.element_count()) + " elements, found " +
                  std::to_string(piece->element_count()) + " from " + std::to_string(offsets[i]));
    }
  }
  float* const data = updated(target, out);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Floats piece = *pieces.get<Floats>(i);
    const float* const values = piece.typed_data();
    float* const place = data + offsets[i];
    for (size_t j = 0; j < piece.element_count(); ++j) {
      place[j] = accumulate ? place[j] + values[j] : values[j];
    }
  }
  return ffi::Error::Success();
}

ffi::Error barrier_handler(ffi::AnyBuffer x, ffi::RemainingArgs,
                           ffi::Result<ffi::AnyBuffer> out) {
  if (out->size_bytes() != x.size_bytes()) {
    return ffi::Error::InvalidArgument("gpt2_jax_barrier: expected out as x of " +
                                       std::to_string(x.size_bytes()) + " bytes, found " +
                                       std::to_string(out->size_bytes()));
  }
  if (out->untyped_data() != x.untyped_data() && x.size_bytes() > 0) {
    std::memcpy(out->untyped_data(), x.untyped_data(), x.size_bytes());
  }
  return ffi::Error::Success();
}

ffi::Error add_rows_into_handler(Floats target, ffi::Buffer<ffi::S32> indices, ffi::AnyBuffer rows,
                                 ffi::Result<Floats> out, int64_t out_offset) {
  const auto fail = [](const std::string& message) {
    return ffi::Error::InvalidArgument("gpt2_jax_add_rows_into: " + message);
  };
  const size_t count = indices.element_count();
  const bool narrow = rows.element_type() == ffi::BF16;
  if (!narrow && rows.element_type() != ffi::F32) return fail("expected rows of f32 or bf16");
  if (rows.dimensions().size() == 0 || out->element_count() != target.element_count()) {
    return fail("expected rows of rank 1 or more, and out of target's length");
  }
  const size_t width = static_cast<size_t>(rows.dimensions().back());
  if (rows.element_count() != count * width) {
    return fail("expected one row for each of " + std::to_string(count) + " indices, found " +
                std::to_string(rows.element_count()) + " elements of width " +
                std::to_string(width));
  }
  float* const data = updated(target, out);
  for (size_t i = 0; i < count; ++i) {
    const int64_t place = out_offset + indices.typed_data()[i] * static_cast<int64_t>(width);
    if (!fits(target, place, width)) {
      return fail("expected row " + std::to_string(indices.typed_data()[i]) + " within target");
    }
    for (size_t j = 0; j < width; ++j) {
      const size_t from = i * width + j;
      data[place + j] += narrow
                             ? bfloat16_to_float(static_cast<uint16_t*>(rows.untyped_data())[from])
                             : static_cast<float*>(rows.untyped_data())[from];
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gpt2_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_write_into, gpt2_jax::write_into_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // target
                                  .RemainingArgs()                         // pieces
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // out
                                  .Attr<xla::ffi::Span<const int64_t>>("offsets")
                                  .Attr<int64_t>("accumulate"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_barrier, gpt2_jax::barrier_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()    // x
                                  .RemainingArgs()               // what x waits for
                                  .Ret<xla::ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt2_jax_add_rows_into, gpt2_jax::add_rows_into_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // target
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // indices
                                  .Arg<xla::ffi::AnyBuffer>()              // rows
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // out
                                  .Attr<int64_t>("out_offset"));

// What is wrong with a call of an FFI handler: what was expected, and what was found.
#pragma once

#include <cstdint>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "matmul.h"
#include "registry.h"
#include "xla/ffi/api/ffi.h"

namespace gpt2_jax {

// A buffer, whatever its handler knows of its type, and what messages call it.
struct NamedBuffer {
  template <typename Buffer>
  NamedBuffer(const char* name, const Buffer& buffer)
      : name(name),
        dtype(buffer.element_type()),
        dimensions(buffer.dimensions()),
        size(static_cast<int64_t>(buffer.element_count())),
        data(buffer.untyped_data()) {}

  const char* name;
  xla::ffi::DataType dtype;
  xla::ffi::Span<const int64_t> dimensions;
  int64_t size;  // elements
  void* data;
};

// One call, and the first thing that is wrong with it.
class Checker {
 public:
  // The buffers are those that every message ends with, as they were found.
  Checker(const char* handler, std::vector<NamedBuffer> buffers)
      : handler_(handler), buffers_(std::move(buffers)) {}

  void fail(const std::string& problem);
  void expect(bool condition, const std::string& what) {
    if (!condition) fail("expected " + what);
  }

  // The type of a buffer that may be f32 or bf16.
  DType dtype(const NamedBuffer& buffer);
  void size(const NamedBuffer& buffer, int64_t expected);

  // The attributes that choose who computes a product, and how.
  const Implementation* implementation(std::string_view name);
  Precision precision(std::string_view name);

  bool ok() const { return error_.empty(); }

  // UNIMPLEMENTED with the reason, where the implementation does not compute this product; else
  // success, as where something else is wrong.
  xla::ffi::Error refusal(const Implementation* implementation, const Matmul& matmul) const;

  // INVALID_ARGUMENT or, where nothing is wrong, what becomes of work(): success, or
  // RESOURCE_EXHAUSTED where it finds no memory.
  template <typename Work>
  xla::ffi::Error run(const Work& work) const {
    if (!ok()) return xla::ffi::Error::InvalidArgument(error_);
    try {
      work();
    } catch (const std::bad_alloc&) {
      return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, message("out of memory"));
    }
    return xla::ffi::Error::Success();
  }

 private:
  std::string message(const std::string& problem) const;

  const char* const handler_;
  const std::vector<NamedBuffer> buffers_;
  std::string error_;
};

}  // namespace gpt2_jax

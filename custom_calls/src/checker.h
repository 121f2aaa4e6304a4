// Checks of an FFI call's arguments. Messages say what was expected and what was found.
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

// A buffer of any FFI buffer type, with its name in messages.
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

// The checks of one call; keeps the first failure.
class Checker {
 public:
  // Every message ends with the types and shapes of `buffers`.
  Checker(const char* handler, std::vector<NamedBuffer> buffers)
      : handler_(handler), buffers_(std::move(buffers)) {}

  void fail(const std::string& problem);
  void expect(bool condition, const std::string& what) {
    if (!condition) fail("expected " + what);
  }

  // The type of a buffer that may be f32 or bf16.
  DType dtype(const NamedBuffer& buffer);
  void size(const NamedBuffer& buffer, int64_t expected);

  // `count` if it is at least 1; a failure, and 1, otherwise.
  int64_t num_threads(int64_t count);

  // The rung and the precision of these names; a failure when there is none.
  const Implementation* implementation(std::string_view name);
  Precision precision(std::string_view name);

  bool ok() const { return error_.empty(); }

  // UNIMPLEMENTED with the reason when the implementation does not compute this product; else
  // success. Also success after a failed check: run() reports that.
  xla::ffi::Error refusal(const Implementation* implementation, const Matmul& matmul) const;

  // Calls work() unless a check failed.
  //
  //   a check failed             INVALID_ARGUMENT
  //   work() threw bad_alloc     RESOURCE_EXHAUSTED
  //   work() returned            success
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

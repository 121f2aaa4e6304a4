// Shared by all FFI handlers: XLA's thread pool as an Executor, and results in place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "executor.h"
#include "xla/ffi/api/ffi.h"

namespace gpt2_jax {

// XLA's own pool as an Executor.
class XlaExecutor final : public Executor {
 public:
  XlaExecutor(const xla::ffi::ThreadPool& pool, int64_t num_threads)
      : pool_(pool), num_threads_(static_cast<int>(std::clamp<int64_t>(num_threads, 1, 1024))) {}
  int num_threads() const override { return num_threads_; }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  xla::ffi::ThreadPool pool_;
  int num_threads_;
};

// Copies an argument to a result, unless XLA gave both the same memory.
template <typename Buffer>
void copy_unless_aliased(const Buffer& argument, const Buffer& result) {
  if (result.untyped_data() != argument.untyped_data() && argument.size_bytes() > 0) {
    std::memcpy(result.untyped_data(), argument.untyped_data(), argument.size_bytes());
  }
}

// The memory of a result that replaces an argument; it holds the argument's elements on return.
inline float* updated(const xla::ffi::Buffer<xla::ffi::F32>& argument,
                      xla::ffi::Result<xla::ffi::Buffer<xla::ffi::F32>>& result) {
  copy_unless_aliased(argument, *result);
  return result->typed_data();
}

}  // namespace gpt2_jax

// Shared by all FFI handlers: XLA's thread pool as an Executor, and results in place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <new>
#include <string>
#include <utility>

#include "executor.h"
#include "xla/ffi/api/ffi.h"

namespace gpt2_jax {

// A handler that lets no exception cross the C interface to XLA:
//
//   std::bad_alloc    RESOURCE_EXHAUSTED
//   any other         INTERNAL
template <auto kHandler>
struct Guarded;
template <typename... Arguments, xla::ffi::Error (*kHandler)(Arguments...)>
struct Guarded<kHandler> {
  static xla::ffi::Error call(Arguments... arguments) {
    try {
      return kHandler(std::move(arguments)...);
    } catch (const std::bad_alloc&) {
      return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted,
                             "gpt2_jax custom call: out of memory");
    } catch (const std::exception& error) {
      return xla::ffi::Error(xla::ffi::ErrorCode::kInternal,
                             std::string("gpt2_jax custom call: ") + error.what());
    } catch (...) {
      return xla::ffi::Error(xla::ffi::ErrorCode::kInternal,
                             "gpt2_jax custom call: an exception of an unknown type");
    }
  }
};
template <auto kHandler>
constexpr auto guarded = &Guarded<kHandler>::call;

// XLA's own pool as an Executor. num_threads is at least 1: Checker::num_threads checks it.
class XlaExecutor final : public Executor {
 public:
  XlaExecutor(const xla::ffi::ThreadPool& pool, int64_t num_threads)
      : pool_(pool), num_threads_(static_cast<int>(std::min<int64_t>(num_threads, 1024))) {}
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

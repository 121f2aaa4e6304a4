// Scratch memory that is kept between calls: fresh pages for every product would cost more than the
// packing itself.
#pragma once

#include <cstdint>

namespace gpt2_jax {

// A block of uninitialised floats, 64-byte aligned, borrowed from a process-wide store for this
// object's lifetime: the smallest idle block that is large enough. The store never shrinks: it holds as many
// blocks as were ever in use at once.
// Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(int64_t floats);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* data() const { return data_; }

 private:
  float* data_;
  int64_t floats_;
};

}  // namespace gpt2_jax

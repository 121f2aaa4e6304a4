#include "workspace.h"

#include <mutex>
#include <new>
#include <vector>

namespace gpt2_jax {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Block {
  float* data;
  int64_t floats;
};

struct Store {
  std::mutex mutex;
  std::vector<Block> idle;
};

// Never destroyed: XLA's threads may still be computing while the process exits.
Store& store() {
  static Store* const instance = new Store;
  return *instance;
}

}  // namespace

Workspace::Workspace(int64_t floats) : data_(nullptr), floats_(floats) {
  {
    std::lock_guard<std::mutex> lock(store().mutex);
    if (!store().idle.empty()) {
      const Block block = store().idle.back();
      store().idle.pop_back();
      data_ = block.data;
      if (block.floats >= floats) {
        floats_ = block.floats;
        return;
      }
    }
  }
  ::operator delete(data_, kAlignment);  // too small to be of use again
  data_ = static_cast<float*>(::operator new(floats * sizeof(float), kAlignment));
}

Workspace::~Workspace() {
  std::lock_guard<std::mutex> lock(store().mutex);
  try {
    store().idle.push_back({data_, floats_});
  } catch (const std::bad_alloc&) {
    ::operator delete(data_, kAlignment);
  }
}

}  // namespace gpt2_jax

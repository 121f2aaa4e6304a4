#include "workspace.h"

#include <algorithm>
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
    std::vector<Block>& idle = store().idle;
    // The smallest that is large enough; if there is none, the largest of those that are too small.
    const auto better = [floats](const Block& a, const Block& b) {
      const bool a_fits = a.floats >= floats, b_fits = b.floats >= floats;
      if (a_fits != b_fits) return a_fits;
      return a_fits ? a.floats < b.floats : a.floats > b.floats;
    };
    const auto best = std::min_element(idle.begin(), idle.end(), better);
    if (best != idle.end()) {
      const Block block = *best;
      *best = idle.back();
      idle.pop_back();
      data_ = block.data;
      if (block.floats >= floats) {
        floats_ = block.floats;
        return;
      }
    }
  }
  // The new block takes the place of the one that was too small.
  ::operator delete(data_, kAlignment);
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

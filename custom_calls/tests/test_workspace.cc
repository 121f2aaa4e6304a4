// The store of workspaces: which block a call gets.
#include "workspace.h"

#include "check.h"

namespace gpt2_jax {
namespace {

// Two blocks are idle, returned in either order. A small call must leave the large one to a large
// call: else the large call would allocate again, and the store would grow block by block.
void test_smallest_block_that_fits(bool small_first) {
  const float *large, *small;
  {
    const Workspace first(small_first ? 100 : 10000), second(small_first ? 10000 : 100);
    large = small_first ? second.data() : first.data();
    small = small_first ? first.data() : second.data();
  }
  for (int call = 0; call < 3; ++call) {
    const Workspace little(50), much(9000);
    CHECK(little.data() == small, "the smallest block that fits");
    CHECK(much.data() == large, "the only block that fits");
  }
}

}  // namespace
}  // namespace gpt2_jax

int main() {
  gpt2_jax::test_smallest_block_that_fits(false);
  gpt2_jax::test_smallest_block_that_fits(true);
  return gpt2_jax::report("test_workspace");
}

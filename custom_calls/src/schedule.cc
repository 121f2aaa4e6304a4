#include "schedule.h"

#include <algorithm>

#include "cut.h"
#include "operand.h"
#include "pack.h"
#include "workspace.h"

namespace gpt2_jax {
namespace {

// Float32 sums of one block of the output: the output itself, or scratch when it is bfloat16.
struct Sums {
  float* data;
  int64_t stride;
};

// The packed blocks of one pass over k.
struct Pass {
  const float* a;  // panels of mr rows
  const float* b;  // panels of nr columns
  int64_t depth;
  bool accumulate;  // add to the sums: after the first pass, or when matmul.accumulate
};

// Computes rows [i_begin, i_end) and columns [j_begin, j_end) of the block. i_begin and j_begin are
// multiples of the tile's sides.
void compute_item(const Kernel& kernel, const Pass& pass, const Sums& sums, int64_t i_begin,
                  int64_t i_end, int64_t j_begin, int64_t j_end) {
  for (int64_t j = j_begin; j < j_end; j += kernel.nr) {
    const float* b = pass.b + j * pass.depth;
    for (int64_t i = i_begin; i < i_end; i += kernel.mr) {
      const float* a = pass.a + i * pass.depth;
      float* out = sums.data + i * sums.stride + j;
      const int64_t rows = std::min<int64_t>(kernel.mr, i_end - i);
      const int64_t columns = std::min<int64_t>(kernel.nr, j_end - j);
      if (rows == kernel.mr && columns == kernel.nr) {
        kernel.run(pass.depth, a, b, out, sums.stride, pass.accumulate);
        continue;
      }
      // An incomplete tile at the edge: compute a whole one aside, then copy the part that exists.
      alignas(64) float tile[kMaxTile];
      kernel.run(pass.depth, a, b, tile, kernel.nr, false);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          float& element = out[r * sums.stride + c];
          const float sum = tile[r * kernel.nr + c];
          element = pass.accumulate ? element + sum : sum;
        }
      }
    }
  }
}

// Sizes of a work item: small enough that every thread gets several, large enough that the cost of
// taking one is negligible.
struct ItemSizes {
  int64_t m, n;
};

ItemSizes item_sizes(const Kernel& kernel, int64_t m, int64_t n, int threads) {
  ItemSizes item = {std::min(kernel.blocks.item_m, round_up(m, kernel.mr)),
                    std::min(kernel.blocks.item_n, round_up(n, kernel.nr))};
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  while (ceil_div(m, item.m) * ceil_div(n, item.n) < wanted) {
    if (item.n >= 4 * kernel.nr) {
      item.n = round_up(item.n / 2, kernel.nr);
    } else if (item.m >= 4 * kernel.mr) {
      item.m = round_up(item.m / 2, kernel.mr);
    } else {
      break;
    }
  }
  return item;
}

}  // namespace

void packed_matmul(const Matmul& matmul, const Kernel& kernel, Executor& executor) {
  if (matmul.m == 0 || matmul.n == 0) return;
  if (matmul.k == 0) {
    for (int64_t i = 0; i < matmul.m; ++i) {
      for (int64_t j = 0; j < matmul.n; ++j) store_result(matmul, i, j, 0);
    }
    return;
  }

  const Cut m_cut = {matmul.m, even_block(matmul.m, kernel.blocks.pack_m, kernel.mr)};
  const Cut n_cut = {matmul.n, even_block(matmul.n, kernel.blocks.pack_n, kernel.nr)};
  const Cut k_cut = {matmul.k, even_block(matmul.k, kernel.blocks.depth, 1)};

  const bool narrow_output = matmul.out_dtype != DType::kFloat32;
  // Rounded to 16 floats, so that each part starts on a cache line.
  const int64_t a_floats = round_up(m_cut.block * k_cut.block, 16);
  const int64_t b_floats = round_up(n_cut.block * k_cut.block, 16);
  const int64_t sum_floats = narrow_output ? m_cut.block * n_cut.block : 0;
  const Workspace workspace(a_floats + b_floats + sum_floats);
  float* const packed_a = workspace.data();
  float* const packed_b = packed_a + a_floats;
  float* const scratch_sums = packed_b + b_floats;

  for (int64_t jb = 0; jb < n_cut.count(); ++jb) {
    for (int64_t ib = 0; ib < m_cut.count(); ++ib) {
      const int64_t i0 = ib * m_cut.block, m = m_cut.size(ib);
      const int64_t j0 = jb * n_cut.block, n = n_cut.size(jb);
      const Sums sums =
          narrow_output
              ? Sums{scratch_sums, n}
              : Sums{static_cast<float*>(matmul.out) + i0 * matmul.out_leading_dimension + j0,
                     matmul.out_leading_dimension};
      const ItemSizes item = item_sizes(kernel, m, n, executor.num_threads());
      const Cut m_items = {m, item.m};
      const Cut n_items = {n, item.n};

      for (int64_t kb = 0; kb < k_cut.count(); ++kb) {
        const int64_t k0 = kb * k_cut.block, depth = k_cut.size(kb);
        // When k is a single block, op(b) is packed once and serves every block of rows.
        const bool b_is_packed = ib > 0 && k_cut.count() == 1;
        const int64_t a_items = m_items.count();
        const int64_t b_items = b_is_packed ? 0 : n_items.count();
        parallel_for(executor, a_items + b_items, [&](int64_t index) {
          if (index < a_items) {
            const int64_t first = index * item.m;
            pack_a(matmul, {i0 + first, m_items.size(index), k0, depth}, kernel.mr,
                   packed_a + first * depth);
          } else {
            const int64_t first = (index - a_items) * item.n;
            pack_b(matmul, {j0 + first, n_items.size(index - a_items), k0, depth}, kernel.nr,
                   packed_b + first * depth);
          }
        });

        const Pass pass = {packed_a, packed_b, depth, kb > 0 || matmul.accumulate};
        const bool last_pass = kb + 1 == k_cut.count();
        parallel_for(executor, m_items.count() * n_items.count(), [&](int64_t index) {
          const int64_t im = index / n_items.count(), in = index % n_items.count();
          const int64_t i_begin = im * item.m, i_end = i_begin + m_items.size(im);
          const int64_t j_begin = in * item.n, j_end = j_begin + n_items.size(in);
          compute_item(kernel, pass, sums, i_begin, i_end, j_begin, j_end);
          if (!last_pass || (!narrow_output && matmul.bias == nullptr)) return;
          for (int64_t i = i_begin; i < i_end; ++i) {
            for (int64_t j = j_begin; j < j_end; ++j) {
              store_result(matmul, i0 + i, j0 + j, sums.data[i * sums.stride + j]);
            }
          }
        });
      }
    }
  }
}

}  // namespace gpt2_jax

#include "schedule_tiles.h"

#include <algorithm>

#include "cut.h"
#include "operand.h"
#include "workspace.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace gpt2_jax {
namespace {

// An operand as lanes by k. The lanes are out's rows or columns.
struct Lanes {
  Operand operand;
  int64_t count;
  int64_t lane_stride, k_stride;
  int parts;
  TileSide side;
  bool digits;

  TileSource from(int64_t lane, int64_t k) const {
    const bool narrow = operand.dtype == DType::kBFloat16;
    const int64_t index = operand.offset + lane * lane_stride + k * k_stride;
    const char* data = static_cast<const char*>(operand.buffer) + index * (narrow ? 2 : 4);
    return {data, lane_stride, k_stride, narrow};
  }
  int64_t step_depth() const { return digits ? kDigitDepth : kTileDepth; }
  int64_t step_bytes() const { return 2 * kTileBytes * parts; }
  int64_t panel_bytes(int64_t depth) const {
    return ceil_div(depth, step_depth()) * step_bytes() + (digits ? kScalesBytes : 0);
  }
  int64_t packed_bytes(int64_t lanes, int64_t depth) const {
    return ceil_div(lanes, kPanelLanes) * panel_bytes(depth);
  }
  const float* scales(const unsigned char* panel, int64_t depth) const {
    return reinterpret_cast<const float*>(panel + panel_bytes(depth) - kScalesBytes);
  }
  // Bytes that packing must transpose. None for left tiles when memory runs along k, nor for right
  // tiles when it runs along the lanes.
  double transposed_bytes(int64_t k, TileSide for_side) const {
    const bool suits = (k_stride == 1) == (for_side == TileSide::kLeft);
    return suits ? 0 : static_cast<double>(count) * k * parts * (digits ? 1 : 2);
  }
};

int parts_of(const Operand& operand, Precision precision) {
  if (operand.dtype == DType::kBFloat16) return 1;
  if (precision == Precision::kBF16_BF16_F32_X6) return 3;
  return precision == Precision::kBF16_BF16_F32_X3 ? 2 : 1;
}

Lanes as_lanes(const Operand& operand, int64_t count, bool along_k, Precision precision,
               TileSide side) {
  const int64_t stride = operand.leading_dimension;
  const bool digits = precision == Precision::kS8_S8_S32_X6;
  const int parts = digits ? kMaxParts : parts_of(operand, precision);
  return {operand, count, along_k ? stride : 1, along_k ? 1 : stride, parts, side, digits};
}

// The products of parts that a precision keeps, ordered so that each shares a part with the one
// before it.
struct Passes {
  TilePass pass[6];
  int count = 0;
};

Passes choose_passes(int left_parts, int right_parts) {
  static constexpr TilePass kThree[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
  static constexpr TilePass kTwo[] = {{1, 0}, {0, 0}, {0, 1}};
  const bool three = std::max(left_parts, right_parts) == 3;
  Passes passes;
  for (int i = 0; i < (three ? 6 : 3); ++i) {
    const TilePass pass = three ? kThree[i] : kTwo[i];
    if (pass.left_part < left_parts && pass.right_part < right_parts) {
      passes.pass[passes.count++] = pass;
    }
  }
  return passes;
}

// The products of digits, in order of their order: order i begins at kFirstOfOrder[i].
constexpr TilePass kDigitPasses[] = {{0, 0}, {0, 1}, {1, 0}, {0, 2}, {1, 1}, {2, 0}};
constexpr int kFirstOfOrder[] = {0, 1, 3, 6};

// The decisions made once for a product.
struct Plan {
  const Matmul& matmul;
  const TileKernel& kernel;
  Lanes a, b;
  bool transposed;  // op(b) is on the left: the tiles hold out's transpose
  bool a_is_shared;
  Passes passes;  // for bfloat16; digits use kDigitPasses
  Cut k_cut;
  // With three parts a sum is rounded six times in each step. So each block of k has its own sums,
  // which begin at zero, and the blocks' sums are then added up.
  bool sums_begin_anew;
  bool stream;

  bool digits() const { return a.digits; }
  const Lanes& shared() const { return a_is_shared ? a : b; }
  const Lanes& streamed() const { return a_is_shared ? b : a; }
};

Plan make_plan(const Matmul& matmul, const TileKernel& kernel) {
  Plan plan = {matmul, kernel, {}, {}, false, matmul.m <= matmul.n, {}, {}, false, false};
  plan.a = as_lanes(matmul.a, matmul.m, !matmul.a.transposed, matmul.precision, TileSide::kLeft);
  plan.b = as_lanes(matmul.b, matmul.n, matmul.b.transposed, matmul.precision, TileSide::kRight);

  const double as_is = plan.a.transposed_bytes(matmul.k, TileSide::kLeft) +
                       plan.b.transposed_bytes(matmul.k, TileSide::kRight);
  // Swapping the sides also transposes the float32 sums when they are stored.
  const double swapped = plan.a.transposed_bytes(matmul.k, TileSide::kRight) +
                         plan.b.transposed_bytes(matmul.k, TileSide::kLeft) +
                         4.0 * static_cast<double>(matmul.m) * matmul.n;
  plan.transposed = swapped < as_is;
  if (plan.transposed) std::swap(plan.a.side, plan.b.side);
  plan.passes = plan.transposed ? choose_passes(plan.b.parts, plan.a.parts)
                                : choose_passes(plan.a.parts, plan.b.parts);

  const int64_t step_depth = plan.a.step_depth();
  const int64_t k_bytes = std::max(plan.a.step_bytes(), plan.b.step_bytes()) / step_depth;
  int64_t depth = std::max<int64_t>(kernel.blocks.panel_bytes / k_bytes, 1);
  if (plan.digits()) depth = std::min<int64_t>(depth, kMaxDigitDepth);
  plan.k_cut = {matmul.k, even_block(matmul.k, round_up(depth, step_depth), step_depth)};
  plan.sums_begin_anew = std::max(plan.a.parts, plan.b.parts) == kMaxParts;

  plan.stream = matmul.out_dtype == DType::kFloat32 && !matmul.accumulate &&
                static_cast<double>(matmul.m) * matmul.n * 4 > kernel.blocks.stream_bytes;
  return plan;
}

// Float32 sums of blocks. Those of streamed panel p and shared panel q begin at
// data + p * p_stride + q * q_stride.
struct Sums {
  float* data;
  int64_t p_stride, q_stride;

  float* at(int64_t p, int64_t q) const { return data + p * p_stride + q * q_stride; }
};

// The packed part of the shared operand: `lanes` in the blocks of k [first_block, last_block).
struct SharedBlock {
  Range lanes;
  int64_t first_block, last_block;
  unsigned char* packed;
  int64_t block_bytes;  // from one block of k to the next
};

// One work item's lanes.
struct Item {
  Range streamed, shared;
};

// A prefetch of `lanes` of the streamed operand in one block of k, spread over `steps` steps.
TilePrefetch prefetch_of(const Plan& plan, const Range& lanes, const Range& k, int64_t steps) {
  const Lanes& operand = plan.streamed();
  const TileSource source = operand.from(lanes.first, k.first);
  const int64_t width = source.narrow ? 2 : 4;
  const bool along_k = source.k_stride == 1;
  TilePrefetch prefetch;
  prefetch.row = static_cast<const char*>(source.data);
  prefetch.row_bytes = (along_k ? k.size : lanes.size) * width;
  prefetch.row_stride = (along_k ? source.lane_stride : source.k_stride) * width;
  prefetch.rows = along_k ? lanes.size : k.size;
  prefetch.lines_per_step = ceil_div(prefetch.rows * ceil_div(prefetch.row_bytes, 64), steps);
  return prefetch;
}

// Writes one block of sums to out. `squares` has one element for each block of out, row by row; or
// it is nullptr.
void finish_block(const Plan& plan, const float* sums, int64_t streamed_lane, int64_t shared_lane,
                  float* squares) {
  const Matmul& matmul = plan.matmul;
  const int64_t row = plan.a_is_shared ? shared_lane : streamed_lane;
  const int64_t column = plan.a_is_shared ? streamed_lane : shared_lane;
  const bool narrow = matmul.out_dtype == DType::kBFloat16;
  const int64_t index = row * matmul.out_leading_dimension + column;
  const int64_t block = row / kPanelLanes * ceil_div(matmul.n, kPanelLanes) + column / kPanelLanes;
  const TileResult result = {static_cast<char*>(matmul.out) + index * (narrow ? 2 : 4),
                             matmul.out_leading_dimension,
                             narrow,
                             matmul.accumulate,
                             matmul.bias == nullptr ? nullptr : matmul.bias + column,
                             plan.transposed,
                             plan.stream,
                             squares == nullptr ? nullptr : squares + block};
  plan.kernel.finish(result, sums, static_cast<int>(std::min<int64_t>(matmul.m - row, kPanelLanes)),
                     static_cast<int>(std::min<int64_t>(matmul.n - column, kPanelLanes)));
}

void pack(const Plan& plan, const Lanes& operand, const Range& lanes, const Range& k,
          unsigned char* packed) {
  const TileSource source = operand.from(lanes.first, k.first);
  if (plan.digits()) {
    plan.kernel.pack_digits(source, lanes.size, k.size, operand.side, packed);
  } else {
    plan.kernel.pack(source, lanes.size, k.size, operand.side, operand.parts, packed);
  }
}

// Multiplies one block of k for one block of out, by bfloat16 parts. Sets `total` in the first
// block of k and adds to it in the others. `of_block` is scratch memory.
void multiply_parts(const Plan& plan, TileBlock& block, bool first, float* of_block, float* total) {
  const bool anew = plan.sums_begin_anew && !first;
  block.passes = plan.passes.pass;
  block.num_passes = plan.passes.count;
  block.sums = anew ? of_block : total;
  block.accumulate = !anew && !first;
  plan.kernel.multiply(block);
  if (anew) plan.kernel.add(of_block, total);
}

// The same by digits. `of_orders` is scratch memory: kBlockSums for each order.
void multiply_digits(const Plan& plan, TileBlock& block, bool first, const float* left_scales,
                     const float* right_scales, int32_t* of_orders, float* total) {
  block.accumulate = false;
  for (int order = 0; order < kDigitOrders; ++order) {
    block.passes = kDigitPasses + kFirstOfOrder[order];
    block.num_passes = kFirstOfOrder[order + 1] - kFirstOfOrder[order];
    block.sums = of_orders + order * kBlockSums;
    plan.kernel.multiply_digits(block);
  }
  plan.kernel.add_digits(of_orders, left_scales, right_scales, !first, total);
}

// Computes one work item: packs its streamed lanes block by block of k and multiplies them with its
// shared lanes. `next` is the range of streamed lanes that this thread will probably get next.
void compute_item(const Plan& plan, const SharedBlock& shared, const Item& item, const Range& next,
                  const Sums& sums, unsigned char* packed, float* squares) {
  const Lanes& streamed = plan.streamed();
  const int64_t p_count = ceil_div(item.streamed.size, kPanelLanes);
  const int64_t q_first = (item.shared.first - shared.lanes.first) / kPanelLanes;
  const int64_t q_count = ceil_div(item.shared.size, kPanelLanes);
  const auto tiles = [](int64_t lanes) { return lanes > kTileLanes ? 2 : 1; };

  // Zeros, because the unused tiles of a block at the edge are added up too. Nobody reads them.
  alignas(64) float of_block[kBlockSums] = {};
  alignas(64) int32_t of_orders[kDigitOrders * kBlockSums] = {};
  plan.kernel.configure();
  for (int64_t kb = shared.first_block; kb < shared.last_block; ++kb) {
    const Range k = plan.k_cut[kb];
    const int64_t steps = ceil_div(k.size, streamed.step_depth());
    pack(plan, streamed, {item.streamed.first, item.streamed.size}, k, packed);
    TilePrefetch prefetch;
    const int64_t all_steps = p_count * q_count * steps * (plan.digits() ? kDigitOrders : 1);
    if (kb + 1 < shared.last_block) {
      prefetch = prefetch_of(plan, item.streamed, plan.k_cut[kb + 1], all_steps);
    } else if (next.size > 0) {
      prefetch = prefetch_of(plan, next, plan.k_cut[shared.first_block], all_steps);
    }

    const int64_t streamed_step = streamed.step_bytes();
    const int64_t shared_step = plan.shared().step_bytes();
    const int64_t streamed_panel_bytes = streamed.panel_bytes(k.size);
    const int64_t shared_panel_bytes = plan.shared().panel_bytes(k.size);
    const unsigned char* shared_panels =
        shared.packed + (kb - shared.first_block) * shared.block_bytes;
    for (int64_t p = 0; p < p_count; ++p) {
      for (int64_t q = 0; q < q_count; ++q) {
        const unsigned char* streamed_panel = packed + p * streamed_panel_bytes;
        const unsigned char* shared_panel = shared_panels + (q_first + q) * shared_panel_bytes;
        const int streamed_tiles = tiles(item.streamed.size - p * kPanelLanes);
        const int shared_tiles = tiles(item.shared.size - q * kPanelLanes);
        const bool streamed_is_left = streamed.side == TileSide::kLeft;
        TileBlock block;
        block.left = streamed_is_left ? streamed_panel : shared_panel;
        block.right = streamed_is_left ? shared_panel : streamed_panel;
        block.left_step = streamed_is_left ? streamed_step : shared_step;
        block.right_step = streamed_is_left ? shared_step : streamed_step;
        block.left_tiles = streamed_is_left ? streamed_tiles : shared_tiles;
        block.right_tiles = streamed_is_left ? shared_tiles : streamed_tiles;
        block.steps = steps;
        block.prefetch = &prefetch;
        float* const total = sums.at(p, q);
        if (plan.digits()) {
          const float* streamed_scales = streamed.scales(streamed_panel, k.size);
          const float* shared_scales = plan.shared().scales(shared_panel, k.size);
          multiply_digits(plan, block, kb == 0, streamed_is_left ? streamed_scales : shared_scales,
                          streamed_is_left ? shared_scales : streamed_scales, of_orders, total);
        } else {
          multiply_parts(plan, block, kb == 0, of_block, total);
        }
        if (kb + 1 == plan.k_cut.count()) {
          finish_block(plan, total, item.streamed.first + p * kPanelLanes,
                       item.shared.first + q * kPanelLanes, squares);
        }
      }
    }
  }
  plan.kernel.release();
#if defined(__x86_64__)
  // Streaming stores are not ordered with the store that marks this item as done, so wait for them.
  if (plan.stream) _mm_sfence();
#endif
}

// The lanes of either operand in one work item: few enough that every thread gets several items.
Item item_sizes(const TileBlockSizes& sizes, int64_t streamed, int64_t shared, int threads) {
  Item item = {{0, std::min(round_up(sizes.item_lanes, kPanelLanes), round_up(streamed, 32))},
               {0, even_block(shared, round_up(sizes.shared_lanes, kPanelLanes), kPanelLanes)}};
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  while (ceil_div(streamed, item.streamed.size) * ceil_div(shared, item.shared.size) < wanted) {
    if (item.streamed.size > kPanelLanes) {
      item.streamed.size = round_up(item.streamed.size / 2, kPanelLanes);
    } else if (item.shared.size > 2 * kPanelLanes) {
      item.shared.size = round_up(item.shared.size / 2, kPanelLanes);
    } else {
      break;
    }
  }
  return item;
}

// How both operands are cut: the outermost loop first.
struct Cuts {
  Cut streamed;       // one block, unless sums must wait for later blocks of k
  Cut shared;         // the lanes of the shared operand that are packed at a time
  int64_t k_at_once;  // its blocks of k that are packed at a time
};

Cuts cut_operands(const Plan& plan) {
  const TileBlockSizes& sizes = plan.kernel.blocks;
  const auto panels = [](int64_t bytes, int64_t panel_bytes) {
    return std::max<int64_t>(bytes / panel_bytes, 1) * kPanelLanes;
  };
  const int64_t panel_bytes = plan.shared().packed_bytes(kPanelLanes, plan.k_cut.block);
  Cuts cuts;
  cuts.shared = {plan.shared().count,
                 even_block(plan.shared().count, panels(sizes.shared_bytes, panel_bytes), 32)};
  const int64_t block_bytes = plan.shared().packed_bytes(cuts.shared.block, plan.k_cut.block);
  cuts.k_at_once =
      even_block(plan.k_cut.count(), std::max<int64_t>(sizes.shared_bytes / block_bytes, 1), 1);
  const int64_t streamed = plan.streamed().count;
  cuts.streamed = {streamed, streamed};
  if (cuts.k_at_once < plan.k_cut.count()) {
    const int64_t sums_bytes = cuts.shared.block / kPanelLanes * kBlockSums * 4;
    cuts.streamed.block = even_block(streamed, panels(sizes.sums_bytes, sums_bytes), kPanelLanes);
  }
  return cuts;
}

}  // namespace

void tile_matmul(const Matmul& matmul, const TileKernel& kernel, Executor& executor) {
  if (matmul.sum_of_squares != nullptr) *matmul.sum_of_squares = 0;
  if (matmul.m == 0 || matmul.n == 0) return;
  if (matmul.k == 0) {
    for (int64_t i = 0; i < matmul.m; ++i) {
      for (int64_t j = 0; j < matmul.n; ++j) store_result(matmul, i, j, 0);
    }
    if (matmul.sum_of_squares != nullptr) add_up_squares(matmul, executor);
    return;
  }

  const Plan plan = make_plan(matmul, kernel);
  const Cuts cuts = cut_operands(plan);
  const Item size =
      item_sizes(kernel.blocks, cuts.streamed.block, cuts.shared.block, executor.num_threads());
  const int64_t workers = executor.num_threads();
  //   sums that wait for                            are kept
  //   a later part of the shared operand's k        for all items
  //   the next block of k within the item           by each worker
  //   nothing, as k is a single block               in one block of sums for each worker
  const bool sums_wait = cuts.k_at_once < plan.k_cut.count();
  const int64_t q_total = ceil_div(cuts.shared.block, kPanelLanes);
  const int64_t p_total = ceil_div(cuts.streamed.block, kPanelLanes);
  const int64_t q_item = size.shared.size / kPanelLanes;
  const int64_t p_item = size.streamed.size / kPanelLanes;
  const int64_t waiting_sums = sums_wait ? p_total * q_total * kBlockSums : 0;
  const int64_t worker_sums =
      sums_wait ? 0 : kBlockSums * (plan.k_cut.count() == 1 ? 1 : p_item * q_item);
  const int64_t shared_block = plan.shared().packed_bytes(cuts.shared.block, plan.k_cut.block);
  const int64_t worker_packed = plan.streamed().packed_bytes(size.streamed.size, plan.k_cut.block);
  const int64_t worker_floats = worker_sums + worker_packed / 4;
  const int64_t blocks = ceil_div(matmul.m, kPanelLanes) * ceil_div(matmul.n, kPanelLanes);
  const int64_t block_squares = matmul.sum_of_squares == nullptr ? 0 : blocks;
  const Workspace workspace(waiting_sums + cuts.k_at_once * shared_block / 4 +
                            workers * worker_floats + block_squares);
  float* const shared_memory = workspace.data() + waiting_sums;
  float* const worker_memory = shared_memory + cuts.k_at_once * shared_block / 4;
  float* const squares = block_squares == 0 ? nullptr : worker_memory + workers * worker_floats;

  for (int64_t streamed_block = 0; streamed_block < cuts.streamed.count(); ++streamed_block) {
    for (int64_t shared_index = 0; shared_index < cuts.shared.count(); ++shared_index) {
      for (int64_t kb = 0; kb < plan.k_cut.count(); kb += cuts.k_at_once) {
        const int64_t last_block = std::min(kb + cuts.k_at_once, plan.k_cut.count());
        const Range all_shared = cuts.shared[shared_index];
        const Range all_streamed = cuts.streamed[streamed_block];
        const SharedBlock shared = {all_shared, kb, last_block,
                                    reinterpret_cast<unsigned char*>(shared_memory), shared_block};

        const Cut pack_cut = {all_shared.size, 2 * kPanelLanes, all_shared.first};
        parallel_for(executor, pack_cut.count() * (last_block - kb), [&](int64_t index) {
          const Range lanes = pack_cut[index % pack_cut.count()];
          const int64_t block = index / pack_cut.count();
          const Range k = plan.k_cut[kb + block];
          pack(plan, plan.shared(), lanes, k,
               shared.packed + block * shared_block +
                   plan.shared().packed_bytes(lanes.first - all_shared.first, k.size));
        });

        const Cut streamed_cut = {all_streamed.size, size.streamed.size, all_streamed.first};
        const Cut shared_cut = {all_shared.size, size.shared.size, all_shared.first};
        const int64_t count = streamed_cut.count() * shared_cut.count();
        parallel_for_with_workers(executor, count, [&](int64_t index, int worker) {
          const Item item = {streamed_cut[index / shared_cut.count()],
                             shared_cut[index % shared_cut.count()]};
          const int64_t next = (index + workers) / shared_cut.count();
          const Range next_lanes = next < streamed_cut.count() ? streamed_cut[next] : Range{0, 0};
          float* const own = worker_memory + worker * worker_floats;
          Sums sums = {own + worker_packed / 4, q_item * kBlockSums, kBlockSums};
          if (sums_wait) {
            sums = {workspace.data(), q_total * kBlockSums, kBlockSums};
            sums.data = sums.at((item.streamed.first - all_streamed.first) / kPanelLanes,
                                (item.shared.first - all_shared.first) / kPanelLanes);
          } else if (plan.k_cut.count() == 1) {
            sums.p_stride = sums.q_stride = 0;
          }
          compute_item(plan, shared, item, next_lanes, sums, reinterpret_cast<unsigned char*>(own),
                       squares);
        });
      }
    }
  }
  for (int64_t i = 0; i < block_squares; ++i) *matmul.sum_of_squares += squares[i];
}

}  // namespace gpt2_jax

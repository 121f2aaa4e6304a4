#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cut.h"
#include "operand.h"
#include "workspace.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace gpt2_jax {
namespace {

constexpr int64_t kLineBytes = 64;

// An operand as lanes by k. The lanes are out's rows or columns.
struct Lanes {
  const Kernel* kernel;
  Operand operand;
  int64_t count;
  int64_t lane_stride, k_stride;
  int parts;
  Side side;
  bool rounded;

  PackSource from(int64_t lane, int64_t k) const {
    const bool narrow = operand.dtype == DType::kBFloat16;
    const int64_t index = operand.offset + lane * lane_stride + k * k_stride;
    const char* data = static_cast<const char*>(operand.buffer) + index * (narrow ? 2 : 4);
    return {data, lane_stride, k_stride, narrow, rounded};
  }
  int panel_lanes() const {
    return side == Side::kLeft ? kernel->left_lanes : kernel->right_lanes;
  }
  int64_t element_bytes() const { return parts * kernel->element_bytes; }
  int64_t panel_bytes(int64_t depth) const {
    return round_up(depth, kernel->step_depth) * panel_lanes() * element_bytes() +
           kernel->trailer_bytes;
  }
  int64_t packed_bytes(int64_t lanes, int64_t depth) const {
    return ceil_div(lanes, panel_lanes()) * panel_bytes(depth);
  }
  // Bytes that packing must transpose.
  double transposed_bytes(int64_t k, Side for_side) const {
    const bool suits =
        (k_stride == 1) == (for_side == Side::kLeft && kernel->left_runs_along_k);
    return suits ? 0 : static_cast<double>(count) * k * element_bytes();
  }
};

int parts_of(const Operand& operand, Precision precision) {
  const bool narrow = operand.dtype == DType::kBFloat16;
  switch (precision) {
    case Precision::kF32_F32_F32:
    case Precision::kBF16_BF16_F32:
      return 1;
    case Precision::kBF16_BF16_F32_X3:
      return narrow ? 1 : 2;
    case Precision::kBF16_BF16_F32_X6:
      return narrow ? 1 : 3;
    case Precision::kS8_S8_S32_X6:
      return 3;
  }
  return 1;
}

Lanes as_lanes(const Kernel& kernel, const Operand& operand, int64_t count, bool along_k,
               Precision precision, Side side) {
  const int64_t stride = operand.leading_dimension;
  return {&kernel,
          operand,
          count,
          along_k ? stride : 1,
          along_k ? 1 : stride,
          parts_of(operand, precision),
          side,
          precision == Precision::kBF16_BF16_F32};
}

// The decisions made once for a product.
struct Plan {
  const Matmul& matmul;
  const Kernel& kernel;
  Lanes a, b;
  bool transposed;  // op(b) is on the left: the kernel's sums are out's transpose
  bool a_is_shared;
  int64_t column_blocks;  // of out
  Cut k_cut;
  bool stream;

  const Lanes& shared() const { return a_is_shared ? a : b; }
  const Lanes& streamed() const { return a_is_shared ? b : a; }
  int64_t block_sums() const { return int64_t{kernel.left_lanes} * kernel.right_lanes; }
};

Plan make_plan(const Matmul& matmul, const Kernel& kernel) {
  Plan plan = {matmul, kernel, {}, {}, false, matmul.m <= matmul.n, 0, {}, false};
  plan.a = as_lanes(kernel, matmul.a, matmul.m, !matmul.a.transposed, matmul.precision, Side::kLeft);
  plan.b = as_lanes(kernel, matmul.b, matmul.n, matmul.b.transposed, matmul.precision, Side::kRight);

  const double as_is = plan.a.transposed_bytes(matmul.k, Side::kLeft) +
                       plan.b.transposed_bytes(matmul.k, Side::kRight);
  // Swapping the sides also transposes the float32 sums when they are stored.
  const double swapped = plan.a.transposed_bytes(matmul.k, Side::kRight) +
                         plan.b.transposed_bytes(matmul.k, Side::kLeft) +
                         4.0 * static_cast<double>(matmul.m) * matmul.n;
  plan.transposed = swapped < as_is;
  if (plan.transposed) std::swap(plan.a.side, plan.b.side);
  plan.column_blocks = ceil_div(matmul.n, plan.b.panel_lanes());

  const int64_t k_bytes = std::max(plan.a.panel_lanes() * plan.a.element_bytes(),
                                   plan.b.panel_lanes() * plan.b.element_bytes());
  const int64_t depth = round_up(std::max<int64_t>(kernel.blocks.panel_bytes / k_bytes, 1),
                                 kernel.step_depth);
  plan.k_cut = {matmul.k, even_block(matmul.k, std::min<int64_t>(depth, kernel.max_depth),
                                     kernel.step_depth)};
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

// A packed part of the shared operand: `lanes` in the blocks of k [first_block, last_block).
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

// What this thread will probably pack next: to be prefetched.
struct Next {
  Range lanes, k;
};

// A prefetch of `lanes` of the streamed operand in one block of k, beside `blocks` block products.
Prefetch prefetch_of(const Plan& plan, const Range& lanes, const Range& k, int64_t blocks) {
  const Lanes& operand = plan.streamed();
  const PackSource source = operand.from(lanes.first, k.first);
  const int64_t width = source.narrow ? 2 : 4;
  const bool along_k = source.k_stride == 1;
  Prefetch prefetch;
  prefetch.row = static_cast<const char*>(source.data);
  prefetch.row_bytes = (along_k ? k.size : lanes.size) * width;
  prefetch.row_stride = (along_k ? source.lane_stride : source.k_stride) * width;
  prefetch.rows = along_k ? lanes.size : k.size;
  prefetch.lines_per_block =
      ceil_div(prefetch.rows * ceil_div(prefetch.row_bytes, kLineBytes), blocks);
  return prefetch;
}

// A block of the output, from (row, column) on, and its number, counted row by row.
struct Place {
  int64_t row, column;
  int rows, columns;
  int64_t number;
};

// The block of streamed panel p and shared panel q, counted from the operands' first lanes.
Place place_of(const Plan& plan, int64_t p, int64_t q) {
  const int64_t row_block = plan.a_is_shared ? q : p, column_block = plan.a_is_shared ? p : q;
  Place place;
  place.row = row_block * plan.a.panel_lanes();
  place.column = column_block * plan.b.panel_lanes();
  place.rows = static_cast<int>(std::min<int64_t>(plan.matmul.m - place.row, plan.a.panel_lanes()));
  place.columns =
      static_cast<int>(std::min<int64_t>(plan.matmul.n - place.column, plan.b.panel_lanes()));
  place.number = row_block * plan.column_blocks + column_block;
  return place;
}

char* address_of(const Matmul& matmul, const Place& place) {
  const int64_t width = matmul.out_dtype == DType::kBFloat16 ? 2 : 4;
  return static_cast<char*>(matmul.out) +
         (place.row * matmul.out_leading_dimension + place.column) * width;
}

// Asks for the output's lines that finish_block will write: it then finds them in L1.
void prefetch_output(const Plan& plan, const Place& place) {
  const Matmul& matmul = plan.matmul;
  const int64_t width = matmul.out_dtype == DType::kBFloat16 ? 2 : 4;
  const char* row = address_of(matmul, place);
  for (int i = 0; i < place.rows; ++i, row += matmul.out_leading_dimension * width) {
    for (int64_t byte = 0; byte < place.columns * width; byte += kLineBytes) {
      __builtin_prefetch(row + byte, 1);
    }
    __builtin_prefetch(row + place.columns * width - 1, 1);
  }
}

// Writes one block of sums to out. `squares` has one element for each block of out; or it is nullptr.
void finish_block(const Plan& plan, const float* sums, const Place& place, float* squares) {
  const Matmul& matmul = plan.matmul;
  const OutputBlock block = {address_of(matmul, place),
                             matmul.out_leading_dimension,
                             matmul.out_dtype == DType::kBFloat16,
                             matmul.accumulate,
                             matmul.bias == nullptr ? nullptr : matmul.bias + place.column,
                             plan.transposed,
                             plan.stream,
                             squares == nullptr ? nullptr : squares + place.number};
  plan.kernel.finish(block, sums, place.rows, place.columns);
}

void pack(const Plan& plan, const Lanes& operand, const Range& lanes, const Range& k,
          unsigned char* packed) {
  plan.kernel.pack(operand.from(lanes.first, k.first), lanes.size, k.size, operand.side,
                   operand.parts, packed);
}

// Computes one work item: packs its streamed lanes block by block of k and multiplies them with its
// shared lanes.
void compute_item(const Plan& plan, const SharedBlock& shared, const Item& item, const Next& next,
                  const Sums& sums, unsigned char* packed, float* squares) {
  const Kernel& kernel = plan.kernel;
  const Lanes &streamed_lanes = plan.streamed(), &shared_lanes = plan.shared();
  const int64_t p_width = streamed_lanes.panel_lanes(), q_width = shared_lanes.panel_lanes();
  const int64_t p_count = ceil_div(item.streamed.size, p_width);
  const int64_t q_count = ceil_div(item.shared.size, q_width);
  const int64_t q_first = (item.shared.first - shared.lanes.first) / q_width;
  const int64_t p_before = item.streamed.first / p_width, q_before = item.shared.first / q_width;
  const int64_t q_cached = std::max<int64_t>(kernel.blocks.cached_lanes / q_width, 1);
  const bool streamed_is_left = streamed_lanes.side == Side::kLeft;

  if (kernel.configure != nullptr) kernel.configure();
  for (int64_t kb = shared.first_block; kb < shared.last_block; ++kb) {
    const Range k = plan.k_cut[kb];
    const bool last_block = kb + 1 == plan.k_cut.count();
    pack(plan, streamed_lanes, item.streamed, k, packed);
    Prefetch prefetch;
    if (kb + 1 < shared.last_block) {
      prefetch = prefetch_of(plan, item.streamed, plan.k_cut[kb + 1], p_count * q_count);
    } else if (next.lanes.size > 0) {
      prefetch = prefetch_of(plan, next.lanes, next.k, p_count * q_count);
    }

    const int64_t p_bytes = streamed_lanes.panel_bytes(k.size);
    const int64_t q_bytes = shared_lanes.panel_bytes(k.size);
    const unsigned char* shared_panels =
        shared.packed + (kb - shared.first_block) * shared.block_bytes + q_first * q_bytes;
    const auto multiply = [&](int64_t p, int64_t q) {
      const unsigned char* const p_panel = packed + p * p_bytes;
      const unsigned char* const q_panel = shared_panels + q * q_bytes;
      const Place place = place_of(plan, p_before + p, q_before + q);
      if (last_block && !plan.stream) prefetch_output(plan, place);
      PanelBlock block;
      block.left = streamed_is_left ? p_panel : q_panel;
      block.right = streamed_is_left ? q_panel : p_panel;
      block.left_lanes = plan.transposed ? place.columns : place.rows;
      block.right_lanes = plan.transposed ? place.rows : place.columns;
      block.left_parts = streamed_is_left ? streamed_lanes.parts : shared_lanes.parts;
      block.right_parts = streamed_is_left ? shared_lanes.parts : streamed_lanes.parts;
      block.depth = k.size;
      block.sums = sums.at(p, q);
      block.accumulate = kb > 0;
      block.prefetch = &prefetch;
      kernel.multiply(block);
      if (last_block) finish_block(plan, block.sums, place, squares);
    };
    // The wider panel stays in L1, and the narrower ones pass by: fewer bytes for each product.
    for (int64_t q0 = 0; q0 < q_count; q0 += q_cached) {
      const int64_t q1 = std::min(q0 + q_cached, q_count);
      if (p_width >= q_width) {
        for (int64_t p = 0; p < p_count; ++p) {
          for (int64_t q = q0; q < q1; ++q) multiply(p, q);
        }
      } else {
        for (int64_t q = q0; q < q1; ++q) {
          for (int64_t p = 0; p < p_count; ++p) multiply(p, q);
        }
      }
    }
  }
  if (kernel.release != nullptr) kernel.release();
#if defined(__x86_64__)
  // Streaming stores are not ordered with the store that marks this item as done, so wait for them.
  if (plan.stream) _mm_sfence();
#endif
}

// The lanes of either operand in one work item: few enough that every thread gets several items.
Item item_sizes(const Plan& plan, int64_t streamed, int64_t shared, int threads) {
  const BlockSizes& sizes = plan.kernel.blocks;
  const int64_t p_width = plan.streamed().panel_lanes(), q_width = plan.shared().panel_lanes();
  Item item = {{0, std::min(round_up(sizes.item_lanes, p_width), round_up(streamed, p_width))},
               {0, even_block(shared, round_up(sizes.shared_lanes, q_width), q_width)}};
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  while (ceil_div(streamed, item.streamed.size) * ceil_div(shared, item.shared.size) < wanted) {
    if (item.streamed.size >= 2 * p_width && item.streamed.size > 32) {
      item.streamed.size = round_up(item.streamed.size / 2, p_width);
    } else if (item.shared.size >= 2 * q_width && item.shared.size > 64) {
      item.shared.size = round_up(item.shared.size / 2, q_width);
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
  int64_t k_cached;   // those of them that all items multiply before they go on to the next
};

Cuts cut_operands(const Plan& plan) {
  const BlockSizes& sizes = plan.kernel.blocks;
  const int64_t p_width = plan.streamed().panel_lanes(), q_width = plan.shared().panel_lanes();
  const int64_t shared_panels =
      std::max<int64_t>(sizes.shared_bytes / plan.shared().panel_bytes(plan.k_cut.block), 1);
  Cuts cuts;
  cuts.shared = {plan.shared().count,
                 even_block(plan.shared().count, shared_panels * q_width, q_width)};
  const int64_t block_bytes = plan.shared().packed_bytes(cuts.shared.block, plan.k_cut.block);
  cuts.k_at_once =
      even_block(plan.k_cut.count(), std::max<int64_t>(sizes.shared_bytes / block_bytes, 1), 1);
  cuts.k_cached =
      even_block(cuts.k_at_once, std::max<int64_t>(sizes.cached_bytes / block_bytes, 1), 1);
  const int64_t streamed = plan.streamed().count;
  cuts.streamed = {streamed, streamed};
  if (cuts.k_cached < plan.k_cut.count()) {
    const int64_t sums_bytes = ceil_div(cuts.shared.block, q_width) * plan.block_sums() * 4;
    const int64_t panels = std::max<int64_t>(sizes.sums_bytes / sums_bytes, 1);
    cuts.streamed.block = even_block(streamed, panels * p_width, p_width);
  }
  return cuts;
}

// Counts the parts of k that are done of each item, so that an item adds its next part to sums that
// are complete. Parts have rising indices in parallel_for, so the part before has begun already, on a
// thread that is running: waiting for it cannot deadlock. It is rare, as many items lie between.
class PartsDone {
 public:
  explicit PartsDone(int64_t items) : done_(static_cast<size_t>(items)) {}

  // Lasts while a part of an item is computed. Waits first for the part before it.
  class Turn {
   public:
    Turn(PartsDone& parts, int64_t item, int64_t part)
        : done_(parts.done_.empty() ? nullptr : &parts.done_[static_cast<size_t>(item)]) {
      if (done_ == nullptr) return;
      while (done_->load(std::memory_order_acquire) < part) std::this_thread::yield();
    }
    ~Turn() {
      if (done_ != nullptr) done_->fetch_add(1, std::memory_order_release);
    }
    Turn(const Turn&) = delete;

   private:
    std::atomic<int64_t>* const done_;
  };

 private:
  std::vector<std::atomic<int64_t>> done_;
};

}  // namespace

void packed_matmul(const Matmul& matmul, const Kernel& kernel, Executor& executor) {
  const Plan plan = make_plan(matmul, kernel);
  const Cuts cuts = cut_operands(plan);
  const Item size =
      item_sizes(plan, cuts.streamed.block, cuts.shared.block, executor.num_threads());
  const int64_t workers = executor.num_threads();
  const int64_t p_width = plan.streamed().panel_lanes(), q_width = plan.shared().panel_lanes();
  //   sums that wait for                            are kept
  //   a later part of the shared operand            for all items
  //   the next block of k within the item           by each worker
  //   nothing, as k is a single block               in one block of sums for each worker
  const bool sums_wait = cuts.k_cached < plan.k_cut.count();
  const int64_t q_total = ceil_div(cuts.shared.block, q_width);
  const int64_t p_total = ceil_div(cuts.streamed.block, p_width);
  const int64_t q_item = ceil_div(size.shared.size, q_width);
  const int64_t p_item = ceil_div(size.streamed.size, p_width);
  const int64_t block_sums = plan.block_sums();
  const int64_t waiting_sums = sums_wait ? p_total * q_total * block_sums : 0;
  const int64_t worker_sums =
      sums_wait ? 0 : block_sums * (plan.k_cut.count() == 1 ? 1 : p_item * q_item);
  const int64_t shared_block = plan.shared().packed_bytes(cuts.shared.block, plan.k_cut.block);
  const int64_t worker_packed = plan.streamed().packed_bytes(size.streamed.size, plan.k_cut.block);
  const int64_t worker_floats = worker_sums + worker_packed / 4;
  const int64_t blocks = ceil_div(matmul.m, plan.a.panel_lanes()) *
                         ceil_div(matmul.n, plan.b.panel_lanes());
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
        auto* const shared_packed = reinterpret_cast<unsigned char*>(shared_memory);
        const Cut pack_cut = {all_shared.size, round_up(64, q_width), all_shared.first};
        parallel_for(executor, pack_cut.count() * (last_block - kb), [&](int64_t index) {
          const Range lanes = pack_cut[index % pack_cut.count()];
          const int64_t block = index / pack_cut.count();
          const Range k = plan.k_cut[kb + block];
          pack(plan, plan.shared(), lanes, k,
               shared_packed + block * shared_block +
                   plan.shared().packed_bytes(lanes.first - all_shared.first, k.size));
        });

        const Cut streamed_cut = {all_streamed.size, size.streamed.size, all_streamed.first};
        const Cut shared_cut = {all_shared.size, size.shared.size, all_shared.first};
        const int64_t count = streamed_cut.count() * shared_cut.count();
        const Cut parts = {last_block - kb, cuts.k_cached, kb};
        PartsDone done(sums_wait ? count : 0);
        // One part of k after another, so that it stays in L2 while all lanes pass by.
        parallel_for_with_workers(executor, parts.count() * count, [&](int64_t index, int worker) {
          const int64_t part = index / count, number = index % count;
          const auto lanes_of = [&](int64_t i) { return streamed_cut[i / shared_cut.count()]; };
          const Range blocks = parts[part];
          const SharedBlock shared = {all_shared, blocks.first, blocks.first + blocks.size,
                                      shared_packed + (blocks.first - kb) * shared_block,
                                      shared_block};
          const Item item = {lanes_of(number), shared_cut[number % shared_cut.count()]};
          Next next = {{0, 0}, {0, 0}};
          if (const int64_t after = index + workers; after < parts.count() * count) {
            next = {lanes_of(after % count), plan.k_cut[parts[after / count].first]};
          }
          float* const own = worker_memory + worker * worker_floats;
          Sums sums = {own + worker_packed / 4, q_item * block_sums, block_sums};
          if (sums_wait) {
            sums = {workspace.data(), q_total * block_sums, block_sums};
            sums.data = sums.at((item.streamed.first - all_streamed.first) / p_width,
                                (item.shared.first - all_shared.first) / q_width);
          } else if (plan.k_cut.count() == 1) {
            sums.p_stride = sums.q_stride = 0;
          }
          const PartsDone::Turn turn(done, number, part);
          compute_item(plan, shared, item, next, sums, reinterpret_cast<unsigned char*>(own),
                       squares);
        });
      }
    }
  }
  if (matmul.sum_of_squares == nullptr) return;
  *matmul.sum_of_squares = 0;
  for (int64_t i = 0; i < block_squares; ++i) *matmul.sum_of_squares += squares[i];
}

}  // namespace gpt2_jax

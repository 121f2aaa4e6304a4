// CUDA kernels of the training step, compiled by NVRTC for the sizes of one model: constants in
// capitals are defined by the caller. Arrays are row-major and bfloat16, or float32 where they are of
// floats. Sums are float32.
//
// No header is included, so that NVRTC alone can compile this. Consecutive addresses of the caller's are
// one array where a kernel takes a structure of pointers.

// Eight bfloat16 numbers, the 16 bytes that a thread loads and stores at once. Of each word the lower
// half is the first number.
struct alignas(16) Eight {
  unsigned words[4];
};

__device__ inline void unpack(const Eight& packed, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(packed.words[i] << 16);
    values[2 * i + 1] = __uint_as_float(packed.words[i] & 0xffff0000u);
  }
}

__device__ inline void add(const Eight& packed, float (&values)[8]) {
  float more[8];
  unpack(packed, more);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] += more[i];
}

__device__ inline Eight packed(const float (&values)[8]) {
  Eight result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
        : "=r"(result.words[i])
        : "f"(values[2 * i + 1]), "f"(values[2 * i]));
  }
  return result;
}

// Loads what is read once, so that it does not push out of the cache what is read again.
__device__ inline Eight load_once(const Eight* from) {
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from));
  return {{words.x, words.y, words.z, words.w}};
}

__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
  }
  return x;
}

#ifdef CLASSIFIER
// The cross-entropy of each row of logits (R, V), and SCALE times its gradient by them, which may be
// written over the logits. One block a row, which is read once and waits in shared memory.
//
// Columns from TRUE_V on are padding: no probability, and no gradient.
constexpr int kWarps = THREADS / 32;
constexpr int kVectors = V / 8;

template <typename Combine>
__device__ float block_reduce(float x, float* scratch, Combine combine, float (*warp_reduce)(float)) {
  x = warp_reduce(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) x = combine(x, scratch[i]);
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
softmax_cross_entropy(const Eight* logits, const int* targets, float* losses, Eight* gradient) {
  extern __shared__ Eight row[];
  __shared__ float maxima[kWarps], sums[kWarps];
  constexpr float kLog2e = 1.4426950408889634f;
  const size_t start = static_cast<size_t>(blockIdx.x) * kVectors;
  // Each thread reads back only what it has copied itself, so no barrier is needed for the row.
  for (int i = threadIdx.x; i < kVectors; i += THREADS) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row + i));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(logits + start + i));
  }
  asm volatile("cp.async.wait_all;" ::: "memory");

  const int target = targets[blockIdx.x];
  float maximum = __int_as_float(0xff800000);  // -infinity
  for (int i = threadIdx.x; i < kVectors; i += THREADS) {
    float values[8];
    unpack(row[i], values);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (8 * i + j < TRUE_V) maximum = fmaxf(maximum, values[j]);
    }
  }
  maximum = block_reduce(maximum, maxima, [](float a, float b) { return fmaxf(a, b); }, warp_max);
  const float shift = maximum * kLog2e;
  float sum = 0;
  for (int i = threadIdx.x; i < kVectors; i += THREADS) {
    float values[8];
    unpack(row[i], values);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (8 * i + j < TRUE_V) sum += exp2_approximate(values[j] * kLog2e - shift);
    }
  }
  sum = block_reduce(sum, sums, [](float a, float b) { return a + b; }, warp_sum);
  const float factor = SCALE / sum;
  for (int i = threadIdx.x; i < kVectors; i += THREADS) {
    float values[8];
    unpack(row[i], values);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = 8 * i + j;
      if (column == target) losses[blockIdx.x] = logf(sum) + maximum - values[j];
      values[j] = column < TRUE_V ? factor * exp2_approximate(values[j] * kLog2e - shift) : 0.0f;
      if (column == target) values[j] -= SCALE;
    }
    gradient[start + i] = packed(values);
  }
}
#endif

#ifdef LAYER_NORM
// Rows of C channels, one warp a row: n = (x - mean) / deviation, and 1 / deviation. With AFFINE also
// gain * n + shift.
constexpr int kPerLane = (C / 8 + 31) / 32;

__device__ inline void load_channels(const float4* from, int vector, float (&values)[8]) {
  const float4 low = from[2 * vector], high = from[2 * vector + 1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm(const Eight* x,
#if AFFINE
           const float4* gain, const float4* shift,
#endif
           Eight* normed, float* reciprocals
#if AFFINE
           , Eight* result
#endif
) {
  const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= ROWS) return;
  const size_t start = static_cast<size_t>(row) * (C / 8);
  float values[kPerLane][8];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int vector = lane + 32 * i;
    if (vector < C / 8) {
      unpack(x[start + vector], values[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += values[i][j];
    }
  }
  const float mean = warp_sum(sum) * (1.0f / C);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < C / 8) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[i][j] -= mean;
        squares += values[i][j] * values[i][j];
      }
    }
  }
  const float reciprocal = rsqrtf(warp_sum(squares) * (1.0f / C) + EPSILON);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int vector = lane + 32 * i;
    if (vector < C / 8) {
#pragma unroll
      for (int j = 0; j < 8; ++j) values[i][j] *= reciprocal;
      normed[start + vector] = packed(values[i]);
#if AFFINE
      float gains[8], shifts[8];
      load_channels(gain, vector, gains);
      load_channels(shift, vector, shifts);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[i][j] = values[i][j] * gains[j] + shifts[j];
      result[start + vector] = packed(values[i]);
#endif
    }
  }
  if (lane == 0) reciprocals[row] = reciprocal;
}

// The cotangent of x from that of the normed rows n, plus the cotangent that reached x around the norm:
// dx = dresidual + (d - mean(d) - n mean(d n)) / deviation. d is the sum of PARTS arguments; with AFFINE
// they add up to the cotangent of gain * n + shift. Each block writes column sums of its own rows to its
// part of `sums`: those of dx, and with AFFINE those of d / gain times n and of d / gain, which are the
// gradients of gain and shift.
constexpr int kSums = AFFINE ? 3 : 1;

struct Parts {
  const Eight* of[PARTS];
};

extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm_backward(const Eight* normed, const float* reciprocals, const Eight* dresidual,
#if AFFINE
                    const float4* gain,
#endif
                    const __grid_constant__ Parts parts, Eight* dx, float* sums) {
  constexpr int kWarpsOfBlock = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float totals[kSums][kPerLane][8] = {};
  for (int row = blockIdx.x * kWarpsOfBlock + warp; row < ROWS; row += gridDim.x * kWarpsOfBlock) {
    const size_t start = static_cast<size_t>(row) * (C / 8);
    float n[kPerLane][8], d[kPerLane][8];
    Eight residual[kPerLane];
    float sum = 0, product = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int vector = lane + 32 * i;
      if (vector < C / 8) {
        unpack(load_once(normed + start + vector), n[i]);
        unpack(load_once(parts.of[0] + start + vector), d[i]);
#pragma unroll
        for (int part = 1; part < PARTS; ++part) {
          add(load_once(parts.of[part] + start + vector), d[i]);
        }
        residual[i] = load_once(dresidual + start + vector);
#if AFFINE
        float gains[8];
        load_channels(gain, vector, gains);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          totals[1][i][j] += d[i][j] * n[i][j];
          totals[2][i][j] += d[i][j];
          d[i][j] *= gains[j];
        }
#endif
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sum += d[i][j];
          product += d[i][j] * n[i][j];
        }
      }
    }
    const float mean = warp_sum(sum) * (1.0f / C), correlation = warp_sum(product) * (1.0f / C);
    const float reciprocal = reciprocals[row];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int vector = lane + 32 * i;
      if (vector < C / 8) {
        float values[8];
        unpack(residual[i], values);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          values[j] += (d[i][j] - mean - n[i][j] * correlation) * reciprocal;
        }
        const Eight rounded = packed(values);
        dx[start + vector] = rounded;
        add(rounded, totals[0][i]);
      }
    }
  }
  // The warps add in their order, so that the bits of a sum are the same in every run.
  __shared__ float of_block[kSums][C];
  for (int turn = 0; turn < kWarpsOfBlock; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int vector = lane + 32 * i;
        if (vector < C / 8) {
#pragma unroll
          for (int which = 0; which < kSums; ++which) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              float& total = of_block[which][8 * vector + j];
              total = turn == 0 ? totals[which][i][j] : total + totals[which][i][j];
            }
          }
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kSums * C; i += THREADS) {
    sums[static_cast<size_t>(blockIdx.x) * kSums * C + i] = of_block[i / C][i % C];
  }
}
#endif

#ifdef FOLD
// A linear layer of OUTPUTS rows of C weights behind a norm, in PARTS equal parts of its rows: of
// gain * n + shift it is that of n with the weight times gain, and the bias plus the weight times shift.
constexpr int kRowsOfPart = OUTPUTS / PARTS;

struct Folded {
  Eight* weight[PARTS];
  unsigned short* bias[PARTS];
};

// One warp a row.
extern "C" __global__ void __launch_bounds__(THREADS)
fold(const float4* weight, const float* bias, const float4* gain, const float4* shift,
     const __grid_constant__ Folded folded) {
  const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= OUTPUTS) return;
  const int part = row / kRowsOfPart, row_of_part = row % kRowsOfPart;
  const float4* from = weight + static_cast<size_t>(row) * (C / 4);
  Eight* to = folded.weight[part] + static_cast<size_t>(row_of_part) * (C / 8);
  float sum = 0;
#pragma unroll
  for (int vector = lane; vector < C / 8; vector += 32) {
    float values[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 w = from[2 * vector + half], g = gain[2 * vector + half];
      const float4 s = shift[2 * vector + half];
      sum += w.x * s.x + w.y * s.y + w.z * s.z + w.w * s.w;
      values[4 * half] = w.x * g.x, values[4 * half + 1] = w.y * g.y;
      values[4 * half + 2] = w.z * g.z, values[4 * half + 3] = w.w * g.w;
    }
    to[vector] = packed(values);
  }
  const float both[8] = {bias[row] + warp_sum(sum)};
  if (lane == 0) folded.bias[part][row_of_part] = static_cast<unsigned short>(packed(both).words[0]);
}

// The gradients of weight (written over `gradient`, or added to it with ACCUMULATE), gain and shift, from
// those of the folded weight and the bias:
//   dweight = dfolded * gain + dbias shift,  dgain = sum of dfolded * weight over the rows,
//   dshift = sum of dbias * weight over the rows.
// CLUSTER blocks share kColumns columns, and add their sums in their order.
constexpr int kColumns = 32, kLanes = kColumns / 4, kRowsAtOnce = THREADS / kLanes;

struct Gradients {
  const uint2* folded[PARTS];
  const float* bias[PARTS];
};

__device__ inline void cluster_barrier() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// A number in the shared memory of another block of the cluster, at the place where `own` is in this one.
__device__ inline float of_block(const float* own, int block) {
#if CLUSTER > 1
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(own));
  float result;
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %1, %2;\n\t"
      "ld.shared::cluster.f32 %0, [there];\n\t}"
      : "=f"(result)
      : "r"(address), "r"(block)
      : "memory");
  return result;
#else
  return *own;
#endif
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER)
#endif
__launch_bounds__(THREADS)
unfold(const float4* weight, const float4* gain, const float4* shift, const float4* earlier,
       const __grid_constant__ Gradients gradients, float4* gradient, float* dgain,
       float* dshift) {
  const int first = blockIdx.x / CLUSTER * kColumns, block = blockIdx.x % CLUSTER;
  const int lane = threadIdx.x % kLanes, turn = threadIdx.x / kLanes;
  const int column = first / 4 + lane;  // of four
  float totals[8] = {};                 // of gain, then of shift
  if (column < C / 4) {
    const float4 g = gain[column], s = shift[column];
#pragma unroll 4
    for (int row = block * kRowsAtOnce + turn; row < OUTPUTS; row += CLUSTER * kRowsAtOnce) {
      const int part = row / kRowsOfPart, row_of_part = row % kRowsOfPart;
      const size_t place = static_cast<size_t>(row) * (C / 4) + column;
      const uint2 words =
          gradients.folded[part][static_cast<size_t>(row_of_part) * (C / 4) + column];
      const float d[4] = {__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xffff0000u),
                          __uint_as_float(words.y << 16), __uint_as_float(words.y & 0xffff0000u)};
      const float b = gradients.bias[part][row_of_part];
      const float4 w = weight[place];
      float4 result = {d[0] * g.x + b * s.x, d[1] * g.y + b * s.y, d[2] * g.z + b * s.z,
                       d[3] * g.w + b * s.w};
#if ACCUMULATE
      const float4 before = earlier[place];
      result.x += before.x, result.y += before.y, result.z += before.z, result.w += before.w;
#endif
      gradient[place] = result;
      const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        totals[i] += d[i] * weights[i];
        totals[4 + i] += b * weights[i];
      }
    }
  }
  constexpr int kWarps = THREADS / 32;
  __shared__ float of_warps[kWarps][kLanes * 8], of_rows[kLanes * 8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int offset = 16; offset >= kLanes; offset /= 2) {
      totals[i] += __shfl_xor_sync(0xffffffff, totals[i], offset);
    }
    if (threadIdx.x % 32 < kLanes) of_warps[threadIdx.x / 32][8 * lane + i] = totals[i];
  }
  __syncthreads();
  if (threadIdx.x < 8 * kLanes) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp][threadIdx.x];
    of_rows[threadIdx.x] = sum;
  }
  cluster_barrier();
  if (block == 0 && threadIdx.x < 8 * kLanes) {
    float sum = 0;
#pragma unroll
    for (int other = 0; other < CLUSTER; ++other) sum += of_block(of_rows + threadIdx.x, other);
    const int number = threadIdx.x % 8, at = first + threadIdx.x / 8 * 4 + number % 4;
    if (at < C) (number < 4 ? dgain : dshift)[at] = sum;
  }
  cluster_barrier();  // until then the blocks' shared memory must stay
}
#endif

// CUDA kernels of the training step, compiled by NVRTC for the sizes of one model: constants in
// capitals are defined by the caller. Arrays are row-major and bfloat16, or float32 where they are of
// floats. Sums are float32.
//
// No header is included, so that NVRTC alone can compile this.

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
// Rows of C channels, one warp a row: (x - mean) / deviation, and 1 / deviation.
constexpr int kPerLane = (C / 8 + 31) / 32;

extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm(const Eight* x, Eight* normed, float* reciprocals) {
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
    }
  }
  if (lane == 0) reciprocals[row] = reciprocal;
}

// The cotangent of x from that of the normed rows n, plus the cotangent that reached x around the norm:
// dx = dresidual + (d - mean(d) - n mean(d n)) / deviation. d is the sum of the first PARTS of three
// arguments. Each block writes the column sums of its own rows of dx to its row of `sums`.
extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm_backward(const Eight* normed, const float* reciprocals, const Eight* dresidual,
                    const Eight* d0, const Eight* d1, const Eight* d2, Eight* dx, float* sums) {
  constexpr int kWarpsOfBlock = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float totals[kPerLane][8] = {};
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
        unpack(load_once(d0 + start + vector), d[i]);
        if (PARTS > 1) add(load_once(d1 + start + vector), d[i]);
        if (PARTS > 2) add(load_once(d2 + start + vector), d[i]);
        residual[i] = load_once(dresidual + start + vector);
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
        add(rounded, totals[i]);
      }
    }
  }
  // The warps add in their order, so that the bits of a sum are the same in every run.
  __shared__ float of_block[C];
  for (int turn = 0; turn < kWarpsOfBlock; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int vector = lane + 32 * i;
        if (vector < C / 8) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float& total = of_block[8 * vector + j];
            total = turn == 0 ? totals[i][j] : total + totals[i][j];
          }
        }
      }
    }
    __syncthreads();
  }
  for (int column = threadIdx.x; column < C; column += THREADS) {
    sums[static_cast<size_t>(blockIdx.x) * C + column] = of_block[column];
  }
}
#endif

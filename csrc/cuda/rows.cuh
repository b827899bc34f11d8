// Rows of numbers held by groups of threads, for LayerNorm: how they are spread, summed, and how
// the gradients of weight and bias leave a block.
#pragma once

#include "numbers.cuh"

namespace videoswin {

// A row in the registers of LANES threads: STEPS vectors of COUNT numbers in each. Lane by lane a
// vector, then step by step, so that neighbours read neighbouring memory.
template <int LANES_, int STEPS_, int COUNT_>
struct Layout {
  static constexpr int LANES = LANES_, STEPS = STEPS_, COUNT = COUNT_;
  static constexpr int THREADS = LANES > 128 ? LANES : 128;
  static constexpr int ROWS = THREADS / LANES;
  static constexpr int WARPS = THREADS / 32;
  static constexpr int WIDEST_ROW = LANES * STEPS * COUNT;
};

// A group of threads with its row. What its threads call, all threads of the block call.
template <typename L>
struct Group {
  // Shared memory that `sum` needs, in floats.
  static constexpr int SCRATCH = L::LANES > 32 ? 2 * 2 * L::WARPS : 0;

  float* scratch;
  int turn = 0;

  __device__ explicit Group(float* scratch) : scratch(scratch) {}
  __device__ static int row() { return threadIdx.x / L::LANES; }
  __device__ static int lane() { return threadIdx.x % L::LANES; }
  __device__ static int at(int step) { return (step * L::LANES + lane()) * L::COUNT; }

  // The sums of two numbers over the row's threads, for each of them.
  __device__ __forceinline__ void sum(float& a, float& b) {
#pragma unroll
    for (int step = (L::LANES < 32 ? L::LANES : 32) / 2; step > 0; step /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, step);
      b += __shfl_xor_sync(0xffffffffu, b, step);
    }
    if constexpr (L::LANES > 32) {
      // Two scratches in turn: a warp that is ahead writes where nobody still reads.
      float* const mine = scratch + turn * 2 * L::WARPS;
      turn = 1 - turn;
      if (threadIdx.x % 32 == 0) {
        mine[2 * (threadIdx.x / 32)] = a;
        mine[2 * (threadIdx.x / 32) + 1] = b;
      }
      __syncthreads();
      a = b = 0;
      for (int warp = 0; warp < L::WARPS; ++warp) {
        a += mine[2 * warp];
        b += mine[2 * warp + 1];
      }
    }
  }

  __device__ __forceinline__ float sum(float a) {
    float unused = 0;
    sum(a, unused);
    return a;
  }
};

// A vector of numbers, or of zeros where it is not inside.
template <int COUNT>
__device__ __forceinline__ Packed<COUNT> load_or_zero(Input from, int64_t at, bool is_inside) {
  Packed<COUNT> packed;
  if (is_inside) packed.load(from, at);
  return packed;
}

// The sum of a vector in a tree, which is nearer to the truth, and sooner there, than a chain.
template <int COUNT>
__device__ __forceinline__ float sum_of(float (&value)[COUNT]) {
#pragma unroll
  for (int apart = COUNT / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int i = 0; i < apart; ++i) value[i] += value[i + apart];
  }
  return value[0];
}

// LayerNorm of the row in `value`, which is zero beyond its end: what `store(step, values)` gets.
// Returns mean and 1 / deviation of the row.
template <typename L, typename Store>
__device__ __forceinline__ float2 normalise(Group<L>& group,
                                            const float (&value)[L::STEPS][L::COUNT], Input weight,
                                            Input bias, int width, float eps, Store store) {
  float sums[L::COUNT] = {}, squares[L::COUNT] = {};
#pragma unroll
  for (int step = 0; step < L::STEPS; ++step) {
#pragma unroll
    for (int i = 0; i < L::COUNT; ++i) sums[i] += value[step][i];
  }
  const float mean = group.sum(sum_of(sums)) / width;
#pragma unroll
  for (int step = 0; step < L::STEPS; ++step) {
#pragma unroll
    for (int i = 0; i < L::COUNT; ++i) {
      const float centred = group.at(step) < width ? value[step][i] - mean : 0;
      squares[i] = fmaf(centred, centred, squares[i]);
    }
  }
  const float rstd = 1 / sqrtf(group.sum(sum_of(squares)) / width + eps);
#pragma unroll
  for (int step = 0; step < L::STEPS; ++step) {
    if (group.at(step) >= width) continue;
    Packed<L::COUNT> packed;
    float w[L::COUNT], b[L::COUNT];
    packed.load(weight, group.at(step));
    packed.unpack(weight.type, w);
    packed.load(bias, group.at(step));
    packed.unpack(bias.type, b);
#pragma unroll
    for (int i = 0; i < L::COUNT; ++i) {
      w[i] = fmaf((value[step][i] - mean) * rstd, w[i], b[i]);
    }
    store(step, w);
  }
  return float2{mean, rstd};
}

// The gradients of LayerNorm over the rows that a group walks.
template <typename L>
struct NormGradient {
  float weight[L::STEPS][L::COUNT] = {};
  float bias[L::STEPS][L::COUNT] = {};

  // From `up`, the gradient of the norm, and the normalised row, both zero beyond its end: adds to
  // the gradients of weight and bias, and leaves in `up` the gradient of the row.
  __device__ __forceinline__ void add(Group<L>& group, float (&up)[L::STEPS][L::COUNT],
                                      const float (&normed)[L::STEPS][L::COUNT], Input weights,
                                      int width, float rstd) {
    float alongs[L::COUNT] = {}, acrosses[L::COUNT] = {};
#pragma unroll
    for (int step = 0; step < L::STEPS; ++step) {
      float w[L::COUNT];
      load_or_zero<L::COUNT>(weights, group.at(step), group.at(step) < width)
          .unpack(weights.type, w);
#pragma unroll
      for (int i = 0; i < L::COUNT; ++i) {
        weight[step][i] = fmaf(up[step][i], normed[step][i], weight[step][i]);
        bias[step][i] += up[step][i];
        up[step][i] *= w[i];
        alongs[i] = fmaf(up[step][i], normed[step][i], alongs[i]);
        acrosses[i] += up[step][i];
      }
    }
    float along = sum_of(alongs), across = sum_of(acrosses);
    group.sum(along, across);
    along /= width;
    across /= width;
#pragma unroll
    for (int step = 0; step < L::STEPS; ++step) {
#pragma unroll
      for (int i = 0; i < L::COUNT; ++i) {
        up[step][i] = (up[step][i] - across - along * normed[step][i]) * rstd;
      }
    }
  }

  // Writes the block's sums to partial [2, width]: over groups of a warp, then over warps.
  __device__ __forceinline__ void store(Group<L>& group, float* partial, int width, float* shared) {
#pragma unroll
    for (int step = 0; step < L::STEPS; ++step) {
#pragma unroll
      for (int i = 0; i < L::COUNT; ++i) {
#pragma unroll
        for (int apart = L::LANES; apart < 32; apart *= 2) {
          weight[step][i] += __shfl_xor_sync(0xffffffffu, weight[step][i], apart);
          bias[step][i] += __shfl_xor_sync(0xffffffffu, bias[step][i], apart);
        }
      }
    }
    // Rows that take several warps take all: there is one set of sums, and it may leave at once.
    constexpr bool IS_ALONE = L::LANES > 32;
    const int warp = threadIdx.x / 32;
    float* const to = IS_ALONE ? partial : shared + 2 * width * warp;
    if (IS_ALONE || threadIdx.x % 32 < L::LANES) {
#pragma unroll
      for (int step = 0; step < L::STEPS; ++step) {
        if (group.at(step) >= width) continue;
#pragma unroll
        for (int i = 0; i < L::COUNT; ++i) {
          to[group.at(step) + i] = weight[step][i];
          to[width + group.at(step) + i] = bias[step][i];
        }
      }
    }
    if constexpr (!IS_ALONE) {
      __syncthreads();
      for (int column = threadIdx.x; column < 2 * width; column += L::THREADS) {
        float sum = 0;
        for (int other = 0; other < L::WARPS; ++other) sum += shared[2 * width * other + column];
        partial[column] = sum;
      }
    }
  }

  // Shared memory that `store` needs, in floats.
  static constexpr int scratch(int width) { return L::LANES > 32 ? 0 : 2 * width * L::WARPS; }
};

// Calls run(layout) with the narrowest layout of a list that holds a row, else with the last.
template <typename First, typename... Others, typename Run>
int with_narrowest(int64_t width, Run run) {
  if constexpr (sizeof...(Others) > 0) {
    if (width > First::WIDEST_ROW) return with_narrowest<Others...>(width, run);
  }
  return run(First{});
}

// The layout of a row of `width` numbers that is made of pieces of `piece`. Backward, where a
// thread also keeps two sums for each of its columns, a row is spread wider.
template <typename Run>
int with_forward_layout(int64_t width, int64_t piece, Run run) {
  if (piece % 8 != 0) return with_narrowest<Layout<32, 4, 1>, Layout<512, 10, 1>>(width, run);
  return with_narrowest<Layout<4, 4, 8>, Layout<8, 4, 8>, Layout<16, 4, 8>, Layout<32, 4, 8>,
                        Layout<128, 4, 8>, Layout<256, 4, 8>>(width, run);
}

template <typename Run>
int with_backward_layout(int64_t width, int64_t piece, Run run) {
  if (piece % 8 != 0) return with_narrowest<Layout<32, 4, 1>, Layout<512, 10, 1>>(width, run);
  return with_narrowest<Layout<8, 2, 8>, Layout<16, 2, 8>, Layout<32, 2, 8>, Layout<32, 4, 8>,
                        Layout<128, 4, 8>, Layout<256, 4, 8>>(width, run);
}

// Bytes of shared memory of a backward kernel, which never needs both at once.
template <typename L>
size_t backward_shared(int64_t width) {
  const int64_t sums = NormGradient<L>::scratch(static_cast<int>(width));
  return sizeof(float) * static_cast<size_t>(sums > Group<L>::SCRATCH ? sums : Group<L>::SCRATCH);
}

}  // namespace videoswin

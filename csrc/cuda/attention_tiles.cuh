// What the attention kernels share: rows of a head in shared memory, gathered from the tokens of a
// window, and products of them in tiles of 16 x 8.
//
// Of a tile, lane 4 g + p holds four numbers, as mma.sync leaves them: columns 2 p and 2 p + 1 of
// row g, then those of row g + 8. float32 has no tensor cores that would compute it exactly; its
// products are the threads' own, in the same places, so that a kernel is written once.
#pragma once

#include <cmath>
#include <type_traits>

#include "common.cuh"
#include "operators.h"

namespace videoswin {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float MASKED = -100;
constexpr unsigned ALL_LANES = 0xffffffffu;
// What a block may ask for on each of sm_80 to sm_120.
constexpr int SHARED_BYTES = 96 << 10;
constexpr int MOST_WARPS = 4;

__device__ __forceinline__ int lane_group() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int lane_pair() { return threadIdx.x % 4; }
// First of the 16 rows that are the warp's.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * 16; }
// Threads of a row are four neighbours.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = max(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return max(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Rows of E numbers in shared memory. Pieces of 16 bytes are exchanged within a row, so that of 8
// rows the same piece lies in different banks.
template <typename T, int E>
struct Rows {
  static constexpr int BYTES = E * sizeof(T), PIECES = BYTES / 16;
  static constexpr int ROWS_OF_A_LINE = PIECES < 8 ? 8 / PIECES : 1;
  static constexpr int TURNS = PIECES < 8 ? PIECES : 8;

  unsigned char* data;

  __device__ __forceinline__ unsigned char* at(int row, int piece) const {
    return data + row * BYTES + (piece ^ (row / ROWS_OF_A_LINE % TURNS)) * 16;
  }
};

// Rows of a clip's tokens in device memory, of one head. A pad is a row of its own, or zeros.
template <typename T>
struct TokenRows {
  const T* first;
  int stride;
  const T* pad;

  // Computed here, once: a compiler short of registers would do it again for every row.
  __device__ __forceinline__ TokenRows(const T* first, int64_t stride, const T* pad)
      : first(kept(first)), stride(static_cast<int>(stride)), pad(kept(pad)) {}

  __device__ __forceinline__ const T* at(int token) const {
    return first + static_cast<int64_t>(token) * stride;
  }
};

// Begins to copy `count` places of a window, of one tensor or more side by side: to rows, from
// tokens, and so on. What is beyond the window's `tokens` places gets zeros.
template <typename T, int E, typename... More>
__device__ __forceinline__ void gather(const int32_t* source, int place, int count, int tokens,
                                       Rows<T, E> to, const TokenRows<T>& from,
                                       const More&... more) {
  constexpr unsigned PIECES = Rows<T, E>::PIECES, NUMBERS = 16 / sizeof(T);
  source = kept(source + place);
  for (unsigned i = threadIdx.x; i < count * PIECES; i += blockDim.x) {
    const int row = i / PIECES, piece = i % PIECES;
    const bool is_place = place + row < tokens;
    const int token = is_place ? source[row] : -1;
    const auto copy = [&](const auto& self, Rows<T, E> rows, const TokenRows<T>& tensor,
                          const auto&... others) {
      const bool is_valid = token >= 0 || (is_place && tensor.pad);
      const T* const start = token < 0 && is_valid ? tensor.pad : tensor.at(max(token, 0));
      copy_async_16(rows.at(row, piece), start + piece * NUMBERS, is_valid);
      if constexpr (sizeof...(others) > 0) self(self, others...);
    };
    copy(copy, to, from, more...);
  }
}

// 16 rows as the left factor of products.
template <typename T, int E>
struct Left {
  uint32_t part[E / 16][4];

  __device__ __forceinline__ void load(Rows<T, E> rows, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < E / 16; ++k) {
      load_matrix_x4(part[k], rows.at(first + lane % 16, 2 * k + lane / 16));
    }
  }
};

template <int E>
struct Left<float, E> {
  Rows<float, E> rows;
  int first;

  __device__ __forceinline__ void load(Rows<float, E> from, int row) {
    rows = from;
    first = row;
  }
};

template <typename T>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t low,
                                              uint32_t high) {
  const uint32_t b[2] = {low, high};
  mma_m16n8k16<T>(d, a, b);
}

// d[i, j] += left[i] . right[j], over 8 * TILES rows of `right`.
template <int TILES, typename T, int E>
__device__ __forceinline__ void multiply_rows(float (&d)[TILES][4], const Left<T, E>& left,
                                              Rows<T, E> right) {
  const int lane = threadIdx.x % 32;
  uint32_t b[4];
  if constexpr (E == 16) {
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
      load_matrix_x4(b, right.at((n + lane / 16) * 8 + lane % 8, lane / 8 % 2));
      multiply_tile<T>(d[n], left.part[0], b[0], b[1]);
      multiply_tile<T>(d[n + 1], left.part[0], b[2], b[3]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int k = 0; k < E / 16; k += 2) {
        load_matrix_x4(b, right.at(n * 8 + lane % 8, 2 * k + lane / 8));
        multiply_tile<T>(d[n], left.part[k], b[0], b[1]);
        multiply_tile<T>(d[n], left.part[k + 1], b[2], b[3]);
      }
    }
  }
}

template <int TILES, int E>
__device__ __forceinline__ void multiply_rows(float (&d)[TILES][4], const Left<float, E>& left,
                                              Rows<float, E> right) {
  const auto vector = [](Rows<float, E> rows, int row, int piece) {
    return *reinterpret_cast<const float4*>(rows.at(row, piece));
  };
  const auto add = [](float& sum, float4 a, float4 b) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
  };
#pragma unroll 2
  for (int piece = 0; piece < Rows<float, E>::PIECES; ++piece) {
    const float4 above = vector(left.rows, left.first + lane_group(), piece);
    const float4 below = vector(left.rows, left.first + lane_group() + 8, piece);
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const float4 even = vector(right, n * 8 + 2 * lane_pair(), piece);
      const float4 odd = vector(right, n * 8 + 2 * lane_pair() + 1, piece);
      add(d[n][0], above, even);
      add(d[n][1], above, odd);
      add(d[n][2], below, even);
      add(d[n][3], below, odd);
    }
  }
}

// d[i, c] += sum over j of weights[i, j] * rows[j, c], the weights rounded to T.
template <int TILES, typename T, int E>
__device__ __forceinline__ void multiply_weights(float (&d)[E / 8][4],
                                                 const float (&weights)[TILES][4],
                                                 Rows<T, E> rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < TILES; n += 2) {
    const float (&left)[4] = weights[n], (&right)[4] = weights[n + 1];
    const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                           pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
    for (int c = 0; c < E / 8; c += 2) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, rows.at(n * 8 + lane % 16, c + lane / 16));
      multiply_tile<T>(d[c], a, b[0], b[1]);
      multiply_tile<T>(d[c + 1], a, b[2], b[3]);
    }
  }
}

template <int TILES, int E>
__device__ __forceinline__ void multiply_weights(float (&d)[E / 8][4],
                                                 const float (&weights)[TILES][4],
                                                 Rows<float, E> rows) {
  const int lane = threadIdx.x % 32, pair = lane_pair();
  // A sum of its own for these rows: one chain over all of a window would round too often.
  float sum[E / 8][4] = {};
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    // Of all eight rows of a wide head, nvcc 13.2 to 13.5 load the pieces at once, and spill.
#pragma unroll(E == 64 ? 4 : 8)
    for (int j = 0; j < 8; ++j) {
      const int holder = (lane & ~3) | j / 2;
      const float above = __shfl_sync(ALL_LANES, weights[n][j % 2], holder);
      const float below = __shfl_sync(ALL_LANES, weights[n][2 + j % 2], holder);
#pragma unroll
      for (int c = 0; c < E / 8; ++c) {
        const unsigned char* const piece = rows.at(n * 8 + j, 2 * c + pair / 2);
        const float2 value = *reinterpret_cast<const float2*>(piece + pair % 2 * 8);
        sum[c][0] = fmaf(above, value.x, sum[c][0]);
        sum[c][1] = fmaf(above, value.y, sum[c][1]);
        sum[c][2] = fmaf(below, value.x, sum[c][2]);
        sum[c][3] = fmaf(below, value.y, sum[c][3]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < E / 8; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[c][i] += sum[c][i];
  }
}

// Of four lanes each word j becomes that of lane j which its own lane numbers.
__device__ __forceinline__ void transpose_words(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool is_upper = (lane_pair() & step) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t given = is_upper ? word[j] : word[j | step];
      const uint32_t taken = __shfl_xor_sync(ALL_LANES, given, step);
      (is_upper ? word[j] : word[j | step]) = taken;
    }
  }
}

// Row g, or g + 8, of E / 8 tiles, times a factor and rounded to T. All lanes call it.
template <typename T, int E>
__device__ __forceinline__ void store_row(T* to, bool is_stored, const float (&tile)[E / 8][4],
                                          int half, float factor) {
  const int pair = 2 * lane_pair();
  if constexpr (std::is_same_v<T, float>) {
    if (!is_stored) return;
#pragma unroll
    for (int c = 0; c < E / 8; ++c) {
      *reinterpret_cast<float2*>(to + 8 * c + pair) =
          float2{tile[c][2 * half] * factor, tile[c][2 * half + 1] * factor};
    }
  } else {
    uint32_t word[E / 8];
#pragma unroll
    for (int c = 0; c < E / 8; ++c) {
      word[c] = pack<T>(tile[c][2 * half] * factor, tile[c][2 * half + 1] * factor);
    }
    if constexpr (E == 16) {
      if (!is_stored) return;
      *reinterpret_cast<uint32_t*>(to + pair) = word[0];
      *reinterpret_cast<uint32_t*>(to + 8 + pair) = word[1];
    } else {
      // 16 bytes a lane, of one tile each: whole sectors.
#pragma unroll
      for (int c = 0; c < E / 8; c += 4) {
        uint32_t own[4] = {word[c], word[c + 1], word[c + 2], word[c + 3]};
        transpose_words(own);
        if (!is_stored) continue;
        *reinterpret_cast<uint4*>(to + 8 * (c + lane_pair())) =
            uint4{own[0], own[1], own[2], own[3]};
      }
    }
  }
}

// Calls with(number of type T, head width) for the instance of a kernel that a call needs.
template <typename With>
int with_instance(Type type, int64_t head_width, const With& with) {
  const auto with_type = [&](auto number) {
    return head_width == 16   ? with(number, std::integral_constant<int, 16>())
           : head_width == 32 ? with(number, std::integral_constant<int, 32>())
                              : with(number, std::integral_constant<int, 64>());
  };
  return type == Type::float32   ? with_type(float())
         : type == Type::float16 ? with_type(float16())
                                 : with_type(bfloat16());
}

}  // namespace videoswin

// What the attention kernels share: where a block is, what it knows of queries and keys, the bias.
#pragma once

#include "attention_tiles.cuh"

namespace videoswin {

constexpr float HIGHEST = 3.402823466e38f;

// Of a tile of scores in the backward passes: as many as registers hold with all else.
template <typename T, int E>
constexpr int COLUMNS = std::is_same_v<T, float> && E >= 32 ? 16 : 32;

// A window of a clip, and a head.
template <typename T>
struct Window {
  int head, tokens;
  const int32_t *source, *region;
  bool is_mixed;
  int64_t row;           // of this clip and head in log_sum_exp
  int64_t first, width;  // numbers before the clip's first of this head in `out`; of a token there
  const T *qkv, *pad;    // of this clip and head; of this head

  __device__ __forceinline__ Window(const Attention& a, int head, int64_t clip, int64_t window)
      : head(head), tokens(static_cast<int>(a.tokens)) {
    const int64_t channel = head * a.head_width;
    source = a.source + window * tokens;
    region = a.region + window * tokens;
    is_mixed = a.mixed[window] != 0;
    row = (clip * a.num_heads + head) * a.num_grid;
    width = a.num_heads * a.head_width;
    first = clip * a.num_grid * width + channel;
    qkv = static_cast<const T*>(a.qkv) + 3 * clip * a.num_grid * width + channel;
    pad = a.pad_qkv ? static_cast<const T*>(a.pad_qkv) + channel : nullptr;
  }

  __device__ __forceinline__ Window(const Attention& a, int head, unsigned window_of_all)
      : Window(a, head, window_of_all / static_cast<unsigned>(a.num_windows),
               window_of_all % static_cast<unsigned>(a.num_windows)) {}

  // -1: a pad, or no place of the window.
  __device__ __forceinline__ int token(int place) const {
    return place < tokens ? source[place] : -1;
  }
  // What is beyond the window has the region and the code of its last place.
  __device__ __forceinline__ int inside(int place) const {
    return place < tokens ? place : tokens - 1;
  }

  // 0, 1, 2: q, k, v. Of q, pads are zeros: what they would give is dropped.
  __device__ __forceinline__ TokenRows<T> rows(int part) const {
    return {qkv + part * width, 3 * width, part && pad ? pad + part * width : nullptr};
  }
  // Of a tensor like the output, whose pads are zeros.
  __device__ __forceinline__ TokenRows<T> rows_like_out(const void* tensor) const {
    return {static_cast<const T*>(tensor) + first, width, nullptr};
  }

  // Begin to copy `count` places: keys and values, or queries and what came back to them.
  template <int E>
  __device__ __forceinline__ void gather_keys(Rows<T, E> k, Rows<T, E> v, int place,
                                              int count) const {
    gather(source, place, count, tokens, k, rows(1), v, rows(2));
  }
  template <int E>
  __device__ __forceinline__ void gather_queries(Rows<T, E> q, Rows<T, E> grad,
                                                 const void* grad_out, int place, int count) const {
    gather(source, place, count, tokens, q, rows(0), grad, rows_like_out(grad_out));
  }
};

// What a block is for: a head, rows of a window from `first` on, and what else it counts by. Heads
// follow each other, so that neighbours read the other parts of the same lines.
struct Block {
  int head, first, rows;
  unsigned rest, tiles;

  __device__ __forceinline__ explicit Block(const Attention& a) : rows(blockDim.x / 2) {
    const unsigned heads = static_cast<unsigned>(a.num_heads);
    tiles = (static_cast<int>(a.tokens) + rows - 1) / rows;
    head = blockIdx.x % heads;
    first = blockIdx.x / heads % tiles * rows;
    rest = blockIdx.x / heads / tiles;
  }
};

// The two rows of a warp that are a thread's, g and g + 8. Codes are in bytes of the table.
struct OwnRows {
  int token[2], code[2], region[2];

  template <typename T>
  __device__ __forceinline__ OwnRows(const Attention& a, const Window<T>& window, int first) {
    for (int i = 0; i < 2; ++i) {
      const int place = first + warp_row() + lane_group() + 8 * i;
      token[i] = window.token(place);
      code[i] = 4 * a.code[window.inside(place)];
      region[i] = window.region[window.inside(place)];
    }
  }
};

// What is known of COUNT keys, whose codes are those that are taken away.
template <int COUNT>
struct Keys {
  int code[COUNT], region[COUNT];

  template <typename T>
  __device__ __forceinline__ void load(const Attention& a, const Window<T>& window, int first) {
    for (int i = threadIdx.x; i < COUNT; i += blockDim.x) {
      code[i] = 4 * (a.reach - a.code[window.inside(first + i)]);
      region[i] = window.region[window.inside(first + i)];
    }
  }
};

// And of COUNT queries. What is no token has given out nothing: by a level of infinity each of its
// weights is 0.
template <int COUNT>
struct Queries {
  int code[COUNT], region[COUNT];
  float level[COUNT], row_sum[COUNT], factor[COUNT];

  template <typename T>
  __device__ __forceinline__ void load(const Attention& a, const AttentionGradients& g,
                                       const Window<T>& window, int first, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int token = window.token(first + i);
      code[i] = 4 * a.code[window.inside(first + i)];
      region[i] = window.region[window.inside(first + i)];
      level[i] = token < 0 ? INFINITY : g.log_sum_exp[window.row + token];
      row_sum[i] = token < 0 ? 0 : g.row_sums[window.row + token];
      factor[i] = token < 0 ? 0 : g.factors[window.row + token];
    }
  }
};

// The bias of a pair is where two numbers that stand for its places lead together. The table is
// that of a head, or, where that is too large, the biases of a tile, copied for each.
struct Bias {
  float* shared;
  const float* table;
  bool is_whole;

  // Numbers of shared memory for it, beside `used` bytes, by tiles of so many pairs.
  static int64_t numbers(const Attention& a, int64_t used, int64_t pairs) {
    return a.table_stride * 4 + used <= SHARED_BYTES ? a.table_stride : pairs;
  }

  __device__ __forceinline__ Bias(const Attention& a, int head, void* shared, int numbers)
      : shared(static_cast<float*>(shared)),
        table(a.tables + head * a.table_stride),
        is_whole(numbers == a.table_stride) {
    if (!is_whole) return;
    for (int i = threadIdx.x * 4; i < numbers; i += blockDim.x * 4) {
      copy_async_16(this->shared + i, table + i);
    }
  }

  // Of the tile where both codes are known: row by row, `columns` in each.
  template <typename Row, typename Column>
  __device__ __forceinline__ void fill(int rows, int columns, const Row& row,
                                       const Column& column) const {
    if (is_whole) return;
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
      shared[i] = table[row(i / columns) + column(i % columns)];
    }
  }
};

// scores = scale * products + bias + mask. Of rows g and g + 8 the numbers are in registers, of
// columns in shared memory; of a pair of a filled tile they are its place.
template <int TILES>
__device__ __forceinline__ void finish_scores(float (&score)[TILES][4], float scale,
                                              const Bias& bias, const int (&row_code)[2],
                                              const int (&row_region)[2], const int* column_code,
                                              const int* column_region, bool is_mixed) {
  int row[2];
  for (int i = 0; i < 2; ++i) {
    row[i] = bias.is_whole ? row_code[i] : (warp_row() + lane_group() + 8 * i) * 8 * TILES * 4;
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int at = n * 8 + 2 * lane_pair();
    int2 column{4 * at, 4 * at + 4};
    if (bias.is_whole) column = *reinterpret_cast<const int2*>(column_code + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* const bytes = reinterpret_cast<const char*>(bias.shared) + row[i / 2];
      const float pair = *reinterpret_cast<const float*>(bytes + (i % 2 ? column.y : column.x));
      score[n][i] = fmaf(score[n][i], scale, pair);
    }
  }
  if (!is_mixed) return;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int2 column = *reinterpret_cast<const int2*>(column_region + n * 8 + 2 * lane_pair());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row_region[i / 2] != (i % 2 ? column.y : column.x)) score[n][i] += MASKED;
    }
  }
}

// 2^(score - level), both in natural units: first subtracted, so that of a level however large its
// own score's weight is 1.
__device__ __forceinline__ float weight_of(float score, float level) {
  return exp2_approx((score - level) * LOG2_E);
}

// Of columns beyond the last one there are no scores.
template <int TILES>
__device__ __forceinline__ void cut_scores(float (&score)[TILES][4], int columns) {
  if (columns >= 8 * TILES) return;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n * 8 + 2 * lane_pair() + i % 2 >= columns) score[n][i] = -INFINITY;
    }
  }
}

// Each head's table as the kernels read it: float32, its rows from offset - reach on, times factor.
int spread_tables(const Attention& call, float factor, void* stream);

// grad_table, by way of grad_bias, from what the query pass has left.
int table_gradient(const Attention& call, const AttentionGradients& gradients, void* stream);

inline int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// Of a block that owns rows of a window, 16 a warp.
inline int64_t warps_of(int64_t tokens) { return tokens < 64 ? tiles_of(tokens, 16) : MOST_WARPS; }

}  // namespace videoswin

// The bias table for the kernels, and its gradient: of each pair of places, summed over windows,
// then gathered back. For a row of the table every place has at most one partner at that relative
// position, so nothing is sorted and nothing added atomically.
#include "attention.cuh"
#include "numbers.cuh"

namespace videoswin {
namespace {

// tables[head, i] = factor * bias_table[offset - reach + i, head].
__global__ void __launch_bounds__(256) spread_tables_kernel(Attention a, float factor) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.table_stride * a.num_heads) return;
  const int64_t head = i % a.num_heads, row = i / a.num_heads;
  const bool is_row = row <= 2 * a.reach;
  const int64_t at = (a.offset - a.reach + row) * a.num_heads + head;
  const float bias = is_row ? number(a.bias_table, at) : 0;
  // What hides a pair by the lowest number shall not become infinite, nor what is made of it.
  const bool is_finite = fabsf(bias) <= HIGHEST;
  const float product = bias * factor;
  a.tables[head * a.table_stride + row] =
      is_finite ? min(max(product, -HIGHEST / 256), HIGHEST / 256) : product;
}

// As many as fit without spills; on Hopper those of stage 1 of Swin-T are then one wave.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900
constexpr int MOST_BLOCKS = 4;
#elif __CUDA_ARCH__ == 900
constexpr int MOST_BLOCKS = 5;
#else
constexpr int MOST_BLOCKS = 3;
#endif

template <typename T, int E>
struct PairPass {
  static constexpr int COLUMNS = videoswin::COLUMNS<T, E>, TILES = COLUMNS / 8;
  // Blocks on a multiprocessor that registers are kept free for.
  static constexpr int BLOCKS = std::is_same_v<T, float> ? 1 : E == 64 ? 2 : MOST_BLOCKS;
  // Windows whose gradients are one sum, before it is added to those of earlier ones.
  static constexpr int CHAIN = 32;

  struct alignas(16) Stage {
    unsigned char q[MOST_WARPS * 16 * E * sizeof(T)], grad[MOST_WARPS * 16 * E * sizeof(T)];
    unsigned char k[COLUMNS * E * sizeof(T)], v[COLUMNS * E * sizeof(T)];
    Queries<MOST_WARPS * 16> queries;
    Keys<COLUMNS> keys;
  };
  static_assert(2 * sizeof(Stage) <= SHARED_BYTES);
};

// grad_bias[part, head, i, j] = sum over the part's windows of grad_score[i, j], in their order.
template <typename T, int E>
__global__ void __launch_bounds__(MOST_WARPS * 32, PairPass<T, E>::BLOCKS)
    bias_gradient_kernel(Attention a, AttentionGradients g) {
  using Pass = PairPass<T, E>;
  constexpr int COLUMNS = Pass::COLUMNS, TILES = Pass::TILES;
  auto* const shared = dynamic_shared<typename Pass::Stage>();
  const Block block(a);
  const int rows = block.rows, tokens = static_cast<int>(a.tokens);
  const unsigned column_tiles = (tokens + COLUMNS - 1) / COLUMNS;
  const int first_column = block.rest % column_tiles * COLUMNS;
  const unsigned part = block.rest / column_tiles;
  const unsigned windows = static_cast<unsigned>(a.clips * a.num_windows);
  const unsigned num_windows = static_cast<unsigned>(a.num_windows);
  const unsigned parts = static_cast<unsigned>(g.bias_parts), steps = (windows + parts - 1) / parts;
  const unsigned begin = part * steps, end = min(begin + steps, windows);

  unsigned clip = begin / num_windows, window_of_clip = begin % num_windows;
  bool is_next_mixed = false;
  const auto load = [&](unsigned step) {
    if (step < end) {
      auto& stage = shared[step % 2];
      const Window<T> window(a, block.head, clip, window_of_clip);
      window.gather_queries(Rows<T, E>{stage.q}, Rows<T, E>{stage.grad}, g.grad_out, block.first,
                            rows);
      window.gather_keys(Rows<T, E>{stage.k}, Rows<T, E>{stage.v}, first_column, COLUMNS);
      stage.queries.load(a, g, window, block.first, rows);
      stage.keys.load(a, window, first_column);
      is_next_mixed = window.is_mixed;
      if (++window_of_clip == num_windows) {
        window_of_clip = 0;
        ++clip;
      }
    }
    copy_async_commit();
  };
  load(begin);

  const float* const table = a.tables + block.head * a.table_stride;
  const int own_row = block.first + warp_row() + lane_group();
  const int own_column = first_column + 2 * lane_pair();
  float pair[TILES][4], total[TILES][4] = {};
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min(own_row + i / 2 * 8, tokens - 1);
      const int column = min(own_column + n * 8 + i % 2, tokens - 1);
      pair[n][i] = table[a.code[row] + a.reach - a.code[column]];
    }
  }
  float* const to = g.grad_bias + (static_cast<int64_t>(part) * a.num_heads + block.head) * tokens *
                                      static_cast<int64_t>(tokens);
  for (unsigned step = begin; step < end; ++step) {
    const bool is_mixed = is_next_mixed;
    load(step + 1);
    copy_async_wait<1>();
    __syncthreads();
    auto& stage = shared[step % 2];
    Left<T, E> left;
    float weight[TILES][4] = {}, grad[TILES][4] = {};
    left.load(Rows<T, E>{stage.q}, warp_row());
    multiply_rows(weight, left, Rows<T, E>{stage.k});
    left.load(Rows<T, E>{stage.grad}, warp_row());
    multiply_rows(grad, left, Rows<T, E>{stage.v});
    float level[2], lowered[2], factor[2];
    int region[2];
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row() + lane_group() + 8 * i;
      level[i] = stage.queries.level[row];
      lowered[i] = stage.queries.row_sum[row];
      factor[i] = stage.queries.factor[row];
      region[i] = stage.queries.region[row];
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const int at = n * 8 + 2 * lane_pair();
      const int2 column = *reinterpret_cast<const int2*>(stage.keys.region + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float score = fmaf(weight[n][i], a.scale, pair[n][i]);
        if (is_mixed && region[i / 2] != (i % 2 ? column.y : column.x)) score += MASKED;
        const float one = weight_of(score, level[i / 2]) * factor[i / 2];
        total[n][i] += one * (grad[n][i] - lowered[i / 2]);
      }
    }
    __syncthreads();

    const bool is_last = step + 1 == end;
    if ((step - begin) % Pass::CHAIN != Pass::CHAIN - 1 && !is_last) continue;
    const bool is_first = step - begin < Pass::CHAIN;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = own_row + i / 2 * 8, column = own_column + n * 8 + i % 2;
        if (row >= tokens || column >= tokens) continue;
        float& sum = to[static_cast<int64_t>(row) * tokens + column];
        sum = is_first ? total[n][i] : sum + total[n][i];
        total[n][i] = 0;
      }
    }
  }
}

constexpr int ACROSS = 32, DOWN = 16;

// grad_table[r, head] = sum over parts and places i of grad_bias[part, head, i, j], j being the
// place whose code is code[i] + offset - r, where there is one.
__global__ void __launch_bounds__(ACROSS* DOWN)
    table_gradient_kernel(Attention a, AttentionGradients g) {
  float* const shared = dynamic_shared<float>();
  const unsigned heads = static_cast<unsigned>(a.num_heads);
  const int head = blockIdx.x % heads, tokens = static_cast<int>(a.tokens);
  const int64_t row = static_cast<int64_t>(blockIdx.x / heads) * ACROSS + threadIdx.x;
  float sum = 0;
  for (int i = threadIdx.y; i < tokens; i += DOWN) {
    const int64_t partner = a.code[i] + a.offset - row;
    const int j = partner >= 0 && partner < g.num_places ? g.place[partner] : -1;
    if (j < 0) continue;
    for (int64_t part = 0; part < g.bias_parts; ++part) {
      sum += g.grad_bias[((part * heads + head) * tokens + i) * tokens + j];
    }
  }
  shared[threadIdx.y * ACROSS + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || row >= g.table_rows) return;
  sum = 0;
  for (int down = 0; down < DOWN; ++down) sum += shared[down * ACROSS + threadIdx.x];
  g.grad_table[row * heads + head] = sum;
}

}  // namespace

int spread_tables(const Attention& call, float factor, void* stream) {
  const int64_t numbers = call.table_stride * call.num_heads;
  return launch(spread_tables_kernel, grid_of(tiles_of(numbers, 256)), dim3(256), 0, stream, call,
                factor);
}

int table_gradient(const Attention& call, const AttentionGradients& gradients, void* stream) {
  const int64_t warps = warps_of(call.tokens);
  const int failed = with_instance(call.type, call.head_width, [&](auto number, auto width) {
    using T = decltype(number);
    using Pass = PairPass<T, width()>;
    const int64_t tiles = tiles_of(call.tokens, 16 * warps) * tiles_of(call.tokens, Pass::COLUMNS);
    return launch(bias_gradient_kernel<T, width()>,
                  grid_of(gradients.bias_parts * tiles * call.num_heads), dim3(32 * warps),
                  2 * sizeof(typename Pass::Stage), stream, call, gradients);
  });
  if (failed) return failed;
  return launch(table_gradient_kernel,
                grid_of(tiles_of(gradients.table_rows, ACROSS) * call.num_heads),
                dim3(ACROSS, DOWN), ACROSS * DOWN * sizeof(float), stream, call, gradients);
}

}  // namespace videoswin

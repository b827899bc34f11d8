// Two passes over the tiles of a window's scores, each recomputed from the log-sum-exp: the first
// owns queries and sums over keys, the second owns keys and sums over queries. The third, which
// owns pairs and sums over windows, is in bias_gradient.cu. What each owns it writes once: nothing
// is added atomically, and sums have one order.
#include "attention.cuh"
#include "numbers.cuh"

namespace videoswin {
namespace {

// Of two equal pieces of 16 bytes.
template <typename T>
__device__ __forceinline__ float piece_product(uint4 a, uint4 b) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      sum = fmaf(__uint_as_float(left[i]), __uint_as_float(right[i]), sum);
    } else {
      sum = fmaf(half_to_float<T>(left[i]), half_to_float<T>(right[i]), sum);
      sum = fmaf(half_to_float<T>(left[i] >> 16), half_to_float<T>(right[i] >> 16), sum);
    }
  }
  return sum;
}

template <typename T, int E>
struct QueryPass {
  // Blocks on a multiprocessor that registers are kept free for.
  static constexpr int BLOCKS = !std::is_same_v<T, float> && E <= 32 ? 3 : 1;
  static constexpr int COLUMNS = videoswin::COLUMNS<T, E>, TILES = COLUMNS / 8;
  struct alignas(16) Stage {
    unsigned char k[COLUMNS * E * sizeof(T)], v[COLUMNS * E * sizeof(T)];
    Keys<COLUMNS> keys;
  };
  struct alignas(16) Shared {
    unsigned char q[MOST_WARPS * 16 * E * sizeof(T)], grad[MOST_WARPS * 16 * E * sizeof(T)];
    Stage stage[2];
  };
};

// grad_q[i] = scale * sum over j of grad_score[i, j] * k[j]; row_sum[i] and factor[i].
//
// row_sum[i] = sum over j of weight[i, j] * (grad[i] . v[j]), by which softmax lowers the gradients
// of a row. It is grad[i] . out[i] but for the rounding of `out`, which leaves them a sum that is
// not zero: that `rest` is taken away at the end. Likewise the log-sum-exp is rounded, and the
// weights of a row do not quite sum to 1: factor[i] makes them.
template <typename T, int E>
__global__ void __launch_bounds__(MOST_WARPS * 32, QueryPass<T, E>::BLOCKS)
    query_gradient_kernel(Attention a, AttentionGradients g, int bias_numbers) {
  using Pass = QueryPass<T, E>;
  constexpr int COLUMNS = Pass::COLUMNS, TILES = Pass::TILES;
  auto* const shared = dynamic_shared<typename Pass::Shared>();
  const Block block(a);
  const int first = block.first, queries = block.rows, tokens = static_cast<int>(a.tokens);
  const Window<T> window(a, block.head, block.rest);
  const Bias bias(a, block.head, shared + 1, bias_numbers);

  const Rows<T, E> q_rows{shared->q}, grad_rows{shared->grad};
  window.gather_queries(q_rows, grad_rows, g.grad_out, first, queries);
  const auto load = [&](int start) {
    auto& stage = shared->stage[start / COLUMNS % 2];
    if (start < tokens) {
      window.gather_keys(Rows<T, E>{stage.k}, Rows<T, E>{stage.v}, start, COLUMNS);
      stage.keys.load(a, window, start);
    }
    copy_async_commit();
  };
  load(0);

  const OwnRows own(a, window, first);
  float level[2], lowered[2] = {};
  for (int i = 0; i < 2; ++i) {
    const int token = own.token[i];
    level[i] = token < 0 ? INFINITY : g.log_sum_exp[window.row + token];
  }
  Left<T, E> q = {}, grad = {};
  float total[2] = {}, rest[2] = {};
  float mean_k[E / 8][4] = {}, grad_q[E / 8][4] = {};
  for (int start = 0; start < tokens; start += COLUMNS) {
    load(start + COLUMNS);
    copy_async_wait<1>();
    auto& stage = shared->stage[start / COLUMNS % 2];
    bias.fill(
        queries, COLUMNS, [&](int i) { return a.code[window.inside(first + i)]; },
        [&](int j) { return a.reach - a.code[window.inside(start + j)]; });
    __syncthreads();
    if (start == 0) {
      q.load(q_rows, warp_row());
      grad.load(grad_rows, warp_row());
      for (int i = 0; i < 2; ++i) {
        const T* const out = static_cast<const T*>(g.out) + window.first;
        const int row = warp_row() + lane_group() + 8 * i;
        for (int piece = lane_pair(); piece < Rows<T, E>::PIECES; piece += 4) {
          if (own.token[i] < 0) continue;
          const T* const from = out + own.token[i] * window.width + piece * (16 / sizeof(T));
          lowered[i] += piece_product<T>(*reinterpret_cast<const uint4*>(from),
                                         *reinterpret_cast<const uint4*>(grad_rows.at(row, piece)));
        }
        lowered[i] = row_sum(lowered[i]);
      }
    }

    float weight[TILES][4] = {}, grad_score[TILES][4] = {};
    multiply_rows(weight, q, Rows<T, E>{stage.k});
    multiply_rows(grad_score, grad, Rows<T, E>{stage.v});
    finish_scores(weight, a.scale, bias, own.code, own.region, stage.keys.code, stage.keys.region,
                  window.is_mixed);
    cut_scores(weight, tokens - start);
    float weights[2] = {}, scores[2] = {};
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[n][i] = weight_of(weight[n][i], level[i / 2]);
        grad_score[n][i] = weight[n][i] * (grad_score[n][i] - lowered[i / 2]);
        weights[i / 2] += weight[n][i];
        scores[i / 2] += grad_score[n][i];
      }
    }
    for (int i = 0; i < 2; ++i) {
      total[i] += weights[i];
      rest[i] += scores[i];
    }
    multiply_weights(mean_k, weight, Rows<T, E>{stage.k});
    multiply_weights(grad_q, grad_score, Rows<T, E>{stage.k});
    __syncthreads();
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = 1 / row_sum(total[half]);
    const float mean = row_sum(rest[half]) * factor;
    const int token = own.token[half];
    if (token >= 0 && lane_pair() == 0) {
      g.factors[window.row + token] = factor;
      g.row_sums[window.row + token] = lowered[half] + mean;
    }
    if (!g.grad_qkv) continue;
#pragma unroll
    for (int c = 0; c < E / 8; ++c) {
      for (int i = 2 * half; i < 2 * half + 2; ++i) grad_q[c][i] -= mean * mean_k[c][i];
    }
    T* const to = static_cast<T*>(g.grad_qkv) + (window.qkv - static_cast<const T*>(a.qkv));
    store_row<T, E>(to + token * (3 * window.width), token >= 0, grad_q, half, factor * a.scale);
  }
}

template <typename T, int E>
struct KeyPass {
  static constexpr int BLOCKS = !std::is_same_v<T, float> && E <= 32 ? 3 : 1;
  static constexpr int COLUMNS = videoswin::COLUMNS<T, E>, TILES = COLUMNS / 8;
  struct alignas(16) Stage {
    unsigned char q[COLUMNS * E * sizeof(T)], grad[COLUMNS * E * sizeof(T)];
    Queries<COLUMNS> queries;
  };
  struct alignas(16) Shared {
    unsigned char k[MOST_WARPS * 16 * E * sizeof(T)], v[MOST_WARPS * 16 * E * sizeof(T)];
    Stage stage[2];
    float pads[MOST_WARPS][2 * E];  // what the keys and values of each warp's pads have got
  };
};

// grad_v[j] = sum over i of weight[i, j] * grad[i], and grad_k[j] likewise of scores and q.
//
// Scores stand transposed: what a key sums over queries is then a plain product. A block takes
// `steps` windows, one after the other, and leaves the sum over their pads.
template <typename T, int E>
__global__ void __launch_bounds__(MOST_WARPS * 32, KeyPass<T, E>::BLOCKS)
    key_value_gradient_kernel(Attention a, AttentionGradients g, unsigned steps, int bias_numbers) {
  using Pass = KeyPass<T, E>;
  constexpr int COLUMNS = Pass::COLUMNS, TILES = Pass::TILES;
  auto* const shared = dynamic_shared<typename Pass::Shared>();
  const Block block(a);
  const int first = block.first, keys = block.rows, tokens = static_cast<int>(a.tokens);
  const unsigned windows = static_cast<unsigned>(a.clips * a.num_windows);
  const Bias bias(a, block.head, shared + 1, bias_numbers);
  const Rows<T, E> k_rows{shared->k}, v_rows{shared->v};
  float* const pads = shared->pads[threadIdx.x / 32];
  for (int c = threadIdx.x % 32; c < 2 * E; c += 32) pads[c] = 0;
  __syncwarp();

  for (unsigned step = 0; step < steps && block.rest * steps + step < windows; ++step) {
    const Window<T> window(a, block.head, block.rest * steps + step);
    window.gather_keys(k_rows, v_rows, first, keys);
    const auto load = [&](int start) {
      auto& stage = shared->stage[start / COLUMNS % 2];
      if (start < tokens) {
        window.gather_queries(Rows<T, E>{stage.q}, Rows<T, E>{stage.grad}, g.grad_out, start,
                              COLUMNS);
        stage.queries.load(a, g, window, start, COLUMNS);
      }
      copy_async_commit();
    };
    load(0);
    OwnRows own(a, window, first);
    for (int& code : own.code) code = 4 * a.reach - code;
    Left<T, E> k = {}, v = {};
    float grad_k[E / 8][4] = {}, grad_v[E / 8][4] = {};
    for (int start = 0; start < tokens; start += COLUMNS) {
      load(start + COLUMNS);
      copy_async_wait<1>();
      auto& stage = shared->stage[start / COLUMNS % 2];
      bias.fill(
          keys, COLUMNS, [&](int i) { return a.reach - a.code[window.inside(first + i)]; },
          [&](int j) { return a.code[window.inside(start + j)]; });
      __syncthreads();
      if (start == 0) {
        k.load(k_rows, warp_row());
        v.load(v_rows, warp_row());
      }
      const Rows<T, E> q{stage.q}, grad{stage.grad};
      const auto& queries = stage.queries;
      float weight[TILES][4] = {}, grad_score[TILES][4] = {};
      multiply_rows(weight, k, q);
      finish_scores(weight, a.scale, bias, own.code, own.region, queries.code, queries.region,
                    window.is_mixed);
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const int at = n * 8 + 2 * lane_pair();
        const float2 level = *reinterpret_cast<const float2*>(queries.level + at);
        const float2 factor = *reinterpret_cast<const float2*>(queries.factor + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[n][i] = weight_of(weight[n][i], i % 2 ? level.y : level.x);
          weight[n][i] *= i % 2 ? factor.y : factor.x;
        }
      }
      multiply_weights(grad_v, weight, grad);
      multiply_rows(grad_score, v, grad);
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const int at = n * 8 + 2 * lane_pair();
        const float2 lowered = *reinterpret_cast<const float2*>(queries.row_sum + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          grad_score[n][i] = weight[n][i] * (grad_score[n][i] - (i % 2 ? lowered.y : lowered.x));
        }
      }
      multiply_weights(grad_k, grad_score, q);
      __syncthreads();
    }

    bool is_pad[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = own.token[half];
      is_pad[half] = token < 0 && first + warp_row() + lane_group() + 8 * half < tokens;
      if (!g.grad_qkv) continue;
      T* const to = static_cast<T*>(g.grad_qkv) + (window.qkv - static_cast<const T*>(a.qkv)) +
                    token * (3 * window.width) + window.width;
      store_row<T, E>(to, token >= 0, grad_k, half, a.scale);
      store_row<T, E>(to + window.width, token >= 0, grad_v, half, 1);
    }
    if (!g.partial || !__any_sync(ALL_LANES, is_pad[0] || is_pad[1])) continue;
#pragma unroll
    for (int c = 0; c < E / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto over_rows = [&](const float (&grad)[4]) {
          float sum = (is_pad[0] ? grad[i] : 0) + (is_pad[1] ? grad[2 + i] : 0);
#pragma unroll
          for (int distance = 4; distance < 32; distance *= 2) {
            sum += __shfl_xor_sync(ALL_LANES, sum, distance);
          }
          return sum;
        };
        const float of_k = over_rows(grad_k[c]) * a.scale, of_v = over_rows(grad_v[c]);
        if (lane_group() == 0) {
          pads[c * 8 + 2 * lane_pair() + i] += of_k;
          pads[E + c * 8 + 2 * lane_pair() + i] += of_v;
        }
      }
    }
  }

  if (!g.partial) return;
  __syncthreads();
  const int64_t width = a.num_heads * E, row = block.rest * block.tiles + first / keys;
  float* const to = g.partial + row * 2 * width;
  for (int i = threadIdx.x; i < 2 * E; i += blockDim.x) {
    float sum = 0;
    for (int warp = 0; warp < keys / 16; ++warp) sum += shared->pads[warp][i];
    to[i / E * width + block.head * E + i % E] = sum;
  }
}

}  // namespace

int64_t attention_key_tiles(int64_t tokens) { return tiles_of(tokens, 16 * warps_of(tokens)); }

int attention_backward(const Attention& call, const AttentionGradients& gradients, void* stream) {
  const int64_t warps = warps_of(call.tokens), tiles = attention_key_tiles(call.tokens);
  const int64_t windows = call.clips * call.num_windows;
  const dim3 threads(32 * warps);
  int failed = spread_tables(call, 1, stream);
  if (failed) return failed;
  failed = with_instance(call.type, call.head_width, [&](auto number, auto width) {
    using T = decltype(number);
    using Shared = typename QueryPass<T, width()>::Shared;
    const int64_t pairs = 16 * warps * COLUMNS<T, width()>;
    const int64_t numbers = Bias::numbers(call, sizeof(Shared), pairs);
    return launch(query_gradient_kernel<T, width()>, grid_of(windows * tiles * call.num_heads),
                  threads, sizeof(Shared) + 4 * numbers, stream, call, gradients,
                  static_cast<int>(numbers));
  });
  if (failed) return failed;
  if (gradients.grad_qkv || gradients.partial) {
    failed = with_instance(call.type, call.head_width, [&](auto number, auto width) {
      using T = decltype(number);
      using Shared = typename KeyPass<T, width()>::Shared;
      const int64_t pairs = 16 * warps * COLUMNS<T, width()>;
      const int64_t numbers = Bias::numbers(call, sizeof(Shared), pairs);
      const int64_t parts = gradients.pad_parts;
      return launch(key_value_gradient_kernel<T, width()>, grid_of(parts * tiles * call.num_heads),
                    threads, sizeof(Shared) + 4 * numbers, stream, call, gradients,
                    static_cast<unsigned>(tiles_of(windows, parts)), static_cast<int>(numbers));
    });
    if (failed) return failed;
  }
  if (gradients.partial) {
    failed = column_sums(gradients.grad_pad_k, gradients.grad_pad_v, gradients.partial,
                         gradients.pad_parts * tiles, call.num_heads * call.head_width, stream);
    if (failed) return failed;
  }
  return gradients.grad_table ? table_gradient(call, gradients, stream) : 0;
}

}  // namespace videoswin

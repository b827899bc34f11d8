// A block owns up to 64 queries of a window and a head, and goes through the keys tile by tile.
#include "attention.cuh"

namespace videoswin {
namespace {

template <typename T, int E>
struct Forward {
  static constexpr int KEYS = std::is_same_v<T, float> ? 32 : 64, TILES = KEYS / 8;
  struct alignas(16) Stage {
    unsigned char k[KEYS * E * sizeof(T)], v[KEYS * E * sizeof(T)];
    Keys<KEYS> keys;
  };
  struct alignas(16) Shared {
    unsigned char q[MOST_WARPS * 16 * E * sizeof(T)];
    Stage stage[2];
  };
};

template <typename T, int E>
__global__ void __launch_bounds__(MOST_WARPS * 32, 1)
    attention_forward_kernel(Attention a, T* __restrict__ out, float* __restrict__ log_sum_exp,
                             int bias_numbers) {
  using F = Forward<T, E>;
  auto* const shared = dynamic_shared<typename F::Shared>();
  const Block block(a);
  const int first = block.first, queries = block.rows, tokens = static_cast<int>(a.tokens);
  const Window<T> window(a, block.head, block.rest);
  const Bias bias(a, block.head, shared + 1, bias_numbers);

  const Rows<T, E> q_rows{shared->q};
  gather(window.source, first, queries, tokens, q_rows, window.rows(0));
  const auto load = [&](int start) {
    auto& stage = shared->stage[start / F::KEYS % 2];
    if (start < tokens) {
      window.gather_keys(Rows<T, E>{stage.k}, Rows<T, E>{stage.v}, start, F::KEYS);
      stage.keys.load(a, window, start);
    }
    copy_async_commit();
  };
  load(0);

  const OwnRows own(a, window, first);
  Left<T, E> q = {};
  // What weights are relative to, and their sum.
  float level[2] = {-INFINITY, -INFINITY}, total[2] = {};
  float result[E / 8][4] = {};
  for (int start = 0; start < tokens; start += F::KEYS) {
    load(start + F::KEYS);
    copy_async_wait<1>();
    auto& stage = shared->stage[start / F::KEYS % 2];
    bias.fill(
        queries, F::KEYS, [&](int i) { return a.code[window.inside(first + i)]; },
        [&](int j) { return a.reach - a.code[window.inside(start + j)]; });
    __syncthreads();
    if (start == 0) q.load(q_rows, warp_row());

    float weight[F::TILES][4] = {};
    multiply_rows(weight, q, Rows<T, E>{stage.k});
    finish_scores(weight, a.scale, bias, own.code, own.region, stage.keys.code, stage.keys.region,
                  window.is_mixed);
    cut_scores(weight, tokens - start);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < F::TILES; ++n) {
        highest = max(highest, max(weight[n][2 * half], weight[n][2 * half + 1]));
      }
      const float before = level[half];
      level[half] = max(before, row_max(highest));
      // A tile may hold nothing but scores of -inf, and -inf - -inf is not a number.
      const float zero = level[half] == -INFINITY ? 0 : level[half];
      float sum = 0;
#pragma unroll
      for (int n = 0; n < F::TILES; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          weight[n][i] = weight_of(weight[n][i], zero);
          sum += weight[n][i];
        }
      }
      const float fading = weight_of(before, zero);
      total[half] = total[half] * fading + sum;
#pragma unroll
      for (int c = 0; c < E / 8; ++c) {
        result[c][2 * half] *= fading;
        result[c][2 * half + 1] *= fading;
      }
    }
    multiply_weights(result, weight, Rows<T, E>{stage.v});
    // The next stage but one goes where this one is.
    __syncthreads();
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = own.token[half];
    const float sum = row_sum(total[half]);
    store_row<T, E>(out + window.first + token * window.width, token >= 0, result, half, 1 / sum);
    if (token >= 0 && lane_pair() == 0) {
      log_sum_exp[window.row + token] = level[half] + log2f(sum) * LN_2;
    }
  }
}

}  // namespace

int attention_generic(const Attention& call, void* out, float* log_sum_exp, void* stream) {
  const int failed = spread_tables(call, 1, stream);
  if (failed) return failed;
  const int64_t warps = warps_of(call.tokens);
  const int64_t blocks =
      call.clips * call.num_windows * tiles_of(call.tokens, 16 * warps) * call.num_heads;
  return with_instance(call.type, call.head_width, [&](auto number, auto width) {
    using T = decltype(number);
    using F = Forward<T, width()>;
    const int64_t numbers = Bias::numbers(call, sizeof(typename F::Shared), 16 * warps * F::KEYS);
    return launch(attention_forward_kernel<T, width()>, grid_of(blocks), dim3(32 * warps),
                  sizeof(typename F::Shared) + 4 * numbers, stream, call, static_cast<T*>(out),
                  log_sum_exp, static_cast<int>(numbers));
  });
}

}  // namespace videoswin

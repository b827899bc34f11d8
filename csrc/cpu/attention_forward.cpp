// Attention: rows of a window, as many as a tile has, with all of its keys in the nearest cache.
#include "attention.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {
namespace {

// Scores become weights that are not yet divided by their sum, which is returned.
template <typename Real>
Real exponentials_of(Real* scores, Real* level, int64_t keys) {
  constexpr int64_t lanes = LANES<Real>;
  Vector<Real> high = load(scores), also_high = load(scores + lanes);
  for (int64_t n = 2 * lanes; n < keys; n += 2 * lanes) {
    high = larger<Real>(high, load(scores + n));
    also_high = larger<Real>(also_high, load(scores + n + lanes));
  }
  *level = largest_of<Real>(larger<Real>(high, also_high));
  const Vector<Real> lowered = splat(*level);
  Vector<Real> sum{}, also_sum{};
  for (int64_t n = 0; n < keys; n += 2 * lanes) {
    const Vector<Real> weight = exponential(load(scores + n) - lowered);
    const Vector<Real> also_weight = exponential(load(scores + n + lanes) - lowered);
    store(scores + n, weight);
    store(scores + n + lanes, also_weight);
    sum += weight;
    also_sum += also_weight;
  }
  return sum_of<Real>(sum + also_sum);
}

template <typename Real>
void attention_chunk(const Attention& call, const Plan& plan, int64_t chunk, Output out,
                     Real* log_sum_exp, char* scratch) {
  constexpr int64_t tile = TILE<Real>, most = TILE_ROWS;
  Memory memory(scratch);
  const Head<Real> head(call, plan, chunk % call.num_heads);
  Real* const panels = memory.take<Real>(plan.side * plan.keys * plan.width);
  Real* const values = memory.take<Real>(plan.side * plan.keys * plan.width);
  Real* const regions = memory.take<Real>(plan.side * plan.keys);
  Real* const biases = memory.take<Real>(ATTENTION_ROWS * plan.keys);
  Real* const scores = memory.take<Real>(ATTENTION_ROWS * plan.keys);
  Real* const rows = memory.take<Real>(ATTENTION_ROWS * plan.width);
  const int64_t keys = (call.tokens + tile - 1) / tile * tile, pack = plan.keys * plan.width;

  const int64_t all = call.clips * call.num_windows;
  const int64_t begin = chunk / call.num_heads * plan.windows;
  const int64_t end = begin + plan.windows < all ? begin + plan.windows : all;
  for (int64_t number = begin; number < end; ++number) {
    const Window window(call, number);
    const int64_t own = number - begin;
    // Keys go through the memory of the values, which come after them.
    head.pack(values + own * pack, panels + own * pack, window, 1);
    head.pack(values + own * pack, nullptr, window, 2);
    if (window.is_mixed) head.read_regions(regions + own * plan.keys, window);
  }
  for (int64_t first = 0; first < call.tokens; first += most) {
    const int64_t count = first + most < call.tokens ? most : call.tokens - first;
    head.read_biases(biases, first, count);
    for (int64_t number = begin; number < end; ++number) {
      const Window window(call, number);
      const int64_t own = number - begin;
      if (!has_token(window, first, count)) continue;
      head.read_queries(rows, window, first, count);
      head.multiply_panels(scores, biases, rows, panels + own * pack, count);
      Real factors[TILE_ROWS], logs[TILE_ROWS];
      for (int64_t i = 0; i < count; ++i) {
        Real* const row = scores + i * plan.keys;
        if (window.is_mixed)
          mask_row(row, regions + own * plan.keys, static_cast<Real>(window.region[first + i]),
                   keys);
        Real level;
        const Real sum = exponentials_of(row, &level, keys);
        factors[i] = 1 / sum;
        logs[i] = level + static_cast<Real>(__builtin_log(static_cast<double>(sum)));
      }
      for (int64_t e = 0; e < call.head_width; e += tile)
        multiply<Real>({rows + e, nullptr, plan.width, scores, plan.keys, 1,
                        values + own * pack + e, plan.width, call.tokens},
                       count);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = window.source[first + i];
        if (token < 0) continue;
        Real* const row = rows + i * plan.width;
        for (int64_t e = 0; e < call.head_width; ++e) row[e] *= factors[i];
        narrow(out, (window.first + token) * head.channels() + head.head * call.head_width, row,
               call.head_width);
        const int64_t clip = window.first / call.num_grid;
        log_sum_exp[(clip * call.num_heads + head.head) * call.num_grid + token] = logs[i];
      }
    }
  }
}

template <typename Real>
void run(const Attention& call, void* out, void* log_sum_exp, const Workers& workers) {
  const Plan cut = plan(call);
  split_tables<Real>(call, cut, workers);
  for_each_chunk(workers, cut.chunks * call.num_heads, [&](int64_t chunk, char* scratch) {
    attention_chunk<Real>(call, cut, chunk, {out, call.qkv.type}, static_cast<Real*>(log_sum_exp),
                          scratch);
  });
}

}  // namespace

void attention(const Attention& call, void* out, void* log_sum_exp, const Workers& workers) {
  if (call.qkv.type == Type::float64) return run<double>(call, out, log_sum_exp, workers);
  run<float>(call, out, log_sum_exp, workers);
}

void exponentials(Output values, int64_t count) {
  const auto all = [&](auto* data) {
    using Real = __typeof__(*data + 0);
    for (int64_t i = 0; i < count; ++i)
      data[i] = exponential(splat<Real>(data[i]))[i % LANES<Real>];
  };
  if (values.type == Type::float64) return all(static_cast<double*>(values.data));
  all(static_cast<float*>(values.data));
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

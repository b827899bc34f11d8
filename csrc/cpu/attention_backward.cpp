// Gradients of attention: a block of rows is computed anew, and what keys get of it is added up.
//
// Weights are divided by their own sum, and that of weights and their gradients is taken from them:
// neither depends on how a result in 16 bits was rounded.
#include "attention.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {
namespace {

constexpr int64_t BLOCK_ROWS = ATTENTION_ROWS / TILE_ROWS * TILE_ROWS;

// Weights in place of scores, and gradients of the scores in place of those of the weights.
template <typename Real>
void differentiate_row(Real* __restrict__ scores, Real* __restrict__ grads, Real level,
                       int64_t keys) {
  constexpr int64_t lanes = LANES<Real>;
  Vector<Real> sum{}, product{};
  for (int64_t n = 0; n < keys; n += lanes) {
    const Vector<Real> weight = exponential(load(scores + n) - splat(level));
    store(scores + n, weight);
    sum += weight;
    product += weight * load(grads + n);
  }
  const Real total = sum_of<Real>(sum);
  // A row of padding has no weights: its level is infinite.
  const Real factor = total > 0 ? 1 / total : 0;
  const Vector<Real> divided = splat(factor), mean = splat(sum_of<Real>(product) * factor);
  for (int64_t n = 0; n < keys; n += lanes) {
    const Vector<Real> weight = load(scores + n) * divided;
    store(scores + n, weight);
    store(grads + n, weight * (load(grads + n) - mean));
  }
}

template <typename Real>
inline void add(Real* __restrict__ to, const Real* __restrict__ from, int64_t count) {
  for (int64_t n = 0; n < count; n += LANES<Real>) store(to + n, load(to + n) + load(from + n));
}

template <typename Real>
class Chunk {
 public:
  Chunk(const Attention& call, const AttentionGradients& gradients, const Plan& plan,
        int64_t number, char* scratch)
      : call_(call),
        gradients_(gradients),
        plan_(plan),
        memory_(scratch),
        head_(call, plan, number % call.num_heads),
        has_keys_(gradients.grad_qkv || gradients.grad_pad),
        keys_((call.tokens + TILE<Real> - 1) / TILE<Real> * TILE<Real>),
        pack_(plan.keys * plan.width) {
    const auto packs = [&] { return memory_.take<Real>(plan.side * pack_); };
    key_panels_ = packs(), value_panels_ = packs(), key_rows_ = packs();
    grad_keys_ = packs(), grad_values_ = packs();
    regions_ = memory_.take<Real>(plan.side * plan.keys);
    const auto squares = [&] { return memory_.take<Real>(ATTENTION_ROWS * plan.keys); };
    biases_ = squares(), grad_biases_ = squares(), scores_ = squares(), grads_ = squares();
    const auto strips = [&] { return memory_.take<Real>(ATTENTION_ROWS * plan.width); };
    queries_ = strips(), grad_out_ = strips(), grad_queries_ = strips();

    if (gradients.partial) {
      table_sums_ = gradients.partial + number * plan.sums;
      pad_sums_ = table_sums_ + (gradients.grad_table ? call.table_rows : 0);
      fill(table_sums_, 0.0, plan.sums);
    }
    const int64_t all = call.clips * call.num_windows;
    const int64_t begin = number / call.num_heads * plan.windows;
    const int64_t end = begin + plan.windows < all ? begin + plan.windows : all;
    for (begin_ = begin; begin_ < end; begin_ += plan.side) {
      end_ = begin_ + plan.side < end ? begin_ + plan.side : end;
      read();
      for (int64_t first = 0; first < call.tokens; first += BLOCK_ROWS)
        add_block(first, first + BLOCK_ROWS < call.tokens ? BLOCK_ROWS : call.tokens - first);
      if (has_keys_) write_keys();
    }
  }

 private:
  void read() {
    for (int64_t number = begin_; number < end_; ++number) {
      const Window window(call_, number);
      const int64_t own = (number - begin_) * pack_;
      // Values go through the memory of the keys, which come after them.
      head_.pack(key_rows_ + own, value_panels_ + own, window, 2);
      head_.pack(key_rows_ + own, key_panels_ + own, window, 1);
      if (window.is_mixed) head_.read_regions(regions_ + (number - begin_) * plan_.keys, window);
      if (!has_keys_) continue;
      fill(grad_keys_ + own, Real(0), call_.tokens * plan_.width);
      fill(grad_values_ + own, Real(0), call_.tokens * plan_.width);
    }
  }

  void add_block(int64_t first, int64_t rows) {
    head_.read_biases(biases_, first, rows);
    if (gradients_.grad_table) fill(grad_biases_, Real(0), rows * plan_.keys);
    for (int64_t number = begin_; number < end_; ++number) {
      const Window window(call_, number);
      if (has_token(window, first, rows)) add_window(window, number - begin_, first, rows);
    }
    if (!gradients_.grad_table) return;
    for (int64_t i = 0; i < rows; ++i) {
      const Real* const row = grad_biases_ + i * plan_.keys;
      double* const own = table_sums_ + (call_.code[first + i] + call_.offset);
      for (int64_t n = 0; n < call_.tokens; ++n) own[-call_.code[n]] += row[n];
    }
  }

  void add_window(const Window& window, int64_t side, int64_t first, int64_t rows) {
    const int64_t own = side * pack_, width = plan_.width, tile = TILE<Real>;
    head_.read_queries(queries_, window, first, rows);
    read_grad_out(window, first, rows);
    head_.multiply_panels(scores_, biases_, queries_, key_panels_ + own, rows);
    head_.multiply_panels(grads_, nullptr, grad_out_, value_panels_ + own, rows);
    for (int64_t i = 0; i < rows; ++i) {
      Real *const row = scores_ + i * plan_.keys, *const grads = grads_ + i * plan_.keys;
      if (window.is_mixed)
        mask_row(row, regions_ + side * plan_.keys, static_cast<Real>(window.region[first + i]),
                 keys_);
      differentiate_row(row, grads, levels_[i], keys_);
      if (gradients_.grad_table) add(grad_biases_ + i * plan_.keys, grads, keys_);
    }
    for (int64_t e = 0; has_keys_ && e < call_.head_width; e += tile) {
      Real *const values = grad_values_ + own + e, *const keys = grad_keys_ + own + e;
      // They add: what earlier blocks gave stays, however many rows this one has.
      multiply<Real>(
          {values, nullptr, width, scores_, 1, plan_.keys, grad_out_ + e, width, rows, true},
          call_.tokens);
      multiply<Real>({keys, nullptr, width, grads_, 1, plan_.keys, queries_ + e, width, rows, true},
                     call_.tokens);
    }
    if (!gradients_.grad_qkv) return;
    for (int64_t e = 0; e < call_.head_width; e += tile)
      multiply<Real>({grad_queries_ + e, nullptr, width, grads_, plan_.keys, 1, key_rows_ + own + e,
                      width, call_.tokens},
                     rows);
    const Real scale = static_cast<Real>(call_.scale);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = window.source[first + i];
      if (token < 0) continue;
      Real* const row = grad_queries_ + i * width;
      for (int64_t e = 0; e < call_.head_width; ++e) row[e] *= scale;
      write(row, window.first + token, 0);
    }
  }

  // Gradients of a block's outputs, and the levels of its scores; nothing comes of padding.
  void read_grad_out(const Window& window, int64_t first, int64_t rows) {
    const Input grad_out{gradients_.grad_out, call_.qkv.type};
    const int64_t clip = window.first / call_.num_grid, width = call_.head_width;
    const Real* const log_sum_exp = static_cast<const Real*>(gradients_.log_sum_exp) +
                                    (clip * call_.num_heads + head_.head) * call_.num_grid;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = window.source[first + i];
      Real* const row = grad_out_ + i * plan_.width;
      fill(row, Real(0), plan_.width);
      levels_[i] = token < 0 ? infinity<Real>() : log_sum_exp[token];
      if (token >= 0)
        widen(row, grad_out, (window.first + token) * head_.channels() + head_.head * width, width);
    }
  }

  void write_keys() {
    const int64_t width = call_.head_width;
    for (int64_t number = begin_; number < end_; ++number) {
      const Window window(call_, number);
      const Real* keys = grad_keys_ + (number - begin_) * pack_;
      const Real* values = grad_values_ + (number - begin_) * pack_;
      for (int64_t n = 0; n < call_.tokens; ++n, keys += plan_.width, values += plan_.width) {
        const int64_t token = window.source[n];
        if (token >= 0 && gradients_.grad_qkv) {
          write(keys, window.first + token, 1);
          write(values, window.first + token, 2);
        }
        if (token >= 0 || !gradients_.grad_pad) continue;
        for (int64_t e = 0; e < width; ++e) {
          pad_sums_[e] += keys[e];
          pad_sums_[width + e] += values[e];
        }
      }
    }
  }

  void write(const Real* row, int64_t token, int which) const {
    const Output grad_qkv{gradients_.grad_qkv, call_.qkv.type};
    narrow(grad_qkv, head_.place(token, which), row, call_.head_width);
  }

  const Attention& call_;
  const AttentionGradients& gradients_;
  const Plan& plan_;
  Memory memory_;
  const Head<Real> head_;
  const bool has_keys_;
  const int64_t keys_, pack_;
  Real *key_panels_, *value_panels_, *key_rows_, *grad_keys_, *grad_values_, *regions_;
  Real *biases_, *grad_biases_, *scores_, *grads_, *queries_, *grad_out_, *grad_queries_;
  Real levels_[ATTENTION_ROWS];
  double *table_sums_ = nullptr, *pad_sums_ = nullptr;
  int64_t begin_ = 0, end_ = 0;
};

// The sums of all chunks go where they belong.
template <typename Real>
void write_sums(const Attention& call, const AttentionGradients& gradients, const Plan& plan,
                const Workers& workers) {
  const int64_t width = call.head_width, table_rows = gradients.grad_table ? call.table_rows : 0;
  Real* const grad_table = static_cast<Real*>(gradients.grad_table);
  Real* const grad_pad = static_cast<Real*>(gradients.grad_pad);
  const auto write = [&](int64_t head, int64_t place, double sum) {
    const int64_t pad = place - table_rows;
    if (pad < 0) {
      grad_table[place * call.num_heads + head] = static_cast<Real>(sum);
      return;
    }
    // Of padding q has no gradient: nobody sees what it would ask for.
    const int64_t which = 1 + pad / width, channel = head * width + pad % width;
    grad_pad[which * call.num_heads * width + channel] = static_cast<Real>(sum);
    if (which == 1) grad_pad[channel] = 0;
  };
  add_chunks(workers, gradients.partial, plan.chunks, call.num_heads, plan.sums, write);
}

template <typename Real>
void run(const Attention& call, const AttentionGradients& gradients, const Workers& workers) {
  const Plan cut = plan(call, gradients);
  split_tables<Real>(call, cut, workers);
  for_each_chunk(workers, cut.chunks * call.num_heads, [&](int64_t number, char* scratch) {
    Chunk<Real>(call, gradients, cut, number, scratch);
  });
  if (cut.sums) write_sums<Real>(call, gradients, cut, workers);
}

}  // namespace

void attention_backward(const Attention& call, const AttentionGradients& gradients,
                        const Workers& workers) {
  if (call.qkv.type == Type::float64) return run<double>(call, gradients, workers);
  run<float>(call, gradients, workers);
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

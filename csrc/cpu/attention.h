// What both passes of attention share: the windows of a chunk, packed, and a block of biases.
#pragma once

#include "products.h"
#include "rows.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {

constexpr float MASKED = -100;

// Memory handed out piece by piece.
class Memory {
 public:
  explicit Memory(char* begin) : next_(begin) {}

  template <typename Real>
  Real* take(int64_t count) {
    Real* const found = reinterpret_cast<Real*>(next_);
    next_ += count * static_cast<int64_t>(sizeof(Real));
    return found;
  }

 private:
  char* next_;
};

template <typename Real>
constexpr Real infinity() {
  return static_cast<Real>(__builtin_inf());
}

// The table of each head by itself, in the type of the arithmetic.
template <typename Real>
inline void split_tables(const Attention& call, const Plan& plan, const Workers& workers) {
  constexpr int64_t block = 256;
  for_each_chunk(workers, (call.table_rows + block - 1) / block, [&](int64_t number, char*) {
    const int64_t end =
        (number + 1) * block < call.table_rows ? (number + 1) * block : call.table_rows;
    for (int64_t row = number * block; row < end; ++row)
      for (int64_t head = 0; head < call.num_heads; ++head)
        widen(static_cast<Real*>(call.tables) + head * plan.table + row, call.bias_table,
              row * call.num_heads + head, 1);
  });
}

// A window of a clip.
struct Window {
  int64_t first;  // token of the clip's first one, among those of all clips
  const int32_t *source, *region;
  bool is_mixed;

  Window(const Attention& call, int64_t number) {
    const int64_t window = number % call.num_windows;
    first = number / call.num_windows * call.num_grid;
    source = call.source + window * call.tokens;
    region = call.region + window * call.tokens;
    is_mixed = call.mixed[window];
  }
};

// The head of a call, and what is the same for all of its windows.
template <typename Real>
struct Head {
  const Attention& call;
  const Plan& plan;
  int64_t head;
  const Real* table;  // of this head alone

  Head(const Attention& own, const Plan& cut, int64_t number)
      : call(own),
        plan(cut),
        head(number),
        table(static_cast<const Real*>(own.tables) + number * cut.table) {}

  int64_t channels() const { return call.num_heads * call.head_width; }

  // Where q (0), k (1) or v (2) of a token begins.
  int64_t place(int64_t token, int which) const {
    return (3 * token + which) * channels() + head * call.head_width;
  }

  // q, k or v of place n of a window, zeros after its last channel.
  void read(Real* to, const Window& window, int64_t n, int which) const {
    const int64_t token = window.source[n], width = call.head_width;
    if (token >= 0)
      widen(to, call.qkv, place(window.first + token, which), width);
    else if (call.pad_qkv.data)
      widen(to, call.pad_qkv, place(0, which), width);
    else
      fill(to, Real(0), width);
    fill(to + width, Real(0), plan.width - width);
  }

  // Rows of q, times the scale, of a block that begins with place `first`.
  void read_queries(Real* to, const Window& window, int64_t first, int64_t rows) const {
    const Real scale = static_cast<Real>(call.scale);
    for (int64_t i = 0; i < rows; ++i, to += plan.width) {
      read(to, window, first + i, 0);
      for (int64_t e = 0; e < call.head_width; ++e) to[e] *= scale;
    }
  }

  // Keys or values in rows, [tokens, width], and if wanted in panels of one tile of tokens each,
  // [keys / TILE][head_width][TILE], zeros after the last token.
  void pack(Real* rows, Real* panels, const Window& window, int which) const {
    constexpr int64_t tile = TILE<Real>;
    const int64_t width = call.head_width;
    for (int64_t n = 0; n < call.tokens; ++n, rows += plan.width) {
      read(rows, window, n, which);
      if (!panels) continue;
      Real* const column = panels + n / tile * tile * width + n % tile;
      for (int64_t e = 0; e < width; ++e) column[e * tile] = rows[e];
    }
    if (!panels || call.tokens % tile == 0) return;
    Real* const last = panels + call.tokens / tile * tile * width;
    for (int64_t e = 0; e < width; ++e)
      fill(last + e * tile + call.tokens % tile, Real(0), tile - call.tokens % tile);
  }

  // The regions of a window as numbers that vectors of scores can be compared by.
  void read_regions(Real* to, const Window& window) const {
    for (int64_t n = 0; n < call.tokens; ++n) to[n] = static_cast<Real>(window.region[n]);
    fill(to + call.tokens, Real(-1), plan.keys - call.tokens);
  }

  // The biases of a block, [rows, keys]; what is no key has a weight of 0.
  void read_biases(Real* __restrict__ to, int64_t first, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i, to += plan.keys) {
      const Real* const own = table + (call.code[first + i] + call.offset);
      for (int64_t n = 0; n < call.tokens; ++n) to[n] = own[-call.code[n]];
      fill(to + call.tokens, -infinity<Real>(), plan.keys - call.tokens);
    }
  }

  // scores = start + left . right^T, [rows, keys], of rows of heads and panels of tokens.
  void multiply_panels(Real* scores, const Real* start, const Real* left, const Real* panels,
                       int64_t rows) const {
    constexpr int64_t tile = TILE<Real>;
    for (int64_t n = 0; n < call.tokens; n += tile)
      multiply<Real>({scores + n, start ? start + n : nullptr, plan.keys, left, plan.width, 1,
                      panels + n * call.head_width, tile, call.head_width},
                     rows);
  }
};

// One row of scores with the mask, in place; from then on they are those of a window as it is.
template <typename Real>
inline void mask_row(Real* scores, const Real* regions, Real own, int64_t keys) {
  const Vector<Real> masked = splat(static_cast<Real>(MASKED)), region = splat(own);
  for (int64_t n = 0; n < keys; n += LANES<Real>)
    store(scores + n, load(scores + n) + (load(regions + n) == region ? Vector<Real>{} : masked));
}

// Whether a block of a window has a token: what would come of padding alone is dropped.
inline bool has_token(const Window& window, int64_t first, int64_t rows) {
  for (int64_t i = first; i < first + rows; ++i)
    if (window.source[i] >= 0) return true;
  return false;
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

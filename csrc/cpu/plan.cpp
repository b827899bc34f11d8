// How a call is cut into chunks, by its shape alone, and what memory that takes.
#include "operators.h"

namespace videoswin::cpu {
namespace {

constexpr int64_t MIB = 1 << 20;
// Of windows packed side by side: what the second-level cache of a core holds.
constexpr int64_t PACKED_BYTES = MIB;
constexpr int64_t MOST_SIDE = 8;
// Of the sums of all chunks.
constexpr int64_t SUMS_BYTES = 32 * MIB;
// Chunks there shall be, where there is work for as many.
constexpr int64_t FEWEST_CHUNKS = 32;
// Rows of a norm's chunk.
constexpr int64_t NORM_ROWS = 64;
// Whole tiles of every level are multiples of this, as is the place of every array.
constexpr int64_t ALIGNMENT = 128;

int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }
int64_t parts(int64_t x, int64_t y) { return (x + y - 1) / y; }

// A worker holds for each window `packs` arrays of [keys, width] and a row of regions, and for the
// rows that it works on `squares` of [rows, keys] and `strips` of [rows, width].
Plan made(const Attention& call, int64_t packs, int64_t squares, int64_t strips, int64_t sums) {
  const int64_t size = call.qkv.type == Type::float64 ? 8 : 4;
  const int64_t tile = ALIGNMENT / size;
  Plan plan;
  plan.keys = parts(call.tokens, tile) * tile;
  plan.width = parts(call.head_width, tile) * tile;
  plan.table = parts(call.table_rows, tile) * tile;
  plan.sums = sums;
  const int64_t packed = size * plan.keys * (packs * plan.width + 1);
  const int64_t windows = call.clips * call.num_windows;
  plan.side = larger(1, smaller(MOST_SIDE, PACKED_BYTES / packed));
  plan.side = larger(1, smaller(plan.side, windows * call.num_heads / FEWEST_CHUNKS));
  plan.side = smaller(plan.side, windows);
  const int64_t groups = parts(windows, plan.side);
  // As large each as the others.
  plan.side = parts(windows, groups);
  const int64_t most = larger(1, SUMS_BYTES / larger(1, 8 * sums * call.num_heads));
  plan.windows = plan.side * parts(groups, smaller(groups, most));
  plan.chunks = parts(windows, plan.windows);
  const int64_t block = ATTENTION_ROWS * (squares * plan.keys + strips * plan.width);
  plan.scratch_bytes = plan.side * packed + size * block;
  return plan;
}

}  // namespace

Plan plan(const Attention& call) { return made(call, 2, 2, 1, 0); }

Plan plan(const Attention& call, const AttentionGradients& gradients) {
  const int64_t sums =
      (gradients.grad_table ? call.table_rows : 0) + (gradients.grad_pad ? 2 * call.head_width : 0);
  return made(call, 5, 4, 3, sums);
}

int64_t norm_chunks(int64_t rows, int64_t width) {
  const int64_t most = larger(1, SUMS_BYTES / (16 * width));
  return smaller(parts(rows, NORM_ROWS), most);
}

int64_t norm_scratch_bytes(int64_t width) {
  return 8 * NORM_ARRAYS * parts(width, ALIGNMENT) * ALIGNMENT;
}

}  // namespace videoswin::cpu

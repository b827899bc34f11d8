// What the kernels for processors offer: raw pointers, index vectors, and memory that is given.
//
// Each kernel is compiled once for each level of x86-64 (level.h); `kernels()` has those of the
// best level that this processor has. Nothing here knows torch, or windows.
#pragma once

#include <cstdint>

namespace videoswin::cpu {

enum class Type { float64, float32, float16, bfloat16 };

// Of an optional one `data` is null.
struct Input {
  const void* data;
  Type type;
};

// Of one that is not asked for `data` is null.
struct Output {
  void* data;
  Type type;
};

// Calls part(context, begin, end) for ranges that cover [0, count), perhaps several at a time.
using Part = void (*)(const void* context, int64_t begin, int64_t end);
using Parallel = void (*)(int64_t count, Part part, const void* context);

// Who works on a call. What comes out does not depend on it: the shape alone cuts work into chunks,
// each with sums of its own, which are added in order.
struct Workers {
  Parallel parallel;
  int64_t count;
  int64_t bytes;  // of the scratch memory of one
  char* scratch;  // aligned to 64 bytes, as `bytes` is
};

struct Attention {
  Input qkv, pad_qkv, bias_table;  // pad_qkv is of the type of qkv
  const int32_t *source, *region, *mixed, *code;
  void* tables;  // of the arithmetic's type: [num_heads, table] of the plan, filled by the kernels
  int64_t clips, num_grid, num_windows, tokens, num_heads, head_width, table_rows, offset;
  double scale;
};

// A gradient that is not asked for is null.
struct AttentionGradients {
  const void* grad_out;     // of the type of qkv, as is grad_qkv
  const void* log_sum_exp;  // of the arithmetic's type, as are the other two gradients
  void *grad_qkv, *grad_table, *grad_pad;
  double* partial;  // of the size that `plan` says
};

// Rows of a window that are worked on at once, at most.
constexpr int64_t ATTENTION_ROWS = 28;

// How a call of attention is cut, and what memory it takes.
struct Plan {
  int64_t side;           // windows packed side by side, for which a block of biases is made once
  int64_t windows;        // of a chunk
  int64_t chunks;         // of a head
  int64_t keys;           // tokens rounded up to whole tiles
  int64_t width;          // head width rounded up to whole tiles
  int64_t table;          // rows of the bias table rounded up likewise
  int64_t sums;           // numbers that a chunk adds up: the table's, and those of pads
  int64_t scratch_bytes;  // of a worker
};

Plan plan(const Attention& call);
Plan plan(const Attention& call, const AttentionGradients& gradients);

// LayerNorm of rows; mean and rstd are of the arithmetic's type: double where x is, else float.
struct Norm {
  Input weight, bias;
  void *mean, *rstd;
  int64_t rows, width;
  double eps;
};

// Rows of `residual_norm`: those of a clip have one factor, if there is any.
struct Residual {
  Input x, branch, branch_scale;
  Output total, norm;
  int64_t rows_of_a_clip;
};

struct ResidualGradients {
  Input grad_total, grad_norm, total, branch_scale;
  Output grad_x, grad_branch;
  int64_t rows_of_a_clip;
};

// Rows of `patch_merging`: four tokens each, by `index`; -1 is padding.
struct Merging {
  Input x;
  const int32_t* index;
  int64_t merged, num_x, channels;  // merged rows and tokens of a clip
};

// Gradients of weight and bias, of the arithmetic's type, and the sums of each chunk of rows.
struct AffineGradients {
  void *weight, *bias;
  double* partial;  // [norm_chunks(rows, width), 2, width]
};

// Rows of that width that a worker holds: the row, its result, weight, bias, sums of the gradients
// of both, and one more.
constexpr int64_t NORM_ARRAYS = 7;

int64_t norm_chunks(int64_t rows, int64_t width);
int64_t norm_scratch_bytes(int64_t width);

// Copies rows of each clip: out[i] = x[index[i]], zeros where that is -1.
void gather_rows(char* out, const char* x, const int32_t* index, int64_t clips, int64_t num_x,
                 int64_t num_out, int64_t row_bytes, const Workers& workers);

struct Kernels {
  const char* level;
  void (*attention)(const Attention&, void* out, void* log_sum_exp, const Workers&);
  void (*attention_backward)(const Attention&, const AttentionGradients&, const Workers&);
  void (*residual_norm)(const Norm&, const Residual&, const Workers&);
  void (*residual_norm_backward)(const Norm&, const ResidualGradients&, const AffineGradients&,
                                 const Workers&);
  void (*patch_merging)(const Norm&, const Merging&, Output out, const Workers&);
  void (*patch_merging_backward)(const Norm&, const Merging&, Input grad, Output grad_x,
                                 const AffineGradients&, const Workers&);
  // values = exp(values), for tests: float32 or float64.
  void (*exponentials)(Output values, int64_t count);
};

// Those of a level by its number, from 0, which every processor runs; null where this one cannot
// run it, or there is none.
const Kernels* kernels_of_level(int level);
// Those of the best level, unless `choose_level` has named another one.
const Kernels& kernels();
bool choose_level(int level);

}  // namespace videoswin::cpu

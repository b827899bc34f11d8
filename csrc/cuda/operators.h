// What each kernel is launched with: raw pointers, sizes and index vectors. Tensors are contiguous
// and begin at 16 bytes; none is empty. Returns 0 or an error number for `launch_error`.
#pragma once

#include <cstdint>

namespace videoswin {

enum class Type : int { float32, float16, bfloat16 };

// Numbers whose type is known when a kernel runs; no data: not given, or not asked for.
struct Input {
  const void* data;
  Type type;
};

struct Output {
  void* data;
  Type type;
};

// What a launch failed with.
const char* launch_error(int number);

// 0 if the current device can run the kernels below, else an error number.
int probe_device();

// out[clip, i] = x[clip, index[i]], zeros where index[i] is -1; num_x and num_out rows in a clip.
int gather_rows(void* out, const void* x, const int32_t* index, int64_t clips, int64_t num_x,
                int64_t num_out, int64_t row_bytes, void* stream);

// A stage of gradients below: sums partial [parts, 2, width] over its parts, in a fixed order, into
// two vectors [width].
int column_sums(float* first, float* second, const float* partial, int64_t parts, int64_t width,
                void* stream);

// The most channels of a row that the kernels below hold in registers: where 8 divides the
// channels of a token, and else.
constexpr int64_t WIDEST = 8192;
constexpr int64_t WIDEST_ODD = 5120;

// total = x + branch_scale[clip] * branch, norm = LayerNorm(total); mean and rstd of each row.
int residual_norm(Output total, Output norm, float* mean, float* rstd, Input x, Input branch,
                  Input weight, Input bias, Input branch_scale, float eps, int64_t rows,
                  int64_t tokens, int64_t channels, void* stream);

// partial: float32 [parts, 2, channels], a workspace for the gradients of weight and bias.
int residual_norm_backward(Output grad_x, Output grad_branch, float* grad_weight, float* grad_bias,
                           float* partial, int64_t parts, Input grad_total, Input grad_norm,
                           Input total, Input weight, const float* mean, const float* rstd,
                           Input branch_scale, int64_t rows, int64_t tokens, int64_t channels,
                           void* stream);

// out = LayerNorm of the four tokens index[4 * row + corner] side by side, -1 a token of zeros;
// `rows` merged rows and `tokens` tokens in a clip, `channels` of a token.
int patch_merging(Output out, float* mean, float* rstd, Input x, const int32_t* index, Input weight,
                  Input bias, float eps, int64_t clips, int64_t tokens, int64_t rows,
                  int64_t channels, void* stream);

// partial: float32 [parts, 2, 4 * channels], parts a multiple of clips.
int patch_merging_backward(Output grad_x, float* grad_weight, float* grad_bias, float* partial,
                           int64_t parts, Input grad, Input x, const int32_t* index, Input weight,
                           const float* mean, const float* rstd, int64_t clips, int64_t tokens,
                           int64_t rows, int64_t channels, void* stream);

// A call of window attention. Windows are what `source` says; the gradients take the same call.
struct Attention {
  const void* qkv;        // [clips, num_grid, 3, num_heads, head_width]
  const void* pad_qkv;    // [3, num_heads, head_width], or null: zeros
  Type type;              // of both, and of what is written beside float32
  Input bias_table;       // [rows, num_heads]
  float* tables;          // a workspace: float32 [num_heads, table_stride]
  const int32_t* source;  // [num_windows, tokens]: a token of the clip, -1 a pad
  const int32_t* region;  // [num_windows, tokens]
  const int32_t* mixed;   // [num_windows]
  const int32_t* code;    // [tokens]: row of the table = code[query] - code[key] + offset
  int64_t clips, num_grid, num_windows, tokens, num_heads, head_width;
  int64_t offset, table_stride;
  int reach;  // the largest code: the table is read from offset - reach on
  int depth;  // of a canonical window: see attention_canonical.cu; else 0
  float scale;
};

// Numbers of a head's table, from the first that a call can read, in whole vectors.
constexpr int64_t table_stride(int64_t reach) { return (2 * reach + 1 + 3) / 4 * 4; }

// out: [clips, num_grid, num_heads, head_width], log_sum_exp: [clips, num_heads, num_grid].
int attention_forward(const Attention& call, void* out, float* log_sum_exp, void* stream);

// The same by the generic kernel, whatever the window.
int attention_generic(const Attention& call, void* out, float* log_sum_exp, void* stream);

// What the gradients of attention are computed from, and into; null: not asked for.
struct AttentionGradients {
  const void *grad_out, *out;  // as `out` of the forward
  const float* log_sum_exp;
  float *row_sums, *factors;  // workspaces: float32, as log_sum_exp
  void* grad_qkv;             // as qkv
  float* grad_table;          // [rows, num_heads]
  float* grad_bias;           // a workspace: [bias_parts, num_heads, tokens, tokens]
  int64_t bias_parts, table_rows, num_places;
  const int32_t* place;            // [num_places]: inverse of code, -1 where there is none
  float *grad_pad_k, *grad_pad_v;  // [num_heads, head_width]
  float* partial;     // a workspace: [pad_parts * key_tiles, 2, num_heads * head_width]
  int64_t pad_parts;  // the key pass goes through as many parts of all windows
};

int attention_backward(const Attention& call, const AttentionGradients& gradients, void* stream);

// Tiles of keys of a window, in the backward pass.
int64_t attention_key_tiles(int64_t tokens);

}  // namespace videoswin

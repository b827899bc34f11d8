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

}  // namespace videoswin

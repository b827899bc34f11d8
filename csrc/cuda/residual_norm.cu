// A row in registers: read once, added, normalised, written once; backward likewise.
#include "rows.cuh"

namespace videoswin {
namespace {

template <typename L>
__global__ void __launch_bounds__(L::THREADS)
    residual_norm_kernel(Output total, Output norm, float* __restrict__ mean,
                         float* __restrict__ rstd, Input x, Input branch, Input weight, Input bias,
                         Input branch_scale, float eps, int64_t rows, int64_t tokens, int width) {
  Group<L> group(dynamic_shared<float>());
  const int64_t row = static_cast<int64_t>(blockIdx.x) * L::ROWS + group.row();
  const bool is_row = row < rows;
  const int64_t start = row * width;
  Packed<L::COUNT> left[L::STEPS], right[L::STEPS];
#pragma unroll
  for (int step = 0; step < L::STEPS; ++step) {
    const bool is_inside = is_row && group.at(step) < width;
    left[step] = load_or_zero<L::COUNT>(x, start + group.at(step), is_inside);
    right[step] = load_or_zero<L::COUNT>(branch, start + group.at(step), is_inside);
  }
  const float scale = branch_scale.data && is_row ? number(branch_scale, row / tokens) : 1;

  float value[L::STEPS][L::COUNT];
#pragma unroll
  for (int step = 0; step < L::STEPS; ++step) {
    float added[L::COUNT];
    left[step].unpack(x.type, value[step]);
    right[step].unpack(branch.type, added);
#pragma unroll
    for (int i = 0; i < L::COUNT; ++i) value[step][i] = fmaf(scale, added[i], value[step][i]);
    left[step].pack(total.type, value[step]);
    if (is_row && group.at(step) < width) left[step].store(total, start + group.at(step));
    // The norm is that of the rounded sum.
    left[step].unpack(total.type, value[step]);
  }

  const auto store = [&](int step, const float (&normed)[L::COUNT]) {
    Packed<L::COUNT> packed;
    packed.pack(norm.type, normed);
    if (is_row) packed.store(norm, start + group.at(step));
  };
  const float2 moments = normalise(group, value, weight, bias, width, eps, store);
  if (is_row && group.lane() == 0) {
    mean[row] = moments.x;
    rstd[row] = moments.y;
  }
}

template <typename L>
__global__ void __launch_bounds__(L::THREADS)
    residual_norm_backward_kernel(Output grad_x, Output grad_branch, float* __restrict__ partial,
                                  Input grad_total, Input grad_norm, Input total, Input weight,
                                  const float* __restrict__ mean, const float* __restrict__ rstd,
                                  Input branch_scale, int64_t rows, int64_t tokens, int width) {
  float* const shared = dynamic_shared<float>();
  Group<L> group(shared);
  NormGradient<L> affine;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * L::ROWS; first < rows;
       first += static_cast<int64_t>(gridDim.x) * L::ROWS) {
    const int64_t row = first + group.row();
    const bool is_row = row < rows;
    const int64_t start = row * width;
    Packed<L::COUNT> ups[L::STEPS], values[L::STEPS], straight[L::STEPS];
#pragma unroll
    for (int step = 0; step < L::STEPS; ++step) {
      const bool is_inside = is_row && group.at(step) < width;
      const int64_t at = start + group.at(step);
      ups[step] = load_or_zero<L::COUNT>(grad_norm, at, is_inside && grad_norm.data);
      values[step] = load_or_zero<L::COUNT>(total, at, is_inside && grad_norm.data);
      straight[step] = load_or_zero<L::COUNT>(grad_total, at, is_inside && grad_total.data);
    }

    float grad[L::STEPS][L::COUNT], normed[L::STEPS][L::COUNT];
    if (grad_norm.data) {
      const float centre = is_row ? mean[row] : 0, scale = is_row ? rstd[row] : 0;
#pragma unroll
      for (int step = 0; step < L::STEPS; ++step) {
        ups[step].unpack(grad_norm.type, grad[step]);
        values[step].unpack(total.type, normed[step]);
#pragma unroll
        for (int i = 0; i < L::COUNT; ++i) {
          const bool is_inside = group.at(step) < width;
          normed[step][i] = is_inside ? (normed[step][i] - centre) * scale : 0;
        }
      }
      affine.add(group, grad, normed, weight, width, scale);
    }
    const float scale = branch_scale.data && is_row ? number(branch_scale, row / tokens) : 1;

#pragma unroll
    for (int step = 0; step < L::STEPS; ++step) {
      float value[L::COUNT];
      straight[step].unpack(grad_total.type, value);
#pragma unroll
      for (int i = 0; i < L::COUNT; ++i) {
        value[i] = grad_norm.data ? value[i] + grad[step][i] : value[i];
      }
      if (!is_row || group.at(step) >= width) continue;
      Packed<L::COUNT> packed;
      if (grad_x.data) {
        packed.pack(grad_x.type, value);
        packed.store(grad_x, start + group.at(step));
      }
      if (grad_branch.data) {
#pragma unroll
        for (int i = 0; i < L::COUNT; ++i) value[i] *= scale;
        packed.pack(grad_branch.type, value);
        packed.store(grad_branch, start + group.at(step));
      }
    }
  }
  if (partial) {
    float* const mine = partial + static_cast<int64_t>(blockIdx.x) * 2 * width;
    affine.store(group, mine, width, shared);
  }
}

}  // namespace

int residual_norm(Output total, Output norm, float* mean, float* rstd, Input x, Input branch,
                  Input weight, Input bias, Input branch_scale, float eps, int64_t rows,
                  int64_t tokens, int64_t channels, void* stream) {
  return with_forward_layout(channels, channels, [&](auto layout) {
    using L = decltype(layout);
    return launch(residual_norm_kernel<L>, grid_of((rows + L::ROWS - 1) / L::ROWS),
                  dim3(L::THREADS), Group<L>::SCRATCH * sizeof(float), stream, total, norm, mean,
                  rstd, x, branch, weight, bias, branch_scale, eps, rows, tokens,
                  static_cast<int>(channels));
  });
}

int residual_norm_backward(Output grad_x, Output grad_branch, float* grad_weight, float* grad_bias,
                           float* partial, int64_t parts, Input grad_total, Input grad_norm,
                           Input total, Input weight, const float* mean, const float* rstd,
                           Input branch_scale, int64_t rows, int64_t tokens, int64_t channels,
                           void* stream) {
  const int failed = with_backward_layout(channels, channels, [&](auto layout) {
    using L = decltype(layout);
    return launch(residual_norm_backward_kernel<L>, grid_of(parts), dim3(L::THREADS),
                  backward_shared<L>(channels), stream, grad_x, grad_branch, partial, grad_total,
                  grad_norm, total, weight, mean, rstd, branch_scale, rows, tokens,
                  static_cast<int>(channels));
  });
  if (failed || !partial) return failed;
  return column_sums(grad_weight, grad_bias, partial, parts, channels, stream);
}

}  // namespace videoswin

// A merged row in registers, gathered from four tokens and normalised; backward scatters likewise.
#include "rows.cuh"

namespace videoswin {
namespace {

// Where each vector of a merged row lies in x, in numbers from its clip's first; -1 in a token of
// zeros and beyond the row.
template <typename L>
__device__ __forceinline__ void find_tokens(int64_t (&source)[L::STEPS], const Group<L>& group,
                                            const int32_t* index, int64_t row, bool is_row,
                                            int channels) {
#pragma unroll
  for (int step = 0; step < L::STEPS; ++step) {
    const int at = group.at(step);
    const int corner = (at >= channels) + (at >= 2 * channels) + (at >= 3 * channels);
    const bool is_inside = is_row && at < 4 * channels;
    const int64_t token = is_inside ? index[4 * row + corner] : -1;
    source[step] = token < 0 ? -1 : token * channels + at - corner * channels;
  }
}

template <typename L>
__global__ void __launch_bounds__(L::THREADS)
    patch_merging_kernel(Output out, float* __restrict__ mean, float* __restrict__ rstd, Input x,
                         const int32_t* __restrict__ index, Input weight, Input bias, float eps,
                         int64_t tokens, int64_t rows, unsigned blocks_per_clip, int channels) {
  Group<L> group(dynamic_shared<float>());
  const int width = 4 * channels;
  const int64_t clip = blockIdx.x / blocks_per_clip;
  const int64_t row = static_cast<int64_t>(blockIdx.x % blocks_per_clip) * L::ROWS + group.row();
  const bool is_row = row < rows;
  int64_t source[L::STEPS];
  find_tokens(source, group, index, row, is_row, channels);
  Packed<L::COUNT> packed[L::STEPS];
#pragma unroll
  for (int step = 0; step < L::STEPS; ++step) {
    packed[step] =
        load_or_zero<L::COUNT>(x, clip * tokens * channels + source[step], source[step] >= 0);
  }

  float value[L::STEPS][L::COUNT];
#pragma unroll
  for (int step = 0; step < L::STEPS; ++step) packed[step].unpack(x.type, value[step]);
  const int64_t start = (clip * rows + row) * width;
  const auto store = [&](int step, const float (&normed)[L::COUNT]) {
    packed[step].pack(out.type, normed);
    if (is_row) packed[step].store(out, start + group.at(step));
  };
  const float2 moments = normalise(group, value, weight, bias, width, eps, store);
  if (is_row && group.lane() == 0) {
    mean[clip * rows + row] = moments.x;
    rstd[clip * rows + row] = moments.y;
  }
}

template <typename L>
__global__ void __launch_bounds__(L::THREADS)
    patch_merging_backward_kernel(Output grad_x, float* __restrict__ partial, Input grad, Input x,
                                  const int32_t* __restrict__ index, Input weight,
                                  const float* __restrict__ mean, const float* __restrict__ rstd,
                                  int64_t tokens, int64_t rows, unsigned blocks_per_clip,
                                  int channels) {
  float* const shared = dynamic_shared<float>();
  Group<L> group(shared);
  NormGradient<L> affine;
  const int width = 4 * channels;
  const int64_t clip = blockIdx.x / blocks_per_clip;
  for (int64_t first = static_cast<int64_t>(blockIdx.x % blocks_per_clip) * L::ROWS; first < rows;
       first += static_cast<int64_t>(blocks_per_clip) * L::ROWS) {
    const int64_t row = first + group.row();
    const bool is_row = row < rows;
    const int64_t start = (clip * rows + row) * width;
    int64_t source[L::STEPS];
    find_tokens(source, group, index, row, is_row, channels);
    Packed<L::COUNT> ups[L::STEPS], values[L::STEPS];
#pragma unroll
    for (int step = 0; step < L::STEPS; ++step) {
      const bool is_inside = is_row && group.at(step) < width;
      ups[step] = load_or_zero<L::COUNT>(grad, start + group.at(step), is_inside);
      values[step] =
          load_or_zero<L::COUNT>(x, clip * tokens * channels + source[step], source[step] >= 0);
    }
    const float centre = is_row ? mean[clip * rows + row] : 0;
    const float scale = is_row ? rstd[clip * rows + row] : 0;

    float grads[L::STEPS][L::COUNT], normed[L::STEPS][L::COUNT];
#pragma unroll
    for (int step = 0; step < L::STEPS; ++step) {
      ups[step].unpack(grad.type, grads[step]);
      values[step].unpack(x.type, normed[step]);
#pragma unroll
      for (int i = 0; i < L::COUNT; ++i) {
        const bool is_inside = group.at(step) < width;
        normed[step][i] = is_inside ? (normed[step][i] - centre) * scale : 0;
      }
    }
    affine.add(group, grads, normed, weight, width, scale);

    if (!grad_x.data) continue;
#pragma unroll
    for (int step = 0; step < L::STEPS; ++step) {
      if (source[step] < 0) continue;
      values[step].pack(grad_x.type, grads[step]);
      values[step].store(grad_x, clip * tokens * channels + source[step]);
    }
  }
  if (partial) {
    float* const mine = partial + static_cast<int64_t>(blockIdx.x) * 2 * width;
    affine.store(group, mine, width, shared);
  }
}

}  // namespace

int patch_merging(Output out, float* mean, float* rstd, Input x, const int32_t* index, Input weight,
                  Input bias, float eps, int64_t clips, int64_t tokens, int64_t rows,
                  int64_t channels, void* stream) {
  return with_forward_layout(4 * channels, channels, [&](auto layout) {
    using L = decltype(layout);
    const int64_t blocks_per_clip = (rows + L::ROWS - 1) / L::ROWS;
    return launch(patch_merging_kernel<L>, grid_of(clips * blocks_per_clip), dim3(L::THREADS),
                  Group<L>::SCRATCH * sizeof(float), stream, out, mean, rstd, x, index, weight,
                  bias, eps, tokens, rows, static_cast<unsigned>(blocks_per_clip),
                  static_cast<int>(channels));
  });
}

int patch_merging_backward(Output grad_x, float* grad_weight, float* grad_bias, float* partial,
                           int64_t parts, Input grad, Input x, const int32_t* index, Input weight,
                           const float* mean, const float* rstd, int64_t clips, int64_t tokens,
                           int64_t rows, int64_t channels, void* stream) {
  const int failed = with_backward_layout(4 * channels, channels, [&](auto layout) {
    using L = decltype(layout);
    return launch(patch_merging_backward_kernel<L>, grid_of(parts), dim3(L::THREADS),
                  backward_shared<L>(4 * channels), stream, grad_x, partial, grad, x, index, weight,
                  mean, rstd, tokens, rows, static_cast<unsigned>(parts / clips),
                  static_cast<int>(channels));
  });
  if (failed || !partial) return failed;
  return column_sums(grad_weight, grad_bias, partial, parts, 4 * channels, stream);
}

}  // namespace videoswin

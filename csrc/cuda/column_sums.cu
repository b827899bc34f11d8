// Second stage of the gradients of LayerNorm weights: partial sums added in a fixed order.
#include "rows.cuh"

namespace videoswin {
namespace {

constexpr int ACROSS = 32, DOWN = 16;

// first[c] = sum over p of partial[p, 0, c], second[c] that of partial[p, 1, c].
__global__ void __launch_bounds__(ACROSS* DOWN)
    column_sums_kernel(float* __restrict__ first, float* __restrict__ second,
                       const float* __restrict__ partial, int64_t parts, int width) {
  float* const shared = dynamic_shared<float>();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * ACROSS + threadIdx.x;
  const bool is_column = column < 2 * width;
  float sum = 0;
  if (is_column) {
#pragma unroll 8
    for (int64_t part = threadIdx.y; part < parts; part += DOWN) {
      sum += partial[part * 2 * width + column];
    }
  }
  shared[threadIdx.y * ACROSS + threadIdx.x] = sum;
  __syncthreads();

  if (threadIdx.y > 0 || !is_column) return;
  sum = 0;
  for (int row = 0; row < DOWN; ++row) sum += shared[row * ACROSS + threadIdx.x];
  if (column < width) {
    first[column] = sum;
  } else {
    second[column - width] = sum;
  }
}

}  // namespace

int column_sums(float* first, float* second, const float* partial, int64_t parts, int64_t width,
                void* stream) {
  return launch(column_sums_kernel, grid_of((2 * width + ACROSS - 1) / ACROSS), dim3(ACROSS, DOWN),
                ACROSS * DOWN * sizeof(float), stream, first, second, partial, parts,
                static_cast<int>(width));
}

}  // namespace videoswin

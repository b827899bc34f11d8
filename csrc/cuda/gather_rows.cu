// One gather moves all rows: shift, partition and reverse differ in their index vector alone.
#include <algorithm>

#include "common.cuh"
#include "operators.h"

namespace videoswin {
namespace {

constexpr int THREADS = 256;
// Rows of a thread: that many independent loads are in flight before the first is waited for.
constexpr int ROWS = 4;

// Rows of `width` units; threads lie along a row first, then across rows, without gaps.
template <typename Unit>
__global__ void __launch_bounds__(THREADS)
    gather_rows_kernel(Unit* __restrict__ out, const Unit* __restrict__ x,
                       const int32_t* __restrict__ index, int64_t num_x, int64_t num_out,
                       unsigned blocks_per_clip, int width) {
  const int64_t clip = blockIdx.x / blocks_per_clip;
  const int64_t block = blockIdx.x % blocks_per_clip;
  const int64_t first = block * blockDim.y * ROWS + threadIdx.y;
  int64_t source[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const int64_t row = first + i * blockDim.y;
    source[i] = row < num_out ? index[row] : -1;
  }

  for (int column = threadIdx.x; column < width; column += blockDim.x) {
    Unit value[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      value[i] = Unit{};
      if (source[i] >= 0) value[i] = x[(clip * num_x + source[i]) * width + column];
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64_t row = first + i * blockDim.y;
      if (row < num_out) out[(clip * num_out + row) * width + column] = value[i];
    }
  }
}

template <typename Unit>
int gather(void* out, const void* x, const int32_t* index, int64_t clips, int64_t num_x,
           int64_t num_out, int64_t row_bytes, void* stream) {
  const int64_t width = row_bytes / sizeof(Unit);
  const unsigned across = std::min<int64_t>(width, THREADS);
  const unsigned down = THREADS / across;
  const int64_t blocks_per_clip = (num_out + down * ROWS - 1) / (down * ROWS);
  return launch(gather_rows_kernel<Unit>, grid_of(clips * blocks_per_clip), dim3(across, down), 0,
                stream, static_cast<Unit*>(out), static_cast<const Unit*>(x), index, num_x, num_out,
                static_cast<unsigned>(blocks_per_clip), static_cast<int>(width));
}

}  // namespace

int probe_device() { return probe(gather_rows_kernel<uint4>); }

int gather_rows(void* out, const void* x, const int32_t* index, int64_t clips, int64_t num_x,
                int64_t num_out, int64_t row_bytes, void* stream) {
  // The widest unit that divides a row: rows then begin at a multiple of it.
  const auto run = row_bytes % 16 == 0  ? gather<uint4>
                   : row_bytes % 8 == 0 ? gather<uint2>
                   : row_bytes % 4 == 0 ? gather<uint32_t>
                   : row_bytes % 2 == 0 ? gather<uint16_t>
                                        : gather<uint8_t>;
  return run(out, x, index, clips, num_x, num_out, row_bytes, stream);
}

}  // namespace videoswin

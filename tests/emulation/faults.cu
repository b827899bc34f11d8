// A small correct kernel, and the same with one mistake planted, which somebody must notice.
#include "../../csrc/cuda/common.cuh"
#include "faults.h"

namespace videoswin {
namespace {

constexpr int TILE = 16;
constexpr int THREADS = 64;
constexpr size_t SHARED = 2 * TILE * TILE * sizeof(float16) + THREADS * sizeof(float);

// out [rows, 16] = bias + a [rows, DEPTH] b [16, DEPTH]^T, tile by tile of 16, a block for 16 rows.
// pairs [blocks, THREADS]: sums over two lanes; total: the sum of what first
// warps compute.
__global__ void __launch_bounds__(THREADS) product(Arrays arrays, Fault fault) {
  uint4* const tile_a = dynamic_shared<uint4>();
  uint4* const tile_b = tile_a + 2 * TILE;
  float* const sums = reinterpret_cast<float*>(tile_b + 2 * TILE);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t first_row = int64_t{TILE} * blockIdx.x;

  const int misplaced = fault == Fault::unaligned_load ? 1 : 0;
  const float4 bias = *reinterpret_cast<const float4*>(arrays.bias + misplaced);  // unaligned load
  float d[4] = {bias.x, bias.y, bias.z, bias.w};
  for (int k = 0; k < DEPTH; k += TILE) {
    // The first warp copies the tile of a, the second that of b, each thread half a row.
    const uint16_t* const rows = warp == 0 ? arrays.a + first_row * DEPTH : arrays.b;
    const uint16_t* from = rows + lane / 2 * DEPTH + k + lane % 2 * 8;
    uint4* to = tile_a + thread;
    if (fault == Fault::unaligned_copy && thread == 5) from += 1;
    if (fault == Fault::copy_outside && thread == 63) to += 64;
    copy_async_16(to, from);  // copy
    copy_async_commit();
    if (fault == Fault::late_wait) copy_async_wait<1>();
    if (fault != Fault::late_wait && fault != Fault::removed_wait) copy_async_wait<0>();
    if (fault != Fault::read_before_write) __syncthreads();

    uint32_t fragment_a[4], fragment_b[2];
    const void* row = tile_a + lane % 16 * 2 + lane / 16;
    if (fault == Fault::unaligned_row && thread == 40) row = static_cast<const char*>(row) + 8;
    if (fault == Fault::row_outside && thread == 40) row = tile_a + SHARED / 16;
    if (fault == Fault::row_cut_off && thread == 40) row = tile_a + SHARED / 16 - 1;
    load_matrix_x4(fragment_a, row);  // load of a
    load_matrix_x2(fragment_b, tile_b + (8 * warp + lane % 8) * 2 + lane / 8 % 2);
    if (fault == Fault::wrong_fragment) {
      const uint32_t other = fragment_a[1];
      fragment_a[1] = fragment_a[2];
      fragment_a[2] = other;
    }
    mma_m16n8k16<float16>(d, fragment_a, fragment_b);
    if (fault != Fault::write_before_read) __syncthreads();
  }
  if (fault == Fault::late_wait) copy_async_wait<0>();

  sums[thread] = d[0] + d[1] + d[2] + d[3];  // write of sums
  if (fault == Fault::shuffle_instead) {
    __shfl_xor_sync(~0u, lane, 1);
  } else if (fault != Fault::removed_syncwarp) {
    __syncwarp();
  }
  const float pair = sums[thread] + sums[thread ^ 1];  // read of sums
  arrays.pairs[THREADS * blockIdx.x + thread] = pair;
  if (fault == Fault::two_collectives && lane % 2 == 1) {
    __ballot_sync(~0u, 1);  // ballot
  } else if (fault == Fault::foreign_mask) {
    __syncwarp(0xfffffffeu);  // foreign mask
  } else if (fault == Fault::ended_lanes && lane >= 16) {
    return;
  } else if (fault == Fault::deadlock && lane >= 16) {
    __syncthreads();  // deadlocked barrier
  }
  float of_warp = d[0] + d[1] + d[2] + d[3];
  for (int apart = 16; apart > 0; apart /= 2) {
    of_warp += __shfl_xor_sync(~0u, of_warp, apart);  // shuffle
  }
  if (thread == 0 && fault != Fault::block_race) atomicAdd(arrays.total, of_warp);
  if (thread == 0 && fault == Fault::block_race) *arrays.total += of_warp;  // race of blocks
  if (fault == Fault::two_barriers && warp == 1) {
    __syncthreads();  // other barrier
  } else {
    __syncthreads();  // barrier
  }

  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + lane / 4 + i / 2 * 8;
    int64_t at = row * TILE + 8 * warp + lane % 4 * 2 + i % 2;
    const bool is_last = blockIdx.x + 1 == gridDim.x && thread == THREADS - 1 && i == 3;
    if (fault == Fault::unwritten && is_last) continue;
    arrays.out[at] = d[i];
    if (fault == Fault::global_overrun && is_last) arrays.out[at + 1] = 0;  // global overrun
  }
}

}  // namespace

int run_product(const Arrays& arrays, int blocks, Fault fault) {
  const bool is_short = fault == Fault::short_shared || fault == Fault::row_cut_off;
  const size_t missing = is_short ? sizeof(float) : 0;
  return launch(product, dim3(blocks), dim3(THREADS), SHARED - missing, nullptr, arrays, fault);
}

}  // namespace videoswin

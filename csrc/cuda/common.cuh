// What a kernel is written with: CUDA's own names and, in namespace videoswin, the numbers,
// instructions and the launch below. nvcc gives them a device, a host compiler its emulation.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "../emulation/emulation.h"
#endif

// Both give
//   float16, bfloat16                        16 bits each
//   float to_float(float16 | bfloat16)       exact
//   T round_to<T>(float)                     to nearest even; past the largest float16 is infinity
//   uint32_t pack<T>(float low, float high)  two rounded numbers in one register
//   float exp2_approx(float)                 2^x within 2^-22; subnormals are 0, given and returned
//   T* kept(T*)                              a pointer to device memory, computed where it is called
//   T* dynamic_shared<T>()                   the block's shared memory, aligned to 1024 bytes
//   copy_async_16(shared, global[, valid])   16 bytes to shared memory, zeros unless valid
//   copy_async_commit()                      closes a group of copies
//   copy_async_wait<N>()                     until at most the N latest groups are on their way
//   load_matrix_x4(r, row), load_matrix_x4_transposed, load_matrix_x2, load_matrix_x2_transposed
//                                            8 x 8 matrices of 16 bits, by a warp: a row each lane
//   mma_m16n8k16<T>(d, a, b)                 d += a b by a warp, accumulated in float
//   int launch(kernel, grid, threads, shared_bytes, stream, arguments...)
//                                            0 or an error number; an empty grid launches nothing
//   size_t shared_limit()                    bytes that a block of the current device can ask for
//   int probe(kernel)                        0, or why the current device cannot run it
//   const char* launch_error(int)            what those numbers mean
namespace videoswin {

__host__ __device__ inline float to_float(float x) { return x; }

template <>
__device__ inline float round_to<float>(float x) {
  return x;
}

// A grid of so many blocks: of more than there can be, one that no launch takes, not a small one.
inline dim3 grid_of(int64_t blocks) {
  return dim3(blocks < (int64_t{1} << 31) ? static_cast<unsigned>(blocks) : ~0u);
}

}  // namespace videoswin

// The host compiler's side of common.cuh: CUDA's language and the launch, on a CPU.
//
// Blocks run one after another, each thread of a block on a stack of its own until it waits for
// others. Not modelled: time, bank conflicts, occupancy, memory that others see later than written,
// threads that wait by reading memory in a loop (they hang), the order in which tensor cores add,
// the error of approximate instructions, and that atomicAdd of floats flushes subnormals.
#pragma once

#include <tuple>

#include "collectives.h"
#include "matrices.h"
#include "numbers.h"
#include "vectors.h"
#include "warp.h"

#define VIDEOSWIN_BUILD emulated

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

inline const uint3& threadIdx = videoswin::emulation::thread_index;
inline const uint3& blockIdx = videoswin::emulation::block_index;
inline const dim3& blockDim = videoswin::emulation::block_size;
inline const dim3& gridDim = videoswin::emulation::grid_size;

namespace videoswin {
inline namespace emulated {


template <typename T>
T* kept(T* pointer) {
  return pointer;
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::shared_memory);
}

template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes, void* /* stream */,
           A... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, {arguments...}};
  const auto run_one = [](void* data) {
    const Call& call = *static_cast<const Call*>(data);
    std::apply(call.kernel, call.arguments);
  };
  return emulation::run({grid, threads, shared_bytes}, run_one, &call);
}

// That of compute capability 9.0.
inline size_t shared_limit() { return 227 << 10; }

template <typename Kernel>
int probe(Kernel*) {
  return 0;
}

}  // namespace emulated

const char* launch_error(int number);

}  // namespace videoswin

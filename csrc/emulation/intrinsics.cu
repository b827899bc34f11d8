// Kernels of intrinsics.h. What a word is stands above each; of a thread, i is its index.
#include "../cuda/common.cuh"
// Only now is it known which build this is.
#include "intrinsics.h"

namespace videoswin {
inline namespace VIDEOSWIN_BUILD {
namespace {

static_assert(sizeof(float16) == 2 && sizeof(bfloat16) == 2);
static_assert(sizeof(uint2) == 8 && alignof(uint2) == 8 && sizeof(uint4) == 16 &&
              alignof(uint4) == 16);
static_assert(sizeof(int2) == 8 && alignof(int2) == 8 && sizeof(int4) == 16 && alignof(int4) == 16);
static_assert(sizeof(float2) == 8 && alignof(float2) == 8 && sizeof(float4) == 16 &&
              alignof(float4) == 16);

using Words = uint32_t* __restrict__;
using Given = const uint32_t* __restrict__;

constexpr unsigned ALL = ~0u;
constexpr int PATTERNS = 1 << 16;

__device__ int global_index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// Shuffles. in: value[32], source, distance or mask[32], width[1].
__global__ void shuffle(Words out, Given in) {
  const int i = threadIdx.x;
  out[i] = __shfl_sync(ALL, in[i], in[32 + i], in[64]);
}

__global__ void shuffle_up(Words out, Given in) {
  const int i = threadIdx.x;
  out[i] = __shfl_up_sync(ALL, in[i], in[32 + i], in[64]);
}

__global__ void shuffle_down(Words out, Given in) {
  const int i = threadIdx.x;
  out[i] = __shfl_down_sync(ALL, in[i], in[32 + i], in[64]);
}

__global__ void shuffle_xor(Words out, Given in) {
  const int i = threadIdx.x;
  out[i] = __shfl_xor_sync(ALL, in[i], in[32 + i], in[64]);
}

// out: as int, as float. Each half of the warp by itself.
__global__ void shuffle_in_halves(Words out, Given in) {
  const int i = threadIdx.x;
  int integer = static_cast<int>(in[i]);
  float number = __uint_as_float(in[i]);
  if (i < 16) {
    integer = __shfl_xor_sync(0x0000ffffu, integer, 5);
    number = __shfl_down_sync(0x0000ffffu, number, 3, 16);
  } else {
    number = __shfl_up_sync(0xffff0000u, number, 3, 16);
    integer = __shfl_sync(0xffff0000u, integer, 21);
  }
  out[i] = static_cast<uint32_t>(integer);
  out[32 + i] = __float_as_uint(number);
}

// out: ballot, any, all; the same of the even and of the odd lanes.
__global__ void votes(Words out, Given in) {
  const int i = threadIdx.x;
  const int vote = static_cast<int>(in[i]);
  const unsigned mask = i % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  out[i] = __ballot_sync(ALL, vote);
  out[32 + i] = __any_sync(ALL, vote);
  out[64 + i] = __all_sync(ALL, vote);
  if (i % 2 == 0) {
    out[96 + i] = __ballot_sync(mask, vote);
    out[128 + i] = __any_sync(mask, vote);
    out[160 + i] = __all_sync(mask, vote);
  } else {
    out[160 + i] = __all_sync(mask, vote);
    out[128 + i] = __any_sync(mask, vote);
    out[96 + i] = __ballot_sync(mask, vote);
  }
}

// Reversed within each warp, then within the block.
__global__ void synchronise(Words out, Given in) {
  const int i = threadIdx.x;
  uint32_t* const words = dynamic_shared<uint32_t>();
  words[i] = in[i];
  __syncwarp();
  const uint32_t reversed = words[i ^ 31];
  out[i] = reversed;
  __syncthreads();
  words[i] = reversed;
  __syncthreads();
  out[blockDim.x + i] = words[blockDim.x - 1 - i];
}

// ldmatrix. in: four matrices [8, 8] of 16 bits, whose row each lane points to[32]. out[lane, r].
template <int COUNT, bool IS_TRANSPOSED>
__global__ void load_matrix(Words out, Given in) {
  const int i = threadIdx.x;
  uint4* const rows = dynamic_shared<uint4>();
  rows[i] = reinterpret_cast<const uint4*>(in)[i];
  __syncwarp();
  const uint4* const row = rows + in[128 + i];
  uint32_t r[COUNT];
  if constexpr (COUNT == 4) {
    IS_TRANSPOSED ? load_matrix_x4_transposed(r, row) : load_matrix_x4(r, row);
  } else {
    IS_TRANSPOSED ? load_matrix_x2_transposed(r, row) : load_matrix_x2(r, row);
  }
  for (int j = 0; j < COUNT; ++j) out[COUNT * i + j] = r[j];
}

// in: a[lane, 4], b[lane, 2], d[lane, 4]. out: d[lane, 4].
template <typename T>
__global__ void multiply(Words out, Given in) {
  const int i = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int j = 0; j < 4; ++j) a[j] = in[4 * i + j];
  for (int j = 0; j < 2; ++j) b[j] = in[128 + 2 * i + j];
  for (int j = 0; j < 4; ++j) d[j] = __uint_as_float(in[192 + 4 * i + j]);
  mma_m16n8k16<T>(d, a, b);
  for (int j = 0; j < 4; ++j) out[4 * i + j] = __float_as_uint(d[j]);
}

// cp.async. in: a vector[32, 4], whether it is valid[32]. out: with and without that.
__global__ void copy_async(Words out, Given in) {
  const int i = threadIdx.x;
  uint4* const shared = dynamic_shared<uint4>();
  const uint4* const vectors = reinterpret_cast<const uint4*>(in);
  copy_async_16(&shared[i], &vectors[i], in[128 + i] != 0);
  copy_async_16(&shared[32 + i], &vectors[i]);
  copy_async_commit();
  copy_async_wait<0>();
  reinterpret_cast<uint4*>(out)[i] = shared[i];
  reinterpret_cast<uint4*>(out)[32 + i] = shared[32 + i];
}

// in: three groups [32, 4], each read as soon as it is waited for.
__global__ void copy_async_groups(Words out, Given in) {
  const int i = threadIdx.x;
  uint4* const shared = dynamic_shared<uint4>();
  uint4* const to = reinterpret_cast<uint4*>(out);
  for (int group = 0; group < 3; ++group) {
    const int at = 32 * group + i;
    copy_async_16(&shared[at], reinterpret_cast<const uint4*>(in) + at);
    copy_async_commit();
  }
  copy_async_wait<2>();
  to[i] = shared[i];
  copy_async_wait<1>();
  to[32 + i] = shared[32 + i];
  copy_async_wait<0>();
  to[64 + i] = shared[64 + i];
}

template <typename T>
__global__ void round_to_16_bits(Words out, Given in) {
  const int i = global_index();
  const T rounded = round_to<T>(__uint_as_float(in[i]));
  out[i] = *reinterpret_cast<const uint16_t*>(&rounded);
}

// in: low, high.
template <typename T>
__global__ void pack_two(Words out, Given in) {
  const int i = global_index();
  out[i] = pack<T>(__uint_as_float(in[2 * i]), __uint_as_float(in[2 * i + 1]));
}

// in: a pattern of 16 bits. out: a float; of every NaN the same.
template <typename T>
__global__ void widen(Words out, Given in) {
  const int i = global_index();
  const uint16_t bits = static_cast<uint16_t>(in[i]);
  const float wide = to_float(*reinterpret_cast<const T*>(&bits));
  out[i] = wide == wide ? __float_as_uint(wide) : 0x7fffffffu;
}

__global__ void power_of_two(Words out, Given in) {
  const int i = global_index();
  const float power = exp2_approx(__uint_as_float(in[i]));
  out[i] = power == power ? __float_as_uint(power) : 0x7fffffffu;
}

// Sums over i of equal i % 8, in global memory and in shared memory.
template <typename T>
__global__ void add_atomically(Words out, Given in) {
  const int i = threadIdx.x;
  T* const global = reinterpret_cast<T*>(out);
  T* const shared = dynamic_shared<T>();
  if (i < 8) global[i] = shared[i] = 0;
  __syncthreads();
  const T value = reinterpret_cast<const T*>(in)[i];
  atomicAdd(&global[i % 8], value);
  atomicAdd(&shared[i % 8], value);
  __syncthreads();
  if (i < 8) global[8 + i] = shared[i];
}

// in: a[256], b[256]. out: of a the bits set and the first of them; least and greatest of a and b
// as int, as unsigned, as float.
__global__ void compare_and_count(Words out, Given in) {
  const int i = threadIdx.x;
  const uint32_t a = __ldg(&in[i]), b = __ldg(&in[256 + i]);
  const int signed_a = static_cast<int>(a), signed_b = static_cast<int>(b);
  const float float_a = __uint_as_float(a), float_b = __uint_as_float(b);
  const uint32_t results[8] = {static_cast<uint32_t>(__popc(a)),
                               static_cast<uint32_t>(__ffs(signed_a)),
                               static_cast<uint32_t>(min(signed_a, signed_b)),
                               static_cast<uint32_t>(max(signed_a, signed_b)),
                               min(a, b),
                               max(a, b),
                               __float_as_uint(min(float_a, float_b)),
                               __float_as_uint(max(float_a, float_b))};
  for (int j = 0; j < 8; ++j) out[256 * j + i] = results[j];
}

// in: a, b, c [256] each. out: a b + c, rounded once.
__global__ void multiply_and_add(Words out, Given in) {
  const int i = threadIdx.x;
  out[i] = __float_as_uint(
      fmaf(__uint_as_float(in[i]), __uint_as_float(in[256 + i]), __uint_as_float(in[512 + i])));
}

// out[block, thread, axis]: index of thread, of block, their numbers, a byte each.
__global__ void indices(Words out, Given) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  uint32_t* const to = out + 3 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  to[0] = threadIdx.x | blockIdx.x << 8 | blockDim.x << 16 | gridDim.x << 24;
  to[1] = threadIdx.y | blockIdx.y << 8 | blockDim.y << 16 | gridDim.y << 24;
  to[2] = threadIdx.z | blockIdx.z << 8 | blockDim.z << 16 | gridDim.z << 24;
}

// More shared memory than a kernel gets without asking: its last words.
constexpr int LARGE = 64 << 10;
__global__ void large_shared_memory(Words out, Given in) {
  const int i = threadIdx.x;
  uint32_t* const end = dynamic_shared<uint32_t>() + LARGE / 4;
  *(end - 1 - i) = in[i];
  __syncthreads();
  out[i] = *(end - blockDim.x + i);
}

struct Intrinsic {
  const char* name;
  int words_in, words_out;
  dim3 grid, threads;
  size_t shared_bytes;
  void (*kernel)(Words, Given);
};

const Intrinsic INTRINSICS[] = {
    {"shuffle", 65, 32, 1, 32, 0, shuffle},
    {"shuffle_up", 65, 32, 1, 32, 0, shuffle_up},
    {"shuffle_down", 65, 32, 1, 32, 0, shuffle_down},
    {"shuffle_xor", 65, 32, 1, 32, 0, shuffle_xor},
    {"shuffle_in_halves", 32, 64, 1, 32, 0, shuffle_in_halves},
    {"votes", 32, 192, 1, 32, 0, votes},
    {"synchronise", 256, 512, 1, 256, 1024, synchronise},
    {"load_matrix_x4", 160, 128, 1, 32, 512, load_matrix<4, false>},
    {"load_matrix_x4_transposed", 160, 128, 1, 32, 512, load_matrix<4, true>},
    {"load_matrix_x2", 160, 64, 1, 32, 512, load_matrix<2, false>},
    {"load_matrix_x2_transposed", 160, 64, 1, 32, 512, load_matrix<2, true>},
    {"mma_float16", 320, 128, 1, 32, 0, multiply<float16>},
    {"mma_bfloat16", 320, 128, 1, 32, 0, multiply<bfloat16>},
    {"copy_async", 160, 256, 1, 32, 1024, copy_async},
    {"copy_async_groups", 384, 384, 1, 32, 1536, copy_async_groups},
    {"round_to_float16", PATTERNS, PATTERNS, PATTERNS / 256, 256, 0, round_to_16_bits<float16>},
    {"round_to_bfloat16", PATTERNS, PATTERNS, PATTERNS / 256, 256, 0, round_to_16_bits<bfloat16>},
    {"pack_float16", 2 * PATTERNS, PATTERNS, PATTERNS / 256, 256, 0, pack_two<float16>},
    {"pack_bfloat16", 2 * PATTERNS, PATTERNS, PATTERNS / 256, 256, 0, pack_two<bfloat16>},
    {"to_float_of_float16", PATTERNS, PATTERNS, PATTERNS / 256, 256, 0, widen<float16>},
    {"to_float_of_bfloat16", PATTERNS, PATTERNS, PATTERNS / 256, 256, 0, widen<bfloat16>},
    {"exp2_approx", PATTERNS, PATTERNS, PATTERNS / 256, 256, 0, power_of_two},
    {"atomic_add_int", 256, 16, 1, 256, 32, add_atomically<int>},
    {"atomic_add_unsigned", 256, 16, 1, 256, 32, add_atomically<unsigned>},
    {"atomic_add_float", 256, 16, 1, 256, 32, add_atomically<float>},
    {"compare_and_count", 512, 2048, 1, 256, 0, compare_and_count},
    {"multiply_and_add", 768, 256, 1, 256, 0, multiply_and_add},
    {"indices", 0, 3 * 30 * 24, dim3(4, 3, 2), dim3(5, 3, 2), 0, indices},
    {"large_shared_memory", 64, 64, 1, 64, LARGE, large_shared_memory},
};

}  // namespace

int intrinsic_count() { return sizeof INTRINSICS / sizeof INTRINSICS[0]; }
const char* intrinsic_name(int which) { return INTRINSICS[which].name; }
int intrinsic_words_in(int which) { return INTRINSICS[which].words_in; }
int intrinsic_words_out(int which) { return INTRINSICS[which].words_out; }

int run_intrinsic(int which, void* out, const void* in, void* stream) {
  const Intrinsic& one = INTRINSICS[which];
  return launch(one.kernel, one.grid, one.threads, one.shared_bytes, stream,
                static_cast<uint32_t*>(out), static_cast<const uint32_t*>(in));
}

}  // namespace VIDEOSWIN_BUILD
}  // namespace videoswin

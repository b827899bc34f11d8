// Numbers whose type is known when a kernel runs, in vectors of 8 or one by one.
//
// One kernel serves every mixture of types, by a branch that all threads take alike, where a kernel
// for each would make hundreds of them. It has its price: with constant types the forward of
// residual_norm takes 58 registers for 88, and so has 8 blocks on a multiprocessor for 5.
#pragma once

#include <cstring>

#include "common.cuh"
#include "operators.h"

namespace videoswin {

template <typename T>
__device__ __forceinline__ float half_to_float(uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  T half;
  memcpy(&half, &low, sizeof half);
  return to_float(half);
}

// COUNT numbers as they lie in memory. They are loaded first and converted later, so that all loads
// of a thread are in flight before the first is waited for.
template <int COUNT>
struct Packed;

template <>
struct Packed<8> {
  uint4 first = {}, second = {};

  __device__ __forceinline__ void load(Input from, int64_t at) {
    if (from.type == Type::float32) {
      const uint4* words =
          reinterpret_cast<const uint4*>(static_cast<const float*>(from.data) + at);
      first = words[0];
      second = words[1];
    } else {
      first = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from.data) + at);
    }
  }

  __device__ __forceinline__ void store(Output to, int64_t at) const {
    if (to.type == Type::float32) {
      uint4* words = reinterpret_cast<uint4*>(static_cast<float*>(to.data) + at);
      words[0] = first;
      words[1] = second;
    } else {
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to.data) + at) = first;
    }
  }

  __device__ __forceinline__ void unpack(Type type, float (&value)[8]) const {
    const uint32_t word[8] = {first.x,  first.y,  first.z,  first.w,
                              second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t half = word[i / 2] >> (i % 2 * 16);
      value[i] = type == Type::float32   ? __uint_as_float(word[i])
                 : type == Type::float16 ? half_to_float<float16>(half)
                                         : half_to_float<bfloat16>(half);
    }
  }

  __device__ __forceinline__ void pack(Type type, const float (&value)[8]) {
    uint32_t word[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      word[i] = type == Type::float32 ? __float_as_uint(value[i])
                : i >= 4              ? 0
                : type == Type::float16
                    ? videoswin::pack<float16>(value[2 * i % 8], value[2 * i % 8 + 1])
                    : videoswin::pack<bfloat16>(value[2 * i % 8], value[2 * i % 8 + 1]);
    }
    first = uint4{word[0], word[1], word[2], word[3]};
    second = uint4{word[4], word[5], word[6], word[7]};
  }
};

template <>
struct Packed<1> {
  uint32_t bits = 0;

  __device__ __forceinline__ void load(Input from, int64_t at) {
    bits = from.type == Type::float32 ? static_cast<const uint32_t*>(from.data)[at]
                                      : static_cast<const uint16_t*>(from.data)[at];
  }

  __device__ __forceinline__ void store(Output to, int64_t at) const {
    if (to.type == Type::float32) {
      static_cast<uint32_t*>(to.data)[at] = bits;
    } else {
      static_cast<uint16_t*>(to.data)[at] = static_cast<uint16_t>(bits);
    }
  }

  __device__ __forceinline__ void unpack(Type type, float (&value)[1]) const {
    value[0] = type == Type::float32   ? __uint_as_float(bits)
               : type == Type::float16 ? half_to_float<float16>(bits)
                                       : half_to_float<bfloat16>(bits);
  }

  __device__ __forceinline__ void pack(Type type, const float (&value)[1]) {
    bits = type == Type::float32   ? __float_as_uint(value[0])
           : type == Type::float16 ? videoswin::pack<float16>(value[0], 0)
                                   : videoswin::pack<bfloat16>(value[0], 0);
  }
};

// One number, for what a whole row shares.
__device__ __forceinline__ float number(Input from, int64_t at) {
  Packed<1> packed;
  float value[1];
  packed.load(from, at);
  packed.unpack(from.type, value);
  return value[0];
}

}  // namespace videoswin

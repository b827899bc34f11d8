// Rows of memory of any type as rows of the arithmetic's type, and back.
//
// Conversions of one element have no branch, so that compilers make vectors of the loops.
#pragma once

#include "level.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  // To nearest, ties to even; a NaN stays one.
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : (bits >> 16 | 0x40));
}

inline float from_float16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fff, sign = static_cast<uint32_t>(x & 0x8000) << 16;
  // Exponents differ by 112; that of infinity and NaN is the largest of both types.
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23);
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400 ? subnormal : normal));
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The sum with a half is rounded at 2^-24, the unit of subnormal numbers.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  uint32_t half = magnitude < 113u << 23 ? subnormal : normal;
  half = magnitude < 0x477ff000 ? half : special;  // 65520, the first that becomes infinite
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | half);
}

// to[i] = from[start + i].
template <typename Real>
__attribute__((noinline)) void widen(Real* __restrict__ to, Input from, int64_t start,
                                     int64_t count) {
  switch (from.type) {
    case Type::float64: {
      const double* const in = static_cast<const double*>(from.data) + start;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Real>(in[i]);
      return;
    }
    case Type::float32: {
      const float* const in = static_cast<const float*>(from.data) + start;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Real>(in[i]);
      return;
    }
    case Type::float16: {
      const uint16_t* const in = static_cast<const uint16_t*>(from.data) + start;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Real>(from_float16(in[i]));
      return;
    }
    default: {  // bfloat16
      const uint16_t* const in = static_cast<const uint16_t*>(from.data) + start;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Real>(from_bfloat16(in[i]));
    }
  }
}

// to[start + i] = from[i], rounded.
template <typename Real>
__attribute__((noinline)) void narrow(Output to, int64_t start, const Real* __restrict__ from,
                                      int64_t count) {
  switch (to.type) {
    case Type::float64: {
      double* const out = static_cast<double*>(to.data) + start;
      for (int64_t i = 0; i < count; ++i) out[i] = from[i];
      return;
    }
    case Type::float32: {
      float* const out = static_cast<float*>(to.data) + start;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(from[i]);
      return;
    }
    case Type::float16: {
      uint16_t* const out = static_cast<uint16_t*>(to.data) + start;
      for (int64_t i = 0; i < count; ++i) out[i] = to_float16(static_cast<float>(from[i]));
      return;
    }
    default: {  // bfloat16
      uint16_t* const out = static_cast<uint16_t*>(to.data) + start;
      for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(static_cast<float>(from[i]));
    }
  }
}

// Asks for memory that a later row will read: what a processor finds by itself ends with a page.
inline void fetch(Input from, int64_t start, int64_t count) {
  const int64_t size = from.type == Type::float64 ? 8 : from.type == Type::float32 ? 4 : 2;
  const char* const in = static_cast<const char*>(from.data);
  for (int64_t at = start * size; at < (start + count) * size; at += 64)
    __builtin_prefetch(in + at);
}

template <typename Real>
inline void fill(Real* to, Real value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

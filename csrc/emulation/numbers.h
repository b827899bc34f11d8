// CUDA's numbers of 16 bits in portable arithmetic, and the vocabulary of single numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

// Relaxed, so that ThreadSanitizer sees no race between two of them, and no order either.
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, float>);
  T old, sum;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    sum = old + value;
  } while (
      !__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

namespace videoswin {
inline namespace emulated {

struct float16 {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

inline float to_float(float16 x) {
  // In the fields of a float the exponent is 112 too small. The product makes subnormals normal;
  // infinity and NaN need all bits of the exponent.
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t scaled = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  return __uint_as_float(sign | scaled | (magnitude < 0x0f800000u ? 0 : 0x7f800000u));
}

template <typename T>
T round_to(float x);

template <>
inline bfloat16 round_to<bfloat16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline float16 round_to<float16>(float x) {
  const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000u;
  const uint32_t magnitude = __float_as_uint(x) & 0x7fffffffu;
  uint32_t rounded;
  if (x != x) return {0x7fff};
  if (magnitude >= 0x47800000u) {
    rounded = 0x7c00;
  } else if (magnitude < 0x38800000u) {
    // Subnormal: the last bit of a number in [0.5, 1) is worth that of the result.
    rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    // A carry out of the largest numbers gives infinity.
    rounded = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
}

template <typename T>
uint32_t pack(float low, float high) {
  return round_to<T>(low).bits | uint32_t{round_to<T>(high).bits} << 16;
}

inline float exp2_approx(float x) {
  const auto flushed = [](float y) {
    return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
  };
  return flushed(std::exp2(flushed(x)));
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// As in CUDA, of a number and NaN the number.
template <typename T>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}

}  // namespace emulated
}  // namespace videoswin

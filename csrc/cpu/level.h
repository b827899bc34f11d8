// What one level of x86-64 is to the kernels: how long a vector is, and how many registers hold.
//
// CMakeLists.txt compiles each kernel for every level. The kernels of a level stand in its
// namespace, and include nothing with inline functions of the standard library: the linker keeps
// one copy of such a function, and if that is one for a newer processor an older one dies of it.
#pragma once

#include <cstdint>

#include "operators.h"

// Its name, which the build gives: options of the user's own may add to what a level has.
#ifndef VIDEOSWIN_LEVEL
#define VIDEOSWIN_LEVEL baseline
#endif

namespace videoswin::cpu::VIDEOSWIN_LEVEL {

// Of a tile of a product two vectors of each row are in registers, beside two of the right side.
// 14 rows divide windows of 7 x 7 tokens in an even number of frames.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 14;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 6;
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 4;
#endif

template <typename Real>
struct Types {
  typedef Real vector __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename Real>
using Vector = typename Types<Real>::vector;

template <typename Real>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(Real));
// Columns of a tile.
template <typename Real>
constexpr int TILE = 2 * LANES<Real>;

template <typename Real>
inline Vector<Real> load(const Real* from) {
  Vector<Real> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <typename Real>
inline void store(Real* to, Vector<Real> x) {
  __builtin_memcpy(to, &x, sizeof x);
}

template <typename Real>
inline Vector<Real> splat(Real x) {
  return x - Vector<Real>{};
}

template <typename Real>
inline Real sum_of(Vector<Real> x) {
  // Pairs of halves: short chains, and the same order on every machine of a level.
  for (int half = LANES<Real> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

template <typename Real>
inline Vector<Real> larger(Vector<Real> x, Vector<Real> y) {
  return x > y ? x : y;
}

template <typename Real>
inline Real largest_of(Vector<Real> x) {
  Real found = x[0];
  for (int i = 1; i < LANES<Real>; ++i) found = found > x[i] ? found : x[i];
  return found;
}

// exp of x up to 0 and a little beyond; what is no normal number of float32 is 0.
//
// x = n log 2 + r with |r| <= log(2) / 2. The first part of log 2 has 9 bits, so that its product
// with n is exact. e^r = 1 + r + r^2 p(r), with p fitted to the least relative error (3e-9).
inline Vector<float> exponential(Vector<float> x) {
  using Bits = Types<uint32_t>::vector;
  // 1.5 * 2^23: a sum with it is an integer. With 127 more that is the exponent of 2^n.
  const Vector<float> magic = splat(12582912.0f + 127.0f);
  const Vector<float> shifted = x * 1.44269504f + magic;
  const Vector<float> n = shifted - magic;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> p = r * 1.3814539e-3f + 8.368745e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  const Vector<float> y = p * (r * r) + r + 1.0f;
  const Vector<float> power =
      reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(shifted) << 23);
  // A NaN is neither below nor above.
  return x <= splat(-87.3365447f) ? Vector<float>{} : y * power;
}

inline Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Work of `count` chunks, each done by f(chunk, scratch) with the memory of whoever does it.
//
// Each worker takes the next one that is left: chunks differ, as do the cores of a busy machine.
template <typename F>
inline void for_each_chunk(const Workers& workers, int64_t count, const F& f) {
  struct Context {
    const Workers& workers;
    int64_t count;
    int64_t* next;
    const F& f;
  };
  int64_t next = 0;
  const Context context{workers, count, &next, f};
  const Part part = [](const void* pointer, int64_t begin, int64_t end) {
    const Context& own = *static_cast<const Context*>(pointer);
    // A thread with several shares does the work of all with the first.
    char* const scratch = own.workers.scratch + begin * own.workers.bytes;
    if (begin == end) return;
    for (;;) {
      const int64_t chunk = __atomic_fetch_add(own.next, 1, __ATOMIC_RELAXED);
      if (chunk >= own.count) return;
      own.f(chunk, scratch);
    }
  };
  workers.parallel(workers.count < count ? workers.count : count, part, &context);
}

// Calls f(list, place, sum) for the sums of all chunks, each of `lists` of `width` numbers.
template <typename F>
inline void add_chunks(const Workers& workers, const double* partial, int64_t chunks, int64_t lists,
                       int64_t width, const F& f) {
  constexpr int64_t block = 64;
  const int64_t blocks = (width + block - 1) / block;
  for_each_chunk(workers, lists * blocks, [&](int64_t number, char*) {
    const int64_t list = number / blocks, first = number % blocks * block;
    const int64_t count = first + block < width ? block : width - first;
    double sums[block] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* const own = partial + (chunk * lists + list) * width + first;
      for (int64_t i = 0; i < count; ++i) sums[i] += own[i];
    }
    for (int64_t i = 0; i < count; ++i) f(list, first + i, sums[i]);
  });
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

// LayerNorm of a row and its gradient, and the sums of its gradients over rows.
//
// Rows are widened into scratch memory of whole vectors; what stands after the last channel is made
// to count for nothing, by zeros or by the mean.
#pragma once

#include "rows.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {

constexpr int64_t NORM_ALIGNMENT = 128;
// Rows that are added up before the sums go on in double.
constexpr int64_t ROWS_OF_A_SUM = 32;

// A vector added to one of doubles, and its upper half to another.
inline void add_wide(Vector<double>* sums, Vector<double> x) { sums[0] += x; }

inline void add_wide(Vector<double>* sums, Vector<float> x) {
  typedef float Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &x, sizeof x);
  sums[0] += __builtin_convertvector(halves[0], Vector<double>);
  sums[1] += __builtin_convertvector(halves[1], Vector<double>);
}

// The sum of f(i) over whole vectors, after each few in double: of many equal terms, such as those
// of padding, a long chain of float additions rounds each the same way.
template <typename Real, typename F>
inline double sum_over(int64_t width, const F& f) {
  constexpr int64_t lanes = LANES<Real>, few = 4;
  Vector<double> all[2] = {};
  for (int64_t i = 0; i < width; i += 2 * few * lanes) {
    Vector<Real> sums[2] = {};
    for (int64_t part = 0; part < 2 * few; ++part)
      if (i + part * lanes < width) sums[part % 2] += f(i + part * lanes);
    add_wide(all, sums[0] + sums[1]);
  }
  return sum_of<double>(all[0] + all[1]);
}

template <typename Real>
class NormRow {
 public:
  // Of the arrays that norm_scratch_bytes() counts the last is the caller's.
  NormRow(const Norm& norm, char* scratch)
      : norm_(norm),
        whole_((norm.width + LANES<Real> - 1) / LANES<Real> * LANES<Real>),
        stride_((norm.width + NORM_ALIGNMENT - 1) / NORM_ALIGNMENT * NORM_ALIGNMENT),
        memory_(reinterpret_cast<Real*>(scratch)) {
    fill(memory_, Real(0), NORM_ARRAYS * stride_);
    widen(array(2), norm.weight, 0, norm.width);
    if (norm.bias.data) widen(array(3), norm.bias, 0, norm.width);
  }

  Real* array(int number) const { return memory_ + number * stride_; }
  // The row, and what is made of it.
  Real* row() const { return array(0); }
  Real* result() const { return array(1); }

  // result = (row - mean) / deviation * weight + bias; the moments go to their places.
  void normalise(int64_t number) const {
    Real* const x = row();
    const double count = static_cast<double>(norm_.width);
    fill(x + norm_.width, Real(0), whole_ - norm_.width);
    const Real mean =
        static_cast<Real>(sum_over<Real>(whole_, [&](int64_t i) { return load(x + i); }) / count);
    // What stands after the last channel differs from it by nothing.
    fill(x + norm_.width, mean, whole_ - norm_.width);
    const double sum = sum_over<Real>(whole_, [&](int64_t i) {
      const Vector<Real> difference = load(x + i) - splat(mean);
      return difference * difference;
    });
    const Real rstd = static_cast<Real>(1 / __builtin_sqrt(sum / count + norm_.eps));
    static_cast<Real*>(norm_.mean)[number] = mean;
    static_cast<Real*>(norm_.rstd)[number] = rstd;
    for (int64_t i = 0; i < whole_; i += LANES<Real>)
      store(result() + i,
            (load(x + i) - splat(mean)) * splat(rstd) * load(array(2) + i) + load(array(3) + i));
  }

  // Of the gradient of a result, in its place, that of the row, in that of the row; and if wanted
  // what weight and bias get of it is added to arrays 4 and 5.
  void differentiate(int64_t number, bool needs_row, bool needs_affine) const {
    const Real mean = static_cast<const Real*>(norm_.mean)[number];
    const Real rstd = static_cast<const Real*>(norm_.rstd)[number];
    Real *const x = row(), *const grad = result();
    fill(x + norm_.width, mean, whole_ - norm_.width);
    for (int64_t i = 0; i < whole_; i += LANES<Real>) {
      const Vector<Real> normed = (load(x + i) - splat(mean)) * splat(rstd);
      store(x + i, normed);
      if (!needs_affine) continue;
      store(array(4) + i, load(array(4) + i) + load(grad + i) * normed);
      store(array(5) + i, load(array(5) + i) + load(grad + i));
    }
    if (!needs_row) return;
    const Real* const weight = array(2);
    const double count = static_cast<double>(norm_.width);
    const double sum =
        sum_over<Real>(whole_, [&](int64_t i) { return load(grad + i) * load(weight + i); });
    const double product = sum_over<Real>(
        whole_, [&](int64_t i) { return load(grad + i) * load(weight + i) * load(x + i); });
    const Vector<Real> first = splat(static_cast<Real>(sum / count));
    const Vector<Real> second = splat(static_cast<Real>(product / count));
    for (int64_t i = 0; i < whole_; i += LANES<Real>) {
      const Vector<Real> own = load(grad + i) * load(weight + i) - first - load(x + i) * second;
      store(x + i, own * splat(rstd));
    }
  }

  // Moves the sums of arrays 4 and 5 to those of a chunk, [2, width].
  void add_sums(double* partial) const {
    for (int which = 0; which < 2; ++which) {
      Real* const sums = array(4 + which);
      for (int64_t i = 0; i < norm_.width; ++i) partial[which * norm_.width + i] += sums[i];
      fill(sums, Real(0), whole_);
    }
  }

 private:
  const Norm& norm_;
  const int64_t whole_, stride_;
  Real* const memory_;
};

// Rows of a chunk, and after each `ROWS_OF_A_SUM` of them their sums.
template <typename Real, typename F>
inline void differentiate_rows(const Norm& norm, const AffineGradients& affine,
                               const Workers& workers, const F& f) {
  const int64_t chunks = norm_chunks(norm.rows, norm.width);
  for_each_chunk(workers, chunks, [&](int64_t chunk, char* scratch) {
    const NormRow<Real> row(norm, scratch);
    double* const partial = affine.partial ? affine.partial + chunk * 2 * norm.width : nullptr;
    if (partial) fill(partial, 0.0, 2 * norm.width);
    const int64_t begin = chunk * norm.rows / chunks, end = (chunk + 1) * norm.rows / chunks;
    for (int64_t number = begin; number < end; ++number) {
      f(row, number);
      const bool is_last = number + 1 == end || (number + 1 - begin) % ROWS_OF_A_SUM == 0;
      if (partial && is_last) row.add_sums(partial);
    }
  });
  if (!affine.partial) return;
  const auto write = [&](int64_t which, int64_t channel, double sum) {
    static_cast<Real*>(which == 0 ? affine.weight : affine.bias)[channel] = static_cast<Real>(sum);
  };
  add_chunks(workers, affine.partial, chunks, 2, norm.width, write);
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

// The residual stream and its norm, a row at a time; backward likewise.
#include "norms.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {
namespace {

template <typename Real>
inline void scale_row(Real* row, Input factors, int64_t clip, int64_t width) {
  Real factor;
  widen(&factor, factors, clip, 1);
  for (int64_t i = 0; i < width; ++i) row[i] *= factor;
}

template <typename Real>
void run(const Norm& norm, const Residual& call, const Workers& workers) {
  const int64_t chunks = norm_chunks(norm.rows, norm.width), width = norm.width;
  const bool is_rounded = call.total.type != Type::float32 && call.total.type != Type::float64;
  for_each_chunk(workers, chunks, [&](int64_t chunk, char* scratch) {
    const NormRow<Real> row(norm, scratch);
    Real *const sum = row.row(), *const branch = row.array(6);
    const int64_t end = (chunk + 1) * norm.rows / chunks;
    for (int64_t number = chunk * norm.rows / chunks; number < end; ++number) {
      const int64_t start = number * width;
      fetch(call.x, start + 2 * width, width);
      fetch(call.branch, start + 2 * width, width);
      widen(sum, call.x, start, width);
      widen(branch, call.branch, start, width);
      if (call.branch_scale.data)
        scale_row(branch, call.branch_scale, number / call.rows_of_a_clip, width);
      for (int64_t i = 0; i < width; ++i) sum[i] += branch[i];
      narrow(call.total, start, sum, width);
      // The norm is that of the rounded sum.
      if (is_rounded) widen(sum, {call.total.data, call.total.type}, start, width);
      row.normalise(number);
      narrow(call.norm, start, row.result(), width);
    }
  });
}

template <typename Real>
void run_backward(const Norm& norm, const ResidualGradients& call, const AffineGradients& affine,
                  const Workers& workers) {
  const int64_t width = norm.width;
  const bool needs_row = call.grad_x.data || call.grad_branch.data;
  differentiate_rows<Real>(norm, affine, workers, [&](const NormRow<Real>& row, int64_t number) {
    const int64_t start = number * width;
    Real* const grad = row.row();
    if (call.grad_norm.data) {
      fetch(call.total, start + 2 * width, width);
      fetch(call.grad_norm, start + 2 * width, width);
      if (call.grad_total.data) fetch(call.grad_total, start + 2 * width, width);
      widen(grad, call.total, start, width);
      widen(row.result(), call.grad_norm, start, width);
      row.differentiate(number, needs_row, affine.partial != nullptr);
    } else {
      fill(grad, Real(0), width);
    }
    if (!needs_row) return;
    if (call.grad_total.data) {
      Real* const more = row.array(6);
      widen(more, call.grad_total, start, width);
      for (int64_t i = 0; i < width; ++i) grad[i] += more[i];
    }
    if (call.grad_x.data) narrow(call.grad_x, start, grad, width);
    if (!call.grad_branch.data) return;
    if (call.branch_scale.data)
      scale_row(grad, call.branch_scale, number / call.rows_of_a_clip, width);
    narrow(call.grad_branch, start, grad, width);
  });
}

}  // namespace

void residual_norm(const Norm& norm, const Residual& call, const Workers& workers) {
  if (call.x.type == Type::float64) return run<double>(norm, call, workers);
  run<float>(norm, call, workers);
}

void residual_norm_backward(const Norm& norm, const ResidualGradients& call,
                            const AffineGradients& affine, const Workers& workers) {
  if (call.total.type == Type::float64) return run_backward<double>(norm, call, affine, workers);
  run_backward<float>(norm, call, affine, workers);
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

// Four tokens side by side, read by their index and normalised; backward likewise.
#include "norms.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {
namespace {

// Tokens of a merged row, of all clips; -1 for padding.
struct Quad {
  int64_t tokens[4];

  Quad(const Merging& call, int64_t number) {
    const int64_t clip = number / call.merged;
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t token = call.index[4 * (number % call.merged) + corner];
      tokens[corner] = token < 0 ? -1 : clip * call.num_x + token;
    }
  }
};

template <typename Real>
inline void read(Real* row, const Merging& call, const Quad& quad) {
  for (int64_t token : quad.tokens) {
    if (token < 0)
      fill(row, Real(0), call.channels);
    else
      widen(row, call.x, token * call.channels, call.channels);
    row += call.channels;
  }
}

template <typename Real>
void run(const Norm& norm, const Merging& call, Output out, const Workers& workers) {
  const int64_t chunks = norm_chunks(norm.rows, norm.width);
  for_each_chunk(workers, chunks, [&](int64_t chunk, char* scratch) {
    const NormRow<Real> row(norm, scratch);
    const int64_t end = (chunk + 1) * norm.rows / chunks;
    for (int64_t number = chunk * norm.rows / chunks; number < end; ++number) {
      read(row.row(), call, Quad(call, number));
      row.normalise(number);
      narrow(out, number * norm.width, row.result(), norm.width);
    }
  });
}

template <typename Real>
void run_backward(const Norm& norm, const Merging& call, Input grad, Output grad_x,
                  const AffineGradients& affine, const Workers& workers) {
  differentiate_rows<Real>(norm, affine, workers, [&](const NormRow<Real>& row, int64_t number) {
    const Quad quad(call, number);
    read(row.row(), call, quad);
    widen(row.result(), grad, number * norm.width, norm.width);
    row.differentiate(number, grad_x.data != nullptr, affine.partial != nullptr);
    if (!grad_x.data) return;
    // A token has one place in the merged rows.
    for (int corner = 0; corner < 4; ++corner)
      if (quad.tokens[corner] >= 0)
        narrow(grad_x, quad.tokens[corner] * call.channels, row.row() + corner * call.channels,
               call.channels);
  });
}

}  // namespace

void patch_merging(const Norm& norm, const Merging& call, Output out, const Workers& workers) {
  if (call.x.type == Type::float64) return run<double>(norm, call, out, workers);
  run<float>(norm, call, out, workers);
}

void patch_merging_backward(const Norm& norm, const Merging& call, Input grad, Output grad_x,
                            const AffineGradients& affine, const Workers& workers) {
  if (call.x.type == Type::float64)
    return run_backward<double>(norm, call, grad, grad_x, affine, workers);
  run_backward<float>(norm, call, grad, grad_x, affine, workers);
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

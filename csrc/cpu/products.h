// Small matrix products of rows in memory: tiles in registers, no packing beyond that of the
// caller.
#pragma once

#include "level.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {

// Sums of more terms are sums of sums of so many: a chain of roundings is off by more, the longer.
constexpr int64_t CHAIN = 64;

// out[m, n] = start[m, n] + sum over k of left[m, k] * right[k, n], for n of one tile.
//
// `left` may stand in memory either way, by its strides. Without `start` there is none, and where
// it `adds` the old out[m, n] is one more term.
template <typename Real>
struct Product {
  Real* out;
  const Real* start;
  int64_t out_row;  // from a row of out, or of start, to the next
  const Real* left;
  int64_t left_row, left_step;
  const Real* right;
  int64_t right_row, depth;
  bool adds = false;
};

template <typename Real, int ROWS>
__attribute__((noinline)) void multiply_tile(const Product<Real>& call) {
  Vector<Real> sum[ROWS][2] = {};
  const int64_t left_row = call.left_row, left_step = call.left_step, right_row = call.right_row;
  const Real *left = call.left, *right = call.right;
  for (int64_t k = 0; k < call.depth; ++k) {
    const Vector<Real> first = load(right), second = load(right + LANES<Real>);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const Real factor = left[m * left_row];
      sum[m][0] += factor * first;
      sum[m][1] += factor * second;
    }
    left += left_step;
    right += right_row;
  }
  if (call.adds) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      sum[m][0] += load(call.out + m * call.out_row);
      sum[m][1] += load(call.out + m * call.out_row + LANES<Real>);
    }
  }
  if (call.start) {
    // Last: as their beginning a large bias would cost each of the sums a few bits.
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      sum[m][0] += load(call.start + m * call.out_row);
      sum[m][1] += load(call.start + m * call.out_row + LANES<Real>);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    store(call.out + m * call.out_row, sum[m][0]);
    store(call.out + m * call.out_row + LANES<Real>, sum[m][1]);
  }
}

template <typename Real, int ROWS>
inline void multiply_rest(const Product<Real>& call, int64_t rows) {
  if (rows == ROWS) return multiply_tile<Real, ROWS>(call);
  if constexpr (ROWS > 1) multiply_rest<Real, ROWS - 1>(call, rows);
}

// The product of any number of rows.
template <typename Real>
inline void multiply_rows(Product<Real> call, int64_t rows) {
  for (; rows > TILE_ROWS; rows -= TILE_ROWS) {
    multiply_tile<Real, TILE_ROWS>(call);
    call.out += TILE_ROWS * call.out_row;
    if (call.start) call.start += TILE_ROWS * call.out_row;
    call.left += TILE_ROWS * call.left_row;
  }
  multiply_rest<Real, TILE_ROWS>(call, rows);
}

// The product of any number of rows and terms.
template <typename Real>
inline void multiply(Product<Real> call, int64_t rows) {
  while (call.depth > CHAIN) {
    Product<Real> part = call;
    part.start = nullptr;
    part.depth = CHAIN;
    multiply_rows(part, rows);
    call.adds = true;
    call.left += CHAIN * call.left_step;
    call.right += CHAIN * call.right_row;
    call.depth -= CHAIN;
  }
  multiply_rows(call, rows);
}

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL

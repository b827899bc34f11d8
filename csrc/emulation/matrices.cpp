// ldmatrix and mma.sync as the PTX manual lays out their fragments: of lane l, group g = l / 4 and
// pair p = l % 4.
#include "matrices.h"

namespace videoswin::emulation {
namespace {

struct Load {
  uint32_t* r;
  const void* row;
};

// r[m] of lane l: row g of matrix m, columns 2 p and 2 p + 1; transposed, column g and those rows.
template <int COUNT, bool IS_TRANSPOSED>
void combine_load(Arguments arguments, unsigned) {
  uint16_t matrix[COUNT][8][8];
  for (int i = 0; i < 8 * COUNT; ++i) {
    std::memcpy(matrix[i / 8][i % 8], static_cast<Load*>(arguments[i])->row, sizeof matrix[0][0]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, first = lane % 4 * 2, second = first + 1;
    for (int m = 0; m < COUNT; ++m) {
      const auto& from = matrix[m];
      const uint32_t low = IS_TRANSPOSED ? from[first][group] : from[group][first];
      const uint32_t high = IS_TRANSPOSED ? from[second][group] : from[group][second];
      static_cast<Load*>(arguments[lane])->r[m] = low | high << 16;
    }
  }
}

struct Product {
  float* d;
  const uint32_t *a, *b;
};

template <typename T>
void unpack(float* two, uint32_t bits, int stride = 1) {
  two[0] = to_float(T{static_cast<uint16_t>(bits)});
  two[stride] = to_float(T{static_cast<uint16_t>(bits >> 16)});
}

template <typename T>
void combine_product(Arguments arguments, unsigned) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *static_cast<const Product*>(arguments[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) unpack<T>(&a[group + i % 2 * 8][pair + i / 2 * 8], from.a[i]);
    for (int i = 0; i < 2; ++i) unpack<T>(&b[pair + i * 8][group], from.b[i], 8);
    for (int i = 0; i < 4; ++i) d[group + i / 2 * 8][pair + i % 2] = from.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& to = *static_cast<const Product*>(arguments[lane]);
    for (int i = 0; i < 4; ++i) to.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void check_warp(const Place& place) {
  if (lanes() != ~0u) fail(place, "needs a warp of 32 threads");
}

}  // namespace

void load_matrix(uint32_t* r, const void* row, int count, bool is_transposed, const Place& place) {
  check_warp(place);
  if (static_cast<int>(lane()) < 8 * count) check_shared(row, place);
  Load load{r, row};
  meet(~0u, place, &load,
       count == 4      ? is_transposed ? combine_load<4, true> : combine_load<4, false>
       : is_transposed ? combine_load<2, true>
                       : combine_load<2, false>);
}

template <typename T>
void multiply(float* d, const uint32_t* a, const uint32_t* b, const Place& place) {
  check_warp(place);
  Product product{d, a, b};
  meet(~0u, place, &product, combine_product<T>);
}

template void multiply<float16>(float*, const uint32_t*, const uint32_t*, const Place&);
template void multiply<bfloat16>(float*, const uint32_t*, const uint32_t*, const Place&);

}  // namespace videoswin::emulation

// Attention in canonical windows, 7 x 7 tokens by 8 or 16 frames, of heads of 32 channels: all keys
// and values of a window lie in shared memory at once, with the table of the head.
//
// The depth is innermost in a window, so a tile of 8 keys is 8 frames of one place (h, w), and a
// pair's row in the table is a register less a constant: a bias is one load, of an accumulator's
// initial value. For that the table is divided by the scale, and scale * log2(e) is multiplied in
// where the level is subtracted: neither costs an instruction. Two tiles of queries share what is
// read of keys and values.
#include "attention.cuh"

// Of eight exponentials, how many are computed on the units of float32, beside the special ones.
#ifndef VIDEOSWIN_EXP2_ON_FMA
#define VIDEOSWIN_EXP2_ON_FMA 0
#endif

namespace videoswin {
namespace {

constexpr int E = 32;
// Bytes of 8 keys, or of their values.
constexpr int TILE = 8 * E * 2;
// Tiles of keys in a step, which has the scores of all: 128 registers hold that many and the rest.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int STEP = 2;
#else
constexpr int STEP = 4;
#endif
// A level stays while no score passes it by more than this many powers of 2: weights may exceed 1,
// and few tiles have all that was summed multiplied again.
constexpr float SLACK = 8;
// A level where there was no score yet: no number that a score, or a sum of two, can be.
constexpr float NO_LEVEL = -1e30f;

template <int DEPTH>
struct Canonical {
  static constexpr int TOKENS = 49 * DEPTH, TILES = TOKENS / 8;
  static constexpr int WARPS = DEPTH == 8 ? 7 : 13, BLOCKS = DEPTH == 8 ? 2 : 1;
  // In the table's own coordinates, a step along the depth and along the height.
  static constexpr int FRAME = 13 * 13, LINE = 13;
  static constexpr int REACH = (DEPTH - 1) * FRAME + 6 * LINE + 6;
  static constexpr int NUMBERS = table_stride(REACH);
  // Tiles whose places in the table differ by constants, and how far those of the next ones lie.
  static constexpr int TURN = 14, TURN_CODE = DEPTH == 8 ? 2 * LINE : LINE;

  // From a key to its value.
  static constexpr int VALUES = TOKENS * 2 * E;

  struct alignas(16) Shared {
    unsigned char k[VALUES], v[VALUES];
    float table[NUMBERS];
    int region[TOKENS];
  };

  static __device__ constexpr int code(int tile) {
    return DEPTH == 8 ? tile / 7 * LINE + tile % 7 : tile / 2 + tile % 2 * 8 * FRAME;
  }
};

// 2^x within 1.03e-4 of it, for x up to 127; 0 at and below -127.
__device__ __forceinline__ float exp2_on_fma(float x) {
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = max(x, -127.0f);
  const float whole = x + ROUND;
  const float rest = x - (whole - ROUND);
  float power = fmaf(rest, 0.0550075956f, 0.242207929f);
  power = fmaf(power, rest, 0.693282723f);
  power = fmaf(power, rest, 1.0f);
  return __uint_as_float(__float_as_uint(power) + (__float_as_uint(whole) << 23));
}

// Of four lanes each word j becomes that of lane j which its own lane numbers.
__device__ __forceinline__ void transpose_words(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool is_upper = (lane_pair() & step) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t given = is_upper ? word[j] : word[j | step];
      const uint32_t taken = __shfl_xor_sync(ALL_LANES, given, step);
      (is_upper ? word[j] : word[j | step]) = taken;
    }
  }
}

// Where a lane reads what it gives to products with the keys of a turn, and with their values.
struct Turn {
  const unsigned char *k, *v[2];
  const int* region;

  template <typename Shared>
  __device__ __forceinline__ explicit Turn(Shared& shared) {
    const int lane = threadIdx.x % 32;
    const Rows<float16, E> keys{shared.k}, values{shared.v};
    k = keys.at(lane % 8, lane / 8);
    for (int i = 0; i < 2; ++i) v[i] = values.at(lane % 16, 2 * i + lane / 16);
    region = shared.region + 2 * lane_pair();
  }

  __device__ __forceinline__ void advance(int tiles) {
    k += tiles * TILE;
    v[0] += tiles * TILE;
    v[1] += tiles * TILE;
    region += tiles * 8;
  }
};

// 32 queries of a warp: what is summed of them while keys go by.
template <typename T, int DEPTH>
struct Queries32 {
  using C = Canonical<DEPTH>;
  uint32_t q[2][2][4];
  // Of rows g, g + 8, g + 16 and g + 24.
  const float* bias[4];
  uint32_t regions;  // a byte each
  // In powers of 2, what weights are relative to; and their sum.
  float level[4], total[4];
  float result[2][4][4];

  __device__ __forceinline__ void begin(const Attention& a, const Window<T>& window,
                                        const float* table, int first) {
    const TokenRows<T> rows = window.rows(0);
    const uint32_t sign = a.scale < 0 ? 0x80008000u : 0;
    regions = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int place = first + 8 * r + lane_group();
      const int column = window.inside(place) / DEPTH, depth = place % DEPTH;
      const int token = window.token(place);
      regions |= static_cast<uint32_t>(window.region[window.inside(place)]) << 8 * r;
      bias[r] = table + C::REACH + column / 7 * C::LINE + column % 7 +
                (depth - 2 * lane_pair()) * C::FRAME;
      level[r] = NO_LEVEL;
      total[r] = 0;
      const T* const row = rows.first + (token < 0 ? 0 : token) * rows.stride;
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(row) + lane_pair();
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const uint32_t word = token < 0 ? 0 : words[part * 4] ^ sign;
        q[r / 2][part / 2][r % 2 + part % 2 * 2] = word;
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int c = 0; c < E / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) result[tile][c][i] = 0;
      }
    }
  }

  // Tiles FIRST to END - 1 of keys, so many in a step.
  template <int TILES, int FIRST, int END>
  __device__ __forceinline__ void add_tiles(const Turn& turn, bool is_mixed, float factor,
                                            float masked) {
    if constexpr (FIRST < END) {
      constexpr int COUNT = END - FIRST < TILES ? END - FIRST : TILES;
      add<FIRST, COUNT>(turn, is_mixed, factor, masked);
      add_tiles<TILES, FIRST + COUNT, END>(turn, is_mixed, factor, masked);
    }
  }

  // COUNT tiles of keys, the first being FIRST of its turn.
  template <int FIRST, int COUNT>
  __device__ __forceinline__ void add(const Turn& turn, bool is_mixed, float factor, float masked) {
    float weight[2][COUNT][4];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        weight[i / 4][n][i % 4] = bias[i / 2][-C::code(FIRST + n) - i % 2 * C::FRAME];
      }
      uint32_t b[4];
      load_matrix_x4(b, turn.k + (FIRST + n) * TILE);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        multiply_tile<T>(weight[tile][n], q[tile][0], b[0], b[1]);
        multiply_tile<T>(weight[tile][n], q[tile][1], b[2], b[3]);
      }
    }
    if (is_mixed) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        const int* const from = turn.region + (FIRST + n) * 8;
        const int2 column = *reinterpret_cast<const int2*>(from);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = regions >> i / 2 * 8 & 0xff;
          const bool differs = row != (i % 2 ? column.y : column.x);
          weight[i / 4][n][i % 4] += differs ? masked : 0;
        }
      }
    }

    float highest[4];
    bool is_above = false;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      highest[r] = -INFINITY;
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        const float (&row)[4] = weight[r / 2][n];
        highest[r] = max(highest[r], max(row[r % 2 * 2], row[r % 2 * 2 + 1]));
      }
      is_above = is_above || fmaf(highest[r], factor, -level[r]) > SLACK;
    }
    if (__any_sync(ALL_LANES, is_above)) raise_levels(highest, factor);

#pragma unroll
    for (int n = 0; n < COUNT; n += 2) {
      uint32_t left[2][4] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (n + i % 4 / 2 >= COUNT) continue;
        const int r = i / 4 * 2 + i % 2;
        const float (&score)[4] = weight[i / 4][n + i % 4 / 2];
        float power[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = fmaf(score[i % 2 * 2 + j], factor, -level[r]);
          const bool is_on_fma = (n * 8 + i * 2 + j) % 8 < VIDEOSWIN_EXP2_ON_FMA;
          power[j] = is_on_fma ? exp2_on_fma(x) : exp2_approx(x);
        }
        total[r] += power[0] + power[1];
        left[i / 4][i % 4] = pack<T>(power[0], power[1]);
      }
      if (n + 1 < COUNT) {
#pragma unroll
        for (int c = 0; c < E / 8; c += 2) {
          uint32_t b[4];
          load_matrix_x4_transposed(b, turn.v[c / 2] + (FIRST + n) * TILE);
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            multiply_tile<T>(result[tile][c], left[tile], b[0], b[1]);
            multiply_tile<T>(result[tile][c + 1], left[tile], b[2], b[3]);
          }
        }
      } else {
        // A last tile alone: the other half of the product is of zeros.
        uint32_t b[4];
        load_matrix_x4_transposed(b, turn.k + C::VALUES + (FIRST + n) * TILE);
#pragma unroll
        for (int c = 0; c < E / 8; ++c) {
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            multiply_tile<T>(result[tile][c], left[tile], b[c], 0);
          }
        }
      }
    }
  }

  // To the highest scores so far: a warp does so when one of its rows must.
  __device__ __forceinline__ void raise_levels(const float (&highest)[4], float factor) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float before = level[r];
      level[r] = max(before, row_max(highest[r]) * factor);
      const float fading = exp2_approx(before - level[r]);
      total[r] *= fading;
#pragma unroll
      for (int c = 0; c < E / 8; ++c) {
        result[r / 2][c][r % 2 * 2] *= fading;
        result[r / 2][c][r % 2 * 2 + 1] *= fading;
      }
    }
  }

  __device__ __forceinline__ void end(const Window<T>& window, int first, T* out,
                                      float* log_sum_exp) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int token = window.token(first + 8 * r + lane_group());
      const float sum = row_sum(total[r]), inverse = 1 / sum;
      uint32_t word[4];
#pragma unroll
      for (int c = 0; c < E / 8; ++c) {
        const float (&pair)[4] = result[r / 2][c];
        word[c] = pack<T>(pair[r % 2 * 2] * inverse, pair[r % 2 * 2 + 1] * inverse);
      }
      transpose_words(word);
      if (token < 0) continue;
      T* const to = out + window.first + token * window.width + 8 * lane_pair();
      *reinterpret_cast<uint4*>(to) = uint4{word[0], word[1], word[2], word[3]};
      if (lane_pair() == 0) {
        log_sum_exp[window.row + token] = (level[r] + log2f(sum)) * LN_2;
      }
    }
  }
};

template <typename T, int DEPTH>
__global__ void __launch_bounds__(Canonical<DEPTH>::WARPS * 32, Canonical<DEPTH>::BLOCKS)
    attention_canonical_kernel(Attention a, T* __restrict__ out, float* __restrict__ log_sum_exp,
                               float factor, float masked) {
  using C = Canonical<DEPTH>;
  auto* const shared = dynamic_shared<typename C::Shared>();
  const unsigned heads = static_cast<unsigned>(a.num_heads);
  // Made again where it is needed: kept, it would take registers from the loop over keys.
  const auto here = [&] {
    const unsigned block = opaque(blockIdx.x);
    return Window<T>(a, block % heads, block / heads);
  };
  const Window<T> window = here();
  window.rows(1).gather(Rows<T, E>{shared->k}, window.source, 0, C::TOKENS, C::TOKENS);
  window.rows(2).gather(Rows<T, E>{shared->v}, window.source, 0, C::TOKENS, C::TOKENS);
  const float* const table = a.tables + window.head * a.table_stride;
  for (int i = threadIdx.x * 4; i < C::NUMBERS; i += blockDim.x * 4) {
    copy_async_16(shared->table + i, table + i);
  }
  copy_async_commit();
  for (int i = threadIdx.x; i < C::TOKENS; i += blockDim.x) shared->region[i] = window.region[i];

  const bool is_mixed = window.is_mixed;
  copy_async_wait<0>();
  __syncthreads();
  for (int first = threadIdx.x / 32 * 32; first < C::TOKENS; first += C::WARPS * 32) {
    Queries32<T, DEPTH> queries;
    queries.begin(a, here(), shared->table, first);
    Turn turn(*shared);
#pragma unroll 1
    for (int i = 0; i < C::TILES / C::TURN; ++i) {
      queries.template add_tiles<STEP, 0, C::TURN>(turn, is_mixed, factor, masked);
      turn.advance(C::TURN);
      for (int r = 0; r < 4; ++r) queries.bias[r] -= C::TURN_CODE;
    }
    if constexpr (C::TILES % C::TURN) {
      queries.template add_tiles<2, 0, C::TILES % C::TURN>(turn, is_mixed, factor, masked);
    }
    queries.end(here(), first, out, log_sum_exp);
  }
}

// Whether a call has a canonical window, numbers for tensor cores, and a scale to divide by.
template <int DEPTH>
bool is_canonical(const Attention& call) {
  const float scale = std::fabs(call.scale);
  return call.depth == DEPTH && call.type != Type::float32 && call.head_width == E &&
         scale > 0x1p-40f && scale < 0x1p40f &&
         sizeof(typename Canonical<DEPTH>::Shared) <= shared_limit();
}

template <int DEPTH>
int launch_canonical(const Attention& call, void* out, float* log_sum_exp, void* stream) {
  const float scale = std::fabs(call.scale);
  const int failed = spread_tables(call, 1 / scale, stream);
  if (failed) return failed;
  using C = Canonical<DEPTH>;
  const dim3 grid = grid_of(call.clips * call.num_windows * call.num_heads);
  const auto launch_of = [&](auto number) {
    using T = decltype(number);
    return launch(attention_canonical_kernel<T, DEPTH>, grid, dim3(C::WARPS * 32),
                  sizeof(typename C::Shared), stream, call, static_cast<T*>(out), log_sum_exp,
                  scale * LOG2_E, MASKED / scale);
  };
  return call.type == Type::float16 ? launch_of(float16()) : launch_of(bfloat16());
}

}  // namespace

int attention_forward(const Attention& call, void* out, float* log_sum_exp, void* stream) {
  if (is_canonical<8>(call)) return launch_canonical<8>(call, out, log_sum_exp, stream);
  if (is_canonical<16>(call)) return launch_canonical<16>(call, out, log_sum_exp, stream);
  return attention_generic(call, out, log_sum_exp, stream);
}

}  // namespace videoswin

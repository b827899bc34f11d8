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
// Tiles of keys in a step, which has the scores of all: of 4, registers do not hold the rest as
// well.
constexpr int STEP = 2;
// A level stays while no score passes it by more than this many powers of 2: weights may exceed 1,
// and few tiles have all that was summed multiplied again.
constexpr float SLACK = 8;
// A level where there was no score yet.
constexpr float NO_LEVEL = -HIGHEST;
// A level beyond it is subtracted from scores before they are multiplied. Of a smaller one the
// product is, by whose rounding all weights of a row are off alike: by at most 2^-13.
constexpr float LARGE = 2048;

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

  // Whole times what a warp has.
  static constexpr int QUERIES = (TOKENS + 31) / 32 * 32;
  // From a key to its value.
  static constexpr int VALUES = TOKENS * 2 * E;

  struct alignas(16) Shared {
    unsigned char k[VALUES], v[VALUES];
    float table[NUMBERS];
    int region[QUERIES];
    float large_level[WARPS * 32][4];
    int head, clip, window;
  };

  static __device__ constexpr int code(int tile) {
    return DEPTH == 8 ? tile / 7 * LINE + tile % 7 : tile / 2 + tile % 2 * 8 * FRAME;
  }
};

// 2^x within 1.03e-4 of it, for x up to 127; 0 at and below -127, and of what is not a number.
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
  const int* region;  // of row g; the others' follow every 8
  // In powers of 2, what weights are relative to; and their sum.
  float level[4], total[4];
  // Where one of the warp's levels is, all of them are 0, and stand in units of scores elsewhere;
  // they are then raised in every step.
  bool is_large;
  float result[2][4][4];

  static __device__ __forceinline__ float (&large_level())[4] {
    return dynamic_shared<typename C::Shared>()->large_level[threadIdx.x];
  }

  __device__ __forceinline__ void begin(const Attention& a, const Window<T>& window,
                                        const float* table, int first) {
    const TokenRows<T> rows = window.rows(0);
    const uint32_t sign = a.scale < 0 ? 0x80008000u : 0;
    is_large = false;
    region = dynamic_shared<typename C::Shared>()->region + first + lane_group();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int place = first + 8 * r + lane_group();
      const int column = window.inside(place) / DEPTH, depth = place % DEPTH;
      const int token = window.token(place);
      bias[r] = table + C::REACH + column / 7 * C::LINE + column % 7 +
                (depth - 2 * lane_pair()) * C::FRAME;
      level[r] = NO_LEVEL;
      total[r] = 0;
      const T* const row = rows.at(max(token, 0));
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

  // Tiles FIRST to END - 1 of keys.
  template <int FIRST, int END>
  __device__ __forceinline__ void add_tiles(const Turn& turn, bool is_mixed, float factor,
                                            float masked) {
    if constexpr (FIRST < END) {
      constexpr int COUNT = END - FIRST < STEP ? END - FIRST : STEP;
      add<FIRST, COUNT>(turn, is_mixed, factor, masked);
      add_tiles<FIRST + COUNT, END>(turn, is_mixed, factor, masked);
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
          const bool differs = region[i / 2 * 8] != (i % 2 ? column.y : column.x);
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
    if (__any_sync(ALL_LANES, is_above || is_large)) raise_levels(highest, factor);
    if (is_large) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
          weight[r / 2][n][r % 2 * 2] -= large_level()[r];
          weight[r / 2][n][r % 2 * 2 + 1] -= large_level()[r];
        }
      }
    }

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
    const float inverse = 1 / factor;
    float top[4];
    bool becomes_large = false;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      top[r] = row_max(highest[r]);
      const float reached = max(top[r], is_large ? large_level()[r] : level[r] * inverse);
      becomes_large = becomes_large || (reached > NO_LEVEL && fabsf(reached) * factor > LARGE);
    }
    becomes_large = __any_sync(ALL_LANES, becomes_large);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float fading;
      if (is_large || becomes_large) {
        const float before = is_large ? large_level()[r] : level[r] * inverse;
        const float next = max(max(before, top[r]), NO_LEVEL);
        fading = exp2_approx((before - next) * factor);
        large_level()[r] = next;
        level[r] = becomes_large ? 0 : next * factor;
      } else {
        const float before = level[r];
        level[r] = max(before, top[r] * factor);
        fading = exp2_approx(before - level[r]);
      }
      total[r] *= fading;
#pragma unroll
      for (int c = 0; c < E / 8; ++c) {
        result[r / 2][c][r % 2 * 2] *= fading;
        result[r / 2][c][r % 2 * 2 + 1] *= fading;
      }
    }
    is_large = becomes_large;
  }

  __device__ __forceinline__ void end(const Window<T>& window, int first, T* out,
                                      float* log_sum_exp, float factor) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int token = window.token(first + 8 * r + lane_group());
      const float sum = row_sum(total[r]);
      T* const to = out + window.first + token * window.width;
      store_row<T, E>(to, token >= 0, result[r / 2], r % 2, 1 / sum);
      if (token >= 0 && lane_pair() == 0) {
        const float powers = is_large ? large_level()[r] * factor : level[r];
        log_sum_exp[window.row + token] = (powers + log2f(sum)) * LN_2;
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
  if (threadIdx.x == 0) {
    const unsigned heads = static_cast<unsigned>(a.num_heads);
    const unsigned windows = static_cast<unsigned>(a.num_windows);
    shared->head = blockIdx.x % heads;
    shared->clip = blockIdx.x / heads / windows;
    shared->window = blockIdx.x / heads % windows;
  }
  __syncthreads();
  // Made again where it is needed: kept, it would take registers from the loop over keys.
  const auto here = [&] { return Window<T>(a, shared->head, shared->clip, shared->window); };
  const Window<T> window = here();
  window.gather_keys(Rows<T, E>{shared->k}, Rows<T, E>{shared->v}, 0, C::TOKENS);
  const float* const table = a.tables + window.head * a.table_stride;
  for (int i = threadIdx.x * 4; i < C::NUMBERS; i += blockDim.x * 4) {
    copy_async_16(shared->table + i, table + i);
  }
  copy_async_commit();
  for (int i = threadIdx.x; i < C::QUERIES; i += blockDim.x) {
    shared->region[i] = window.region[window.inside(i)];
  }

  const bool is_mixed = window.is_mixed;
  copy_async_wait<0>();
  __syncthreads();
  for (int first = threadIdx.x / 32 * 32; first < C::TOKENS; first += C::WARPS * 32) {
    Queries32<T, DEPTH> queries;
    queries.begin(a, here(), shared->table, first);
    Turn turn(*shared);
#pragma unroll 1
    for (int i = 0; i < C::TILES / C::TURN; ++i) {
      queries.template add_tiles<0, C::TURN>(turn, is_mixed, factor, masked);
      turn.advance(C::TURN);
      for (int r = 0; r < 4; ++r) queries.bias[r] -= C::TURN_CODE;
    }
    if constexpr (C::TILES % C::TURN) {
      queries.template add_tiles<0, C::TILES % C::TURN>(turn, is_mixed, factor, masked);
    }
    queries.end(here(), first, out, log_sum_exp, factor);
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

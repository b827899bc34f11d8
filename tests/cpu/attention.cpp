// Attention and its gradients against loops over pairs of tokens, in double.
#include <array>

#include "check.h"

namespace check {
namespace {

using Triple = std::array<int64_t, 3>;  // depth, height, width

int64_t product(Triple x) { return x[0] * x[1] * x[2]; }

// The vectors of videoswin_kernels/geometry.py, with the depth innermost in windows.
struct Geometry {
  int64_t num_grid, num_windows, tokens, table_rows, offset;
  std::vector<int32_t> source, region, mixed, code;

  Geometry(Triple grid, Triple configured, Triple shift) {
    Triple window, counts, padded;
    for (int axis = 0; axis < 3; ++axis) {
      const bool is_one_window = grid[axis] <= configured[axis];
      window[axis] = is_one_window ? grid[axis] : configured[axis];
      if (is_one_window) shift[axis] = 0;
      counts[axis] = (grid[axis] + window[axis] - 1) / window[axis];
      padded[axis] = counts[axis] * window[axis];
    }
    const int64_t row = 2 * configured[2] - 1, plane = (2 * configured[1] - 1) * row;
    const auto code_of = [&](int64_t raster) {
      return raster / (configured[1] * configured[2]) * plane +
             raster / configured[2] % configured[1] * row + raster % configured[2];
    };
    num_grid = product(grid), num_windows = product(counts), tokens = product(window);
    table_rows = (2 * configured[0] - 1) * plane, offset = code_of(product(configured) - 1);
    source.resize(num_windows * tokens), region.resize(num_windows * tokens);
    mixed.resize(num_windows), code.resize(tokens);
    for (int64_t m = 0; m < num_windows; ++m) {
      const Triple which = {m / counts[2] / counts[1], m / counts[2] % counts[1], m % counts[2]};
      for (int64_t n = 0; n < tokens; ++n) {
        const Triple place = {n % window[0], n / window[0] / window[2], n / window[0] % window[2]};
        int64_t flat = 0, number = 0;
        bool is_token = true;
        for (int axis = 0; axis < 3; ++axis) {
          const int64_t rolled = which[axis] * window[axis] + place[axis];
          const int64_t token = (rolled + shift[axis]) % padded[axis];
          is_token = is_token && token < grid[axis];
          flat = flat * grid[axis] + token;
          const int64_t last = padded[axis] - window[axis], cut = padded[axis] - shift[axis];
          number = 3 * number + (shift[axis] ? (rolled >= last) + (rolled >= cut) : 1);
        }
        source[m * tokens + n] = is_token ? static_cast<int32_t>(flat) : -1;
        region[m * tokens + n] = static_cast<int32_t>(number);
        if (number != region[m * tokens]) mixed[m] = 1;
        code[n] =
            static_cast<int32_t>(code_of((place[0] * window[1] + place[1]) * window[2] + place[2]));
      }
    }
  }
};

struct Case {
  Triple grid, window, shift;
  int64_t clips, num_heads, head_width;
  bool has_pad_qkv;
};

using Numbers = std::vector<double>;

struct Expected {
  Numbers out, log_sum_exp, grad_qkv, grad_table, grad_pad;
};

// Each token of each window and head: its scores, what it gets, and what it gives back.
Expected attend(const Case& own, const Geometry& cut, const Numbers& qkv, const Numbers& pad,
                const Numbers& table, const Numbers& grad_out, double scale) {
  const int64_t heads = own.num_heads, width = own.head_width, channels = heads * width;
  Expected made{Numbers(grad_out.size()), Numbers(own.clips * heads * cut.num_grid),
                Numbers(qkv.size()), Numbers(table.size()), Numbers(3 * channels)};
  Numbers weights(cut.tokens), grads(cut.tokens);
  std::vector<const double*> from(cut.tokens);
  std::vector<double*> to(cut.tokens);
  const auto dot = [&](const double* x, const double* y) {
    double sum = 0;
    for (int64_t e = 0; e < width; ++e) sum += x[e] * y[e];
    return sum;
  };
  for (int64_t number = 0; number < own.clips * cut.num_windows * heads; ++number) {
    const int64_t head = number % heads, clip = number / heads / cut.num_windows;
    const int64_t begin = number / heads % cut.num_windows * cut.tokens;
    const int32_t *const source = &cut.source[begin], *const region = &cut.region[begin];
    for (int64_t n = 0; n < cut.tokens; ++n) {
      const int64_t place = 3 * (clip * cut.num_grid + source[n]) * channels;
      from[n] = (source[n] < 0 ? pad.data() : &qkv[place]) + head * width;
      to[n] = (source[n] < 0 ? made.grad_pad.data() : &made.grad_qkv[place]) + head * width;
    }
    for (int64_t i = 0; i < cut.tokens; ++i) {
      if (source[i] < 0) continue;
      const int64_t token = clip * cut.num_grid + source[i], at = token * channels + head * width;
      const auto bias_of = [&](int64_t j) {
        return (cut.code[i] - cut.code[j] + cut.offset) * heads + head;
      };
      double sum = 0, mean = 0;
      for (int64_t j = 0; j < cut.tokens; ++j) {
        const double mask = region[i] == region[j] ? 0 : -100;
        weights[j] = scale * dot(from[i], from[j] + channels) + table[bias_of(j)] + mask;
        sum += std::exp(weights[j]);
      }
      made.log_sum_exp[(clip * heads + head) * cut.num_grid + source[i]] = std::log(sum);
      for (int64_t j = 0; j < cut.tokens; ++j) {
        const double* const value = from[j] + 2 * channels;
        weights[j] = std::exp(weights[j]) / sum;
        for (int64_t e = 0; e < width; ++e) made.out[at + e] += weights[j] * value[e];
        grads[j] = dot(&grad_out[at], value);
        mean += weights[j] * grads[j];
      }
      for (int64_t j = 0; j < cut.tokens; ++j) {
        const double grad = weights[j] * (grads[j] - mean);
        made.grad_table[bias_of(j)] += grad;
        for (int64_t e = 0; e < width; ++e) {
          to[i][e] += scale * grad * from[j][channels + e];
          to[j][channels + e] += scale * grad * from[i][e];
          to[j][2 * channels + e] += weights[j] * grad_out[at + e];
        }
      }
    }
  }
  return made;
}

// `needs` has a bit for each of the gradients of qkv, of the bias table and of padding; `all` asks
// for every other choice of them, too.
void check_case(const Case& own, Type type, Type table_type, int needs, bool all = false) {
  char text[200];
  std::snprintf(text, sizeof text, "attention of %dx%dx%d in %dx%dx%d, %d heads of %d, %s, ",
                static_cast<int>(own.grid[0]), static_cast<int>(own.grid[1]),
                static_cast<int>(own.grid[2]), static_cast<int>(own.window[0]),
                static_cast<int>(own.window[1]), static_cast<int>(own.window[2]),
                static_cast<int>(own.num_heads), static_cast<int>(own.head_width),
                NAMES[number_of(type)]);
  const std::string name = text;
  const Geometry cut(own.grid, own.window, own.shift);
  const int64_t channels = own.num_heads * own.head_width, tokens = own.clips * cut.num_grid;
  Random random;
  const Array qkv = random.array(type, tokens * 3 * channels);
  const Array pad = random.array(type, own.has_pad_qkv ? 3 * channels : 0);
  const Array table = random.array(table_type, cut.table_rows * own.num_heads);
  const Array grad_out = random.array(type, tokens * channels);
  const double scale = 0.75 / std::sqrt(own.head_width);
  const Expected expected =
      attend(own, cut, qkv.numbers(), own.has_pad_qkv ? pad.numbers() : Numbers(3 * channels),
             table.numbers(), grad_out.numbers(), scale);

  Attention call;
  call.qkv = qkv.input(), call.pad_qkv = pad.input(), call.bias_table = table.input();
  call.source = cut.source.data(), call.region = cut.region.data();
  call.mixed = cut.mixed.data(), call.code = cut.code.data();
  call.clips = own.clips, call.num_grid = cut.num_grid, call.num_windows = cut.num_windows;
  call.tokens = cut.tokens, call.num_heads = own.num_heads, call.head_width = own.head_width;
  call.table_rows = cut.table_rows, call.offset = cut.offset, call.scale = scale;
  const Plan forward = plan(call);
  const Arrays results = run(name + "out", forward.chunks * own.num_heads, forward.scratch_bytes,
                             [&](const Workers& workers) {
                               Arrays made;
                               made.emplace_back(type, tokens * channels);
                               made.emplace_back(wide(type), own.num_heads * tokens);
                               Array tables(wide(type), own.num_heads * forward.table);
                               call.tables = tables.data();
                               KERNELS.attention(call, made[0].data(), made[1].data(), workers);
                               return made;
                             });
  expect(name + "out", type, results[0], expected.out);
  expect(name + "log_sum_exp", type, results[1], expected.log_sum_exp);

  for (int asked = all ? 0 : needs; asked <= (all ? 7 : needs); ++asked) {
    const int64_t num_qkv = asked & 1 ? tokens * 3 * channels : 0;
    const int64_t num_table = asked & 2 ? cut.table_rows * own.num_heads : 0;
    const int64_t num_pad = asked & 4 ? 3 * channels : 0;
    AttentionGradients gradients{};
    // The size of what is asked for is in the plan: any address will do.
    gradients.grad_table = num_table ? &call : nullptr;
    gradients.grad_pad = num_pad ? &call : nullptr;
    const Plan backward = plan(call, gradients);
    const Arrays grads =
        run(name + "gradients " + std::to_string(asked), backward.chunks * own.num_heads,
            backward.scratch_bytes, [&](const Workers& workers) {
              Arrays made;
              made.emplace_back(type, num_qkv);
              made.emplace_back(wide(type), num_table);
              made.emplace_back(wide(type), num_pad);
              const Array partial(Type::float64, backward.chunks * own.num_heads * backward.sums);
              gradients = {grad_out.data(), results[1].data(), made[0].data(),
                           made[1].data(),  made[2].data(),    nullptr};
              gradients.partial = reinterpret_cast<double*>(partial.data());
              Array tables(wide(type), own.num_heads * backward.table);
              call.tables = tables.data();
              KERNELS.attention_backward(call, gradients, workers);
              return made;
            });
    expect(name + "grad_qkv", type, grads[0], expected.grad_qkv);
    expect(name + "grad_table", type, grads[1], expected.grad_table);
    expect(name + "grad_pad", type, grads[2], expected.grad_pad);
  }
}

}  // namespace

void check_attention() {
  const Case cases[] = {
      {{4, 6, 6}, {2, 3, 3}, {0, 0, 0}, 1, 2, 32, false},   // whole windows
      {{4, 6, 6}, {2, 3, 3}, {1, 1, 2}, 2, 3, 16, true},    // shifted
      {{3, 5, 7}, {2, 3, 4}, {1, 1, 1}, 2, 2, 7, true},     // padded and shifted
      {{3, 5, 7}, {2, 3, 4}, {0, 2, 0}, 1, 1, 48, false},   // padded by zeros
      {{2, 7, 7}, {8, 7, 7}, {4, 3, 3}, 1, 2, 32, true},    // clamped in depth
      {{3, 4, 9}, {2, 6, 5}, {1, 3, 2}, 2, 1, 24, true},    // clamped in height
      {{2, 3, 5}, {8, 7, 7}, {4, 3, 3}, 3, 2, 16, false},   // one window
      {{1, 1, 1}, {8, 7, 7}, {0, 0, 0}, 2, 3, 7, true},     // one token
      {{2, 3, 2}, {1, 1, 1}, {0, 0, 0}, 2, 2, 16, false},   // one token each
      {{3, 8, 7}, {2, 2, 2}, {1, 1, 1}, 3, 2, 16, true},    // windows side by side
      {{2, 5, 13}, {2, 5, 13}, {0, 0, 0}, 1, 1, 48, true},  // 130 tokens
  };
  int number = 0;
  for (const Case& own : cases)
    for (const Type type : TYPES) {
      const bool all = own.grid[0] == 3;
      check_case(own, type, number / 4 % 2 ? type : Type::float32, (number / 4 + 3 * number) % 8,
                 all);
      ++number;
    }
  // Windows of any number of tokens; of an even one there are two, the second with padding, which
  // stands at its end where nothing is shifted.
  const int64_t widths[] = {32, 7, 16, 48, 1, 33};
  for (int64_t tokens = 1; tokens <= 130; ++tokens) {
    const int64_t more = tokens % 2 ? 0 : tokens / 2, shift = tokens % 4 ? tokens / 3 : 0;
    const Case own{{1, 1, tokens + more}, {1, 1, tokens},     {0, 0, shift},  1,
                   1 + tokens % 2,        widths[tokens % 6], tokens % 8 != 0};
    const Type type = TYPES[tokens % 7 % 4];
    check_case(own, type, tokens % 3 ? Type::float32 : type, tokens % 5 ? 7 : 3);
  }
  // Sums so many that chunks hold several groups of windows, the last one fewer.
  check_case({{1, 2, 3}, {26, 26, 26}, {0, 0, 0}, 65, 1, 16, false}, Type::float32, Type::float32,
             7);
}

}  // namespace check

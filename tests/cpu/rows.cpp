// Kernels that work on rows, against loops in double: sums and norms, merged rows, copies by index.
#include "check.h"

namespace check {
namespace {

using Numbers = std::vector<double>;

// So large that no row of a few channels has a deviation near 0, by which errors are divided.
constexpr double EPS = 0.0625;

struct Normed {
  Numbers mean, rstd, norm;
};

Normed normalise(const Numbers& x, const Numbers& weight, const Numbers& bias, int64_t width) {
  Normed made{{}, {}, Numbers(x.size())};
  for (size_t start = 0; start < x.size(); start += width) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < width; ++i) mean += x[start + i] / width;
    for (int64_t i = 0; i < width; ++i) variance += std::pow(x[start + i] - mean, 2) / width;
    made.mean.push_back(mean);
    made.rstd.push_back(1 / std::sqrt(variance + EPS));
    for (int64_t i = 0; i < width; ++i)
      made.norm[start + i] = (x[start + i] - mean) * made.rstd.back() * weight[i] + bias[i];
  }
  return made;
}

struct NormGradients {
  Numbers x, weight, bias;
};

NormGradients differentiate(const Numbers& x, const Numbers& weight, const Numbers& grad,
                            int64_t width) {
  const Normed normed = normalise(x, Numbers(width, 1), Numbers(width), width);
  NormGradients made{Numbers(x.size()), Numbers(width), Numbers(width)};
  for (size_t start = 0; start < x.size(); start += width) {
    double mean = 0, product = 0;
    for (int64_t i = 0; i < width; ++i) {
      const double own = grad[start + i], norm = normed.norm[start + i];
      made.weight[i] += own * norm;
      made.bias[i] += own;
      mean += own * weight[i] / width;
      product += own * weight[i] * norm / width;
    }
    for (int64_t i = 0; i < width; ++i)
      made.x[start + i] = (grad[start + i] * weight[i] - mean - normed.norm[start + i] * product) *
                          normed.rstd[start / width];
  }
  return made;
}

// Outputs of `weight` and `bias` that a backward kernel fills, after those that are in `made`.
AffineGradients add_affine(Arrays* made, Array* partial, Type type, int64_t width) {
  made->emplace_back(wide(type), width);
  made->emplace_back(wide(type), width);
  return {made->rbegin()[1].data(), made->rbegin()[0].data(),
          reinterpret_cast<double*>(partial->data())};
}

// `asked`: 1 for the gradient of x, 2 for that of the branch, 4 for those of weight and bias; 8
// leaves out the gradient of the sum, 16 that of the norm.
void check_residual_norm(int64_t clips, int64_t rows_of_a_clip, int64_t width, Type type,
                         Type branch_type, Type norm_type, bool has_factors, int asked) {
  const std::string name = "residual_norm of " + std::to_string(clips * rows_of_a_clip) + " x " +
                           std::to_string(width) + " " + NAMES[number_of(type)] + ", " +
                           std::to_string(asked) + ", ";
  const int64_t rows = clips * rows_of_a_clip, all = rows * width;
  Random random;
  const Array x = random.array(type, all), branch = random.array(branch_type, all);
  const Array weight = random.array(norm_type, width), bias = random.array(branch_type, width);
  const Array factors = random.array(norm_type, has_factors ? clips : 0);
  Numbers sum = x.numbers(), scale(all, 1);
  for (int64_t i = 0; i < all; ++i) {
    if (has_factors) scale[i] = factors[i / width / rows_of_a_clip];
    sum[i] += scale[i] * branch[i];
  }

  const int64_t chunks = norm_chunks(rows, width), bytes = norm_scratch_bytes(width);
  const Arrays results = run(name + "results", chunks, bytes, [&](const Workers& workers) {
    Arrays made;
    made.emplace_back(type, all);
    made.emplace_back(norm_type, all);
    made.emplace_back(wide(type), rows);
    made.emplace_back(wide(type), rows);
    const Norm norm{weight.input(), bias.input(), made[2].data(), made[3].data(), rows, width, EPS};
    KERNELS.residual_norm(norm,
                          {x.input(), branch.input(), factors.input(), made[0].output(),
                           made[1].output(), rows_of_a_clip},
                          workers);
    return made;
  });
  const Array& total = results[0];
  expect(name + "total", type, total, sum);
  // The norm is that of the rounded sum.
  const Normed normed = normalise(total.numbers(), weight.numbers(), bias.numbers(), width);
  expect(name + "norm", type, results[1], normed.norm);
  expect(name + "mean", type, results[2], normed.mean);
  expect(name + "rstd", type, results[3], normed.rstd);

  const Array grad_total = random.array(type, asked & 8 ? 0 : all);
  const Array grad_norm = random.array(norm_type, asked & 16 ? 0 : all);
  const Numbers given = grad_norm.data() ? grad_norm.numbers() : Numbers(all);
  NormGradients expected = differentiate(total.numbers(), weight.numbers(), given, width);
  Numbers grad_branch(all);
  for (int64_t i = 0; i < all; ++i) {
    if (grad_total.data()) expected.x[i] += grad_total[i];
    grad_branch[i] = scale[i] * expected.x[i];
  }
  const Norm norm{weight.input(),
                  {nullptr, Type::float32},
                  results[2].data(),
                  results[3].data(),
                  rows,
                  width,
                  0};
  const int64_t affine_width = asked & 4 ? width : 0;
  const Arrays grads = run(name + "gradients", chunks, bytes, [&](const Workers& workers) {
    Arrays made;
    made.emplace_back(type, asked & 1 ? all : 0);
    made.emplace_back(branch_type, asked & 2 ? all : 0);
    Array partial(Type::float64, 2 * affine_width * chunks);
    const AffineGradients affine = add_affine(&made, &partial, type, affine_width);
    KERNELS.residual_norm_backward(
        norm,
        {grad_total.input(), grad_norm.input(), total.input(), factors.input(), made[0].output(),
         made[1].output(), rows_of_a_clip},
        affine, workers);
    return made;
  });
  expect(name + "grad_x", type, grads[0], expected.x);
  expect(name + "grad_branch", type, grads[1], grad_branch);
  expect(name + "grad_weight", type, grads[2], expected.weight);
  expect(name + "grad_bias", type, grads[3], expected.bias);
}

// Four tokens a row: that below comes before that to the right. -1 is padding.
std::vector<int32_t> merge_index(int64_t depth, int64_t height, int64_t width) {
  const int64_t rows = (height + 1) / 2, columns = (width + 1) / 2;
  std::vector<int32_t> index(4 * depth * rows * columns);
  for (size_t i = 0; i < index.size(); ++i) {
    const int64_t merged = i / 4, h = merged / columns % rows * 2 + i % 2;
    const int64_t w = merged % columns * 2 + i / 2 % 2, d = merged / columns / rows;
    const bool is_token = h < height && w < width;
    index[i] = is_token ? static_cast<int32_t>((d * height + h) * width + w) : -1;
  }
  return index;
}

// `asked`: 1 for the gradient of x, 2 for those of weight and bias.
void check_patch_merging(int64_t height, int64_t width, int64_t channels, Type type,
                         Type weight_type, Type out_type, int asked) {
  const std::string name = "patch_merging of 2x" + std::to_string(height) + "x" +
                           std::to_string(width) + "x" + std::to_string(channels) + " " +
                           NAMES[number_of(type)] + ", " + std::to_string(asked) + ", ";
  const std::vector<int32_t> index = merge_index(2, height, width);
  const int64_t clips = 2, tokens = 2 * height * width, merged = index.size() / 4;
  const int64_t rows = clips * merged, row = 4 * channels;
  Random random;
  const Array x = random.array(type, clips * tokens * channels);
  const Array weight = random.array(weight_type, row), bias = random.array(weight_type, row);
  const Array grad = random.array(out_type, rows * row);
  // Where each number of the merged rows is in x, or -1.
  const auto place = [&](int64_t i) {
    const int64_t token = index[i / channels % (4 * merged)], clip = i / row / merged;
    return token < 0 ? -1 : (clip * tokens + token) * channels + i % channels;
  };
  Numbers gathered(rows * row), grad_x(clips * tokens * channels);
  for (int64_t i = 0; i < rows * row; ++i) gathered[i] = place(i) < 0 ? 0 : x[place(i)];
  const Normed normed = normalise(gathered, weight.numbers(), bias.numbers(), row);
  const NormGradients expected = differentiate(gathered, weight.numbers(), grad.numbers(), row);
  for (int64_t i = 0; i < rows * row; ++i)
    if (place(i) >= 0) grad_x[place(i)] = expected.x[i];

  const Merging call{x.input(), index.data(), merged, tokens, channels};
  const int64_t chunks = norm_chunks(rows, row), bytes = norm_scratch_bytes(row);
  const Arrays results = run(name + "results", chunks, bytes, [&](const Workers& workers) {
    Arrays made;
    made.emplace_back(out_type, rows * row);
    made.emplace_back(wide(type), rows);
    made.emplace_back(wide(type), rows);
    const Norm norm{weight.input(), bias.input(), made[1].data(), made[2].data(), rows, row, EPS};
    KERNELS.patch_merging(norm, call, made[0].output(), workers);
    return made;
  });
  expect(name + "out", type, results[0], normed.norm);
  expect(name + "mean", type, results[1], normed.mean);
  expect(name + "rstd", type, results[2], normed.rstd);

  const Norm norm{
      weight.input(), {nullptr, Type::float32}, results[1].data(), results[2].data(), rows, row, 0};
  const int64_t affine_width = asked & 2 ? row : 0;
  const Arrays grads = run(name + "gradients", chunks, bytes, [&](const Workers& workers) {
    Arrays made;
    made.emplace_back(type, asked & 1 ? clips * tokens * channels : 0);
    Array partial(Type::float64, 2 * affine_width * chunks);
    const AffineGradients affine = add_affine(&made, &partial, type, affine_width);
    KERNELS.patch_merging_backward(norm, call, grad.input(), made[0].output(), affine, workers);
    return made;
  });
  expect(name + "grad_x", type, grads[0], grad_x);
  expect(name + "grad_weight", type, grads[1], expected.weight);
  expect(name + "grad_bias", type, grads[2], expected.bias);
}

// Bytes of -1 are NaN: what is copied here is no number, and compared bit for bit.
void check_gather_rows(int64_t clips, int64_t num_x, int64_t num_out, int64_t row_bytes) {
  const std::string name = "gather_rows of " + std::to_string(row_bytes) + " bytes";
  Random random;
  std::vector<char> x(clips * num_x * row_bytes), expected(clips * num_out * row_bytes);
  for (char& byte : x) byte = static_cast<char>(random.below(256));
  std::vector<int32_t> index(num_out);
  for (int32_t& from : index) from = static_cast<int32_t>(random.below(num_x + 1)) - 1;
  index.back() = static_cast<int32_t>(num_x) - 1;
  for (int64_t i = 0; i < clips * num_out * row_bytes; ++i) {
    const int64_t clip = i / row_bytes / num_out, from = index[i / row_bytes % num_out];
    expected[i] = from < 0 ? 0 : x[(clip * num_x + from) * row_bytes + i % row_bytes];
  }
  run(name, clips * num_out, 0, [&](const Workers& workers) {
    std::vector<char> out(expected.size(), -1);
    gather_rows(out.data(), x.data(), index.data(), clips, num_x, num_out, row_bytes, workers);
    if (out != expected) fail(name);
    return Arrays();
  });
}

void check_exponentials(Type type, int64_t count) {
  Random random;
  const Array values = random.array(type, count);
  Numbers expected = values.numbers();
  for (double& x : expected) x = std::exp(x);
  KERNELS.exponentials(values.output(), count);
  expect("exponentials", type, values, expected);
}

}  // namespace

void check_rows() {
  int number = 0;
  const auto next = [&](int every) { return TYPES[number / every % 4]; };
  const int64_t rows_of_a_clip[] = {1, 5, 16, 33, 65, 131};
  for (int64_t width = 1; width <= 129; width += 2, ++number)
    check_residual_norm(2, rows_of_a_clip[number % 6], width, next(1), next(3), next(7),
                        number % 3 > 0, number % 32);
  // Each choice of what is asked for, of rows in more chunks than there are workers.
  for (int asked = 0; asked < 32; ++asked, ++number)
    check_residual_norm(3, 431 + asked, 5, next(1), next(4), next(3), asked % 4 > 1, asked);
  const int64_t channels[] = {1, 2, 3, 5, 7, 8, 12, 16, 31, 32, 33};
  for (const int64_t width : channels)
    for (const Type type : TYPES) {
      check_patch_merging(5, 3, width, type, next(3), next(7), 3 - number % 4);
      ++number;
    }
  for (int asked = 0; asked < 4; ++asked, ++number)
    check_patch_merging(37, 35, 3, next(1), next(3), next(2), asked);
  for (const int64_t row_bytes : {1, 2, 3, 4, 7, 8, 16, 33, 64, 130}) {
    check_gather_rows(1, 1, 1, row_bytes);
    check_gather_rows(1, 7, 3, row_bytes);
    check_gather_rows(3, 9, 11, row_bytes);
  }
  for (int64_t count = 1; count <= 33; ++count) {
    check_exponentials(Type::float64, count);
    check_exponentials(Type::float32, count);
  }
}

}  // namespace check

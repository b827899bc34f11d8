// What faces torch of the kernels for processors, on libtorch's stable ABI; part of _ops.so.
//
// Shapes, types and places have been checked by videoswin_kernels/ops; here is only what would make
// a kernel read astray.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cpu/operators.h"

// The level whose kernels run, or null where there is none of that number. A negative one leaves it
// as it is; others are for tests and benches, and for the whole process.
extern "C" __attribute__((visibility("default"))) const char* videoswin_cpu_level(int level) {
  if (level >= 0 && !videoswin::cpu::choose_level(level)) return nullptr;
  return videoswin::cpu::kernels().level;
}

namespace {

using namespace videoswin::cpu;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Type::float64;
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    default:
      STD_TORCH_CHECK(false, "kernels take float64, float32, float16 and bfloat16 alone");
  }
}

// The type of sums and of what is kept of a row.
ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Input input(const Tensor& x) { return {x.const_data_ptr(), type_of(x)}; }

Input input(const std::optional<Tensor>& x) {
  return x.has_value() ? input(*x) : Input{nullptr, Type::float32};
}

// An output of no elements is one that nobody asked for.
void* data_of(const Tensor& x) { return x.numel() == 0 ? nullptr : x.mutable_data_ptr(); }

Output output(const Tensor& x) { return {data_of(x), type_of(x)}; }

void* wide_data(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == wide_type(like), name,
                  ": sums of another type than that of x");
  return data_of(x);
}

const int32_t* integers(const Tensor& x) { return x.const_data_ptr<int32_t>(); }

// Torch's own threads, each of which gets one range.
void parallel(int64_t count, Part part, const void* context) {
  torch::stable::parallel_for(0, count, 1,
                              [&](int64_t begin, int64_t end) { part(context, begin, end); });
}

// Memory of doubles, which torch's deterministic mode fills with NaN.
Tensor doubles(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Double);
}

// As many workers as torch has threads, or chunks if they are fewer, with memory for each.
struct Team {
  Tensor scratch;
  Workers workers;

  Team(const Tensor& like, int64_t chunks, int64_t bytes) {
    STD_TORCH_CHECK(chunks > 0, "there is nothing to compute");
    const int64_t threads = torch::stable::get_num_threads();
    workers.count = threads < chunks ? threads : chunks;
    workers.bytes = (bytes + 63) / 64 * 64;
    workers.parallel = parallel;
    scratch = doubles(like, workers.count * workers.bytes / 8);
    workers.scratch = static_cast<char*>(scratch.mutable_data_ptr());
  }
};

void run_gather_rows(Tensor out, Tensor x, Tensor index, int64_t num_x) {
  STD_TORCH_CHECK(out.numel() > 0 && x.element_size() == out.element_size(),
                  "gather_rows: nothing to copy, or elements of another size");
  const int64_t channels = out.size(out.dim() - 1);
  const int64_t clips = out.numel() / (index.numel() * channels);
  STD_TORCH_CHECK(x.numel() == clips * num_x * channels, "gather_rows: x is of another size");
  const Team team(x, clips * index.numel(), 0);
  gather_rows(static_cast<char*>(out.mutable_data_ptr()),
              static_cast<const char*>(x.const_data_ptr()), integers(index), clips, num_x,
              index.numel(), channels * static_cast<int64_t>(out.element_size()), team.workers);
}

Norm norm_of(const char* name, const Tensor& x, const Tensor& weight, Input bias,
             const Tensor& mean, const Tensor& rstd, int64_t width, double eps) {
  return {input(weight), bias, wide_data(name, mean, x), wide_data(name, rstd, x), mean.numel(),
          width,         eps};
}

void run_residual_norm(Tensor total, Tensor norm, Tensor mean, Tensor rstd, Tensor x, Tensor branch,
                       Tensor weight, Tensor bias, std::optional<Tensor> branch_scale, double eps) {
  const Norm own = norm_of("residual_norm", x, weight, input(bias), mean, rstd, x.size(4), eps);
  const Residual call{input(x),      input(branch), input(branch_scale),
                      output(total), output(norm),  own.rows / x.size(0)};
  const Team team(x, norm_chunks(own.rows, own.width), norm_scratch_bytes(own.width));
  kernels().residual_norm(own, call, team.workers);
}

// Gradients of weight and bias, with memory for the sums of chunks where they are asked for.
struct Affine {
  Tensor memory;
  AffineGradients gradients;

  Affine(const char* name, const Tensor& weight, const Tensor& bias, const Tensor& x,
         const Norm& norm) {
    const bool needs = weight.numel() > 0;
    memory = doubles(x, needs ? 2 * norm.width * norm_chunks(norm.rows, norm.width) : 0);
    gradients = {wide_data(name, weight, x), wide_data(name, bias, x),
                 static_cast<double*>(data_of(memory))};
  }
};

void run_residual_norm_backward(Tensor grad_x, Tensor grad_branch, Tensor grad_weight,
                                Tensor grad_bias, std::optional<Tensor> grad_total,
                                std::optional<Tensor> grad_norm, Tensor total, Tensor weight,
                                Tensor mean, Tensor rstd, std::optional<Tensor> branch_scale) {
  const char* const name = "residual_norm_backward";
  const Norm own =
      norm_of(name, total, weight, {nullptr, Type::float32}, mean, rstd, total.size(4), 0);
  const ResidualGradients call{input(grad_total),       input(grad_norm), input(total),
                               input(branch_scale),     output(grad_x),   output(grad_branch),
                               own.rows / total.size(0)};
  const Affine affine(name, grad_weight, grad_bias, total, own);
  const Team team(total, norm_chunks(own.rows, own.width), norm_scratch_bytes(own.width));
  kernels().residual_norm_backward(own, call, affine.gradients, team.workers);
}

Merging merging_of(const Tensor& x, const Tensor& index) {
  const int64_t channels = x.size(4);
  return {input(x), integers(index), index.numel() / 4, x.numel() / (x.size(0) * channels),
          channels};
}

void run_patch_merging(Tensor out, Tensor mean, Tensor rstd, Tensor x, Tensor index, Tensor weight,
                       Tensor bias, double eps) {
  const Norm own = norm_of("patch_merging", x, weight, input(bias), mean, rstd, 4 * x.size(4), eps);
  const Team team(x, norm_chunks(own.rows, own.width), norm_scratch_bytes(own.width));
  kernels().patch_merging(own, merging_of(x, index), output(out), team.workers);
}

void run_patch_merging_backward(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad,
                                Tensor x, Tensor index, Tensor weight, Tensor mean, Tensor rstd) {
  const char* const name = "patch_merging_backward";
  const Norm own = norm_of(name, x, weight, {nullptr, Type::float32}, mean, rstd, 4 * x.size(4), 0);
  const Affine affine(name, grad_weight, grad_bias, x, own);
  const Team team(x, norm_chunks(own.rows, own.width), norm_scratch_bytes(own.width));
  kernels().patch_merging_backward(own, merging_of(x, index), input(grad), output(grad_x),
                                   affine.gradients, team.workers);
}

Attention attention_of(const Tensor& qkv, const Tensor& bias_table,
                       const std::optional<Tensor>& pad_qkv, const Tensor& source,
                       const Tensor& region, const Tensor& mixed, const Tensor& code,
                       int64_t num_heads, int64_t offset, double scale) {
  STD_TORCH_CHECK(!pad_qkv.has_value() || pad_qkv->scalar_type() == qkv.scalar_type(),
                  "attention: pad_qkv is of another type than qkv");
  STD_TORCH_CHECK(qkv.numel() > 0, "attention: there is nothing to compute");
  Attention call;
  call.qkv = input(qkv);
  call.pad_qkv = input(pad_qkv);
  call.bias_table = input(bias_table);
  call.source = integers(source);
  call.region = integers(region);
  call.mixed = integers(mixed);
  call.code = integers(code);
  call.tables = nullptr;
  call.clips = qkv.size(0);
  call.num_grid = qkv.size(1) * qkv.size(2) * qkv.size(3);
  call.num_windows = mixed.numel();
  call.tokens = code.numel();
  call.num_heads = num_heads;
  call.head_width = qkv.size(4) / (3 * num_heads);
  call.table_rows = bias_table.size(0);
  call.offset = offset;
  call.scale = scale;
  return call;
}

void run_attention(Tensor out, Tensor log_sum_exp, Tensor qkv, Tensor bias_table,
                   std::optional<Tensor> pad_qkv, Tensor source, Tensor region, Tensor mixed,
                   Tensor code, int64_t num_heads, int64_t offset, double scale) {
  Attention call =
      attention_of(qkv, bias_table, pad_qkv, source, region, mixed, code, num_heads, offset, scale);
  const Plan cut = plan(call);
  const Tensor tables = torch::stable::new_empty(qkv, {num_heads * cut.table}, wide_type(qkv));
  call.tables = tables.mutable_data_ptr();
  const Team team(qkv, cut.chunks * num_heads, cut.scratch_bytes);
  kernels().attention(call, out.mutable_data_ptr(), wide_data("attention", log_sum_exp, qkv),
                      team.workers);
}

void run_attention_backward(Tensor grad_qkv, Tensor grad_table, Tensor grad_pad, Tensor grad_out,
                            Tensor qkv, Tensor bias_table, std::optional<Tensor> pad_qkv,
                            Tensor log_sum_exp, Tensor source, Tensor region, Tensor mixed,
                            Tensor code, int64_t num_heads, int64_t offset, double scale) {
  const char* const name = "attention_backward";
  Attention call =
      attention_of(qkv, bias_table, pad_qkv, source, region, mixed, code, num_heads, offset, scale);
  STD_TORCH_CHECK(grad_out.scalar_type() == qkv.scalar_type(), name,
                  ": grad_out is of another type than qkv");
  AttentionGradients gradients;
  gradients.grad_out = grad_out.const_data_ptr();
  gradients.log_sum_exp = wide_data(name, log_sum_exp, qkv);
  gradients.grad_qkv = data_of(grad_qkv);
  gradients.grad_table = wide_data(name, grad_table, qkv);
  gradients.grad_pad = wide_data(name, grad_pad, qkv);
  const Plan cut = plan(call, gradients);
  const Tensor tables = torch::stable::new_empty(qkv, {num_heads * cut.table}, wide_type(qkv));
  call.tables = tables.mutable_data_ptr();
  const Tensor partial = doubles(qkv, cut.chunks * num_heads * cut.sums);
  gradients.partial = static_cast<double*>(data_of(partial));
  const Team team(qkv, cut.chunks * num_heads, cut.scratch_bytes);
  kernels().attention_backward(call, gradients, team.workers);
}

void run_exponentials(Tensor values) { kernels().exponentials(output(values), values.numel()); }

}  // namespace

// Launchers in place: results come from Python, and an output of size 0 is not asked for.
STABLE_TORCH_LIBRARY(videoswin_ops_cpu, m) {
  m.def("gather_rows(Tensor(a!) out, Tensor x, Tensor index, int num_x) -> ()");
  m.def(
      "residual_norm(Tensor(a!) total, Tensor(b!) norm, Tensor(c!) mean, Tensor(d!) rstd, "
      "Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? branch_scale, float eps) "
      "-> ()");
  m.def(
      "residual_norm_backward(Tensor(a!) grad_x, Tensor(b!) grad_branch, Tensor(c!) grad_weight, "
      "Tensor(d!) grad_bias, Tensor? grad_total, Tensor? grad_norm, Tensor total, Tensor weight, "
      "Tensor mean, Tensor rstd, Tensor? branch_scale) -> ()");
  m.def(
      "patch_merging(Tensor(a!) out, Tensor(b!) mean, Tensor(c!) rstd, Tensor x, Tensor index, "
      "Tensor weight, Tensor bias, float eps) -> ()");
  m.def(
      "patch_merging_backward(Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias, "
      "Tensor grad, Tensor x, Tensor index, Tensor weight, Tensor mean, Tensor rstd) -> ()");
  m.def(
      "attention(Tensor(a!) out, Tensor(b!) log_sum_exp, Tensor qkv, Tensor bias_table, "
      "Tensor? pad_qkv, Tensor source, Tensor region, Tensor mixed, Tensor code, int num_heads, "
      "int offset, float scale) -> ()");
  m.def(
      "attention_backward(Tensor(a!) grad_qkv, Tensor(b!) grad_table, Tensor(c!) grad_pad, "
      "Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor log_sum_exp, "
      "Tensor source, Tensor region, Tensor mixed, Tensor code, int num_heads, int offset, "
      "float scale) -> ()");
  m.def("exponentials(Tensor(a!) values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(videoswin_ops_cpu, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&run_gather_rows));
  m.impl("residual_norm", TORCH_BOX(&run_residual_norm));
  m.impl("residual_norm_backward", TORCH_BOX(&run_residual_norm_backward));
  m.impl("patch_merging", TORCH_BOX(&run_patch_merging));
  m.impl("patch_merging_backward", TORCH_BOX(&run_patch_merging_backward));
  m.impl("attention", TORCH_BOX(&run_attention));
  m.impl("attention_backward", TORCH_BOX(&run_attention_backward));
  m.impl("exponentials", TORCH_BOX(&run_exponentials));
}

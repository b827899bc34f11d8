// All that faces torch, on libtorch's stable ABI: one file for every torch from 2.10 on.
//
// Compiled twice: into _ops.so, whose kernels are CUDA's, and with VIDEOSWIN_EMULATED into
// _emulated.so, where the same sources run on CPU tensors. Shapes, types and places have been
// checked by videoswin_kernels/ops; here is only what would make a kernel read astray.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cuda/operators.h"

#if defined(VIDEOSWIN_EMULATED) || defined(VIDEOSWIN_CUDA)

#ifndef VIDEOSWIN_EMULATED
// The one symbol of libtorch_cuda: left undefined where torch has no CUDA, and then never called.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

// Why the current device cannot run the kernels, or null; asked once by extension.py.
extern "C" __attribute__((visibility("default"))) const char* videoswin_why_not_started() {
  const int number = videoswin::probe_device();
  return number == 0 ? nullptr : videoswin::launch_error(number);
}

namespace {

using namespace videoswin;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the device of a tensor current; `stream` is the one that its kernels are queued in.
struct Place {
  void* stream = nullptr;
#ifdef VIDEOSWIN_EMULATED
  explicit Place(const Tensor&) {}
#else
  torch::stable::accelerator::DeviceGuard guard;

  explicit Place(const Tensor& x) : guard(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
#endif
};

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    default:
      STD_TORCH_CHECK(false, "kernels take float32, float16 and bfloat16 alone");
  }
}

Input input(const Tensor& x) { return {x.const_data_ptr(), type_of(x)}; }

Input input(const std::optional<Tensor>& x) {
  return x.has_value() ? input(*x) : Input{nullptr, Type::float32};
}

// An output of no elements is one that nobody asked for.
Output output(const Tensor& x) {
  return {x.numel() == 0 ? nullptr : x.mutable_data_ptr(), type_of(x)};
}

const float* floats(const Tensor& x) { return x.const_data_ptr<float>(); }
float* mutable_floats(const Tensor& x) {
  return x.numel() == 0 ? nullptr : x.mutable_data_ptr<float>();
}
const int32_t* integers(const Tensor& x) { return x.const_data_ptr<int32_t>(); }

void check_width(const char* name, int64_t width, int64_t piece) {
  STD_TORCH_CHECK(width <= (piece % 8 == 0 ? WIDEST : WIDEST_ODD), name, ": a row of ", width,
                  " channels is wider than a kernel holds");
}

void check_launch(const char* name, int number) {
  STD_TORCH_CHECK(number == 0, name, ": ", launch_error(number));
}

void run_gather_rows(Tensor out, Tensor x, Tensor index, int64_t num_x) {
  const int64_t channels = out.size(out.dim() - 1);
  const int64_t clips = out.numel() / (index.numel() * channels);
  const int64_t row_bytes = channels * static_cast<int64_t>(out.element_size());
  const Place place(x);
  const int number = gather_rows(out.mutable_data_ptr(), x.const_data_ptr(), integers(index), clips,
                                 num_x, index.numel(), row_bytes, place.stream);
  check_launch("gather_rows", number);
}

void run_residual_norm(Tensor total, Tensor norm, Tensor mean, Tensor rstd, Tensor x, Tensor branch,
                       Tensor weight, Tensor bias, std::optional<Tensor> branch_scale, double eps) {
  const int64_t channels = x.size(4);
  const int64_t rows = x.numel() / channels;
  check_width("residual_norm", channels, channels);
  const Place place(x);
  const int number =
      residual_norm(output(total), output(norm), mutable_floats(mean), mutable_floats(rstd),
                    input(x), input(branch), input(weight), input(bias), input(branch_scale),
                    static_cast<float>(eps), rows, rows / x.size(0), channels, place.stream);
  check_launch("residual_norm", number);
}

void run_residual_norm_backward(Tensor grad_x, Tensor grad_branch, Tensor grad_weight,
                                Tensor grad_bias, Tensor partial, std::optional<Tensor> grad_total,
                                std::optional<Tensor> grad_norm, Tensor total, Tensor weight,
                                Tensor mean, Tensor rstd, std::optional<Tensor> branch_scale) {
  const int64_t channels = total.size(4);
  const int64_t rows = total.numel() / channels;
  check_width("residual_norm_backward", channels, channels);
  const Place place(total);
  const int number = residual_norm_backward(
      output(grad_x), output(grad_branch), mutable_floats(grad_weight), mutable_floats(grad_bias),
      mutable_floats(partial), partial.size(0), input(grad_total), input(grad_norm), input(total),
      input(weight), floats(mean), floats(rstd), input(branch_scale), rows, rows / total.size(0),
      channels, place.stream);
  check_launch("residual_norm_backward", number);
}

void run_patch_merging(Tensor out, Tensor mean, Tensor rstd, Tensor x, Tensor index, Tensor weight,
                       Tensor bias, double eps) {
  const int64_t clips = x.size(0), channels = x.size(4);
  check_width("patch_merging", 4 * channels, channels);
  const Place place(x);
  const int number =
      patch_merging(output(out), mutable_floats(mean), mutable_floats(rstd), input(x),
                    integers(index), input(weight), input(bias), static_cast<float>(eps), clips,
                    x.numel() / (clips * channels), index.numel() / 4, channels, place.stream);
  check_launch("patch_merging", number);
}

void run_patch_merging_backward(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor partial,
                                Tensor grad, Tensor x, Tensor index, Tensor weight, Tensor mean,
                                Tensor rstd) {
  const int64_t clips = x.size(0), channels = x.size(4);
  check_width("patch_merging_backward", 4 * channels, channels);
  const Place place(x);
  const int number = patch_merging_backward(
      output(grad_x), mutable_floats(grad_weight), mutable_floats(grad_bias),
      mutable_floats(partial), partial.size(0), input(grad), input(x), integers(index),
      input(weight), floats(mean), floats(rstd), clips, x.numel() / (clips * channels),
      index.numel() / 4, channels, place.stream);
  check_launch("patch_merging_backward", number);
}

Attention attention_call(const Tensor& qkv, const Tensor& bias_table,
                         const std::optional<Tensor>& pad_qkv, const Tensor& tables,
                         const Tensor& source, const Tensor& region, const Tensor& mixed,
                         const Tensor& code, int64_t num_heads, int64_t offset, int64_t reach,
                         int64_t depth, double scale) {
  const int64_t head_width = qkv.size(4) / (3 * num_heads);
  STD_TORCH_CHECK(head_width == 16 || head_width == 32 || head_width == 64,
                  "attention: kernels take heads of 16, 32 and 64 channels alone");
  STD_TORCH_CHECK(tables.size(1) == table_stride(reach), "attention: tables of another size");
  STD_TORCH_CHECK(!pad_qkv.has_value() || pad_qkv->scalar_type() == qkv.scalar_type(),
                  "attention: pad_qkv is of another type than qkv");
  // What of a canonical window a kernel takes for granted.
  STD_TORCH_CHECK(depth == 0 || ((depth == 8 || depth == 16) && code.numel() == 49 * depth &&
                                 reach == 169 * (depth - 1) + 84),
                  "attention: no canonical window of this depth");
  Attention call;
  call.qkv = qkv.const_data_ptr();
  call.pad_qkv = pad_qkv.has_value() ? pad_qkv->const_data_ptr() : nullptr;
  call.type = type_of(qkv);
  call.bias_table = input(bias_table);
  call.tables = mutable_floats(tables);
  call.source = integers(source);
  call.region = integers(region);
  call.mixed = integers(mixed);
  call.code = integers(code);
  call.clips = qkv.size(0);
  call.num_grid = qkv.size(1) * qkv.size(2) * qkv.size(3);
  call.num_windows = mixed.numel();
  call.tokens = code.numel();
  call.num_heads = num_heads;
  call.head_width = head_width;
  call.offset = offset;
  call.table_stride = table_stride(reach);
  call.reach = static_cast<int>(reach);
  call.depth = static_cast<int>(depth);
  call.scale = static_cast<float>(scale);
  return call;
}

void run_attention(Tensor out, Tensor log_sum_exp, Tensor tables, Tensor qkv, Tensor bias_table,
                   std::optional<Tensor> pad_qkv, Tensor source, Tensor region, Tensor mixed,
                   Tensor code, int64_t num_heads, int64_t offset, int64_t reach, int64_t depth,
                   double scale) {
  const Attention call = attention_call(qkv, bias_table, pad_qkv, tables, source, region, mixed,
                                        code, num_heads, offset, reach, depth, scale);
  const Place place(qkv);
  const int number =
      attention_forward(call, out.mutable_data_ptr(), mutable_floats(log_sum_exp), place.stream);
  check_launch("attention", number);
}

void run_attention_backward(Tensor grad_qkv, Tensor grad_table, Tensor grad_pad, Tensor tables,
                            Tensor row_sums, Tensor factors, Tensor grad_bias, Tensor partial,
                            Tensor grad_out, Tensor qkv, Tensor bias_table,
                            std::optional<Tensor> pad_qkv, Tensor out, Tensor log_sum_exp,
                            Tensor source, Tensor region, Tensor mixed, Tensor code,
                            Tensor inverse_code, int64_t num_heads, int64_t offset, int64_t reach,
                            int64_t parts, double scale) {
  const Attention call = attention_call(qkv, bias_table, pad_qkv, tables, source, region, mixed,
                                        code, num_heads, offset, reach, 0, scale);
  STD_TORCH_CHECK(grad_out.scalar_type() == qkv.scalar_type(),
                  "attention_backward: grad_out is of another type than qkv");
  const int64_t channels = num_heads * call.head_width;
  AttentionGradients gradients;
  gradients.grad_out = grad_out.const_data_ptr();
  gradients.out = out.const_data_ptr();
  gradients.log_sum_exp = floats(log_sum_exp);
  gradients.row_sums = mutable_floats(row_sums);
  gradients.factors = mutable_floats(factors);
  gradients.grad_qkv = output(grad_qkv).data;
  gradients.grad_table = mutable_floats(grad_table);
  gradients.grad_bias = mutable_floats(grad_bias);
  gradients.bias_parts = grad_bias.size(0);
  gradients.table_rows = bias_table.size(0);
  gradients.num_places = inverse_code.numel();
  gradients.place = integers(inverse_code);
  gradients.partial = mutable_floats(partial);
  STD_TORCH_CHECK(!gradients.partial || partial.size(0) == parts * attention_key_tiles(call.tokens),
                  "attention_backward: partial sums of another number of blocks");
  gradients.grad_pad_k = gradients.partial ? mutable_floats(grad_pad) + channels : nullptr;
  gradients.grad_pad_v = gradients.partial ? mutable_floats(grad_pad) + 2 * channels : nullptr;
  gradients.pad_parts = parts;
  const Place place(qkv);
  check_launch("attention_backward", attention_backward(call, gradients, place.stream));
}

}  // namespace

#ifdef VIDEOSWIN_EMULATED
#define NAMESPACE videoswin_emulated
#define DEVICE CPU
#else
#define NAMESPACE videoswin_ops
#define DEVICE CUDA
#endif

// Headers of torch 2.10 take the name as it is written: one more macro replaces it first.
#define DEFINE(names, m) STABLE_TORCH_LIBRARY(names, m)
#define IMPLEMENT(names, key, m) STABLE_TORCH_LIBRARY_IMPL(names, key, m)

// Launchers in place: all memory comes from Python, and an output of size 0 is not asked for.
DEFINE(NAMESPACE, m) {
  m.def("gather_rows(Tensor(a!) out, Tensor x, Tensor index, int num_x) -> ()");
  m.def(
      "residual_norm(Tensor(a!) total, Tensor(b!) norm, Tensor(c!) mean, Tensor(d!) rstd, "
      "Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? branch_scale, float eps) "
      "-> ()");
  m.def(
      "residual_norm_backward(Tensor(a!) grad_x, Tensor(b!) grad_branch, Tensor(c!) grad_weight, "
      "Tensor(d!) grad_bias, Tensor(e!) partial, Tensor? grad_total, Tensor? grad_norm, "
      "Tensor total, Tensor weight, Tensor mean, Tensor rstd, Tensor? branch_scale) -> ()");
  m.def(
      "patch_merging(Tensor(a!) out, Tensor(b!) mean, Tensor(c!) rstd, Tensor x, Tensor index, "
      "Tensor weight, Tensor bias, float eps) -> ()");
  m.def(
      "patch_merging_backward(Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias, "
      "Tensor(d!) partial, Tensor grad, Tensor x, Tensor index, Tensor weight, Tensor mean, "
      "Tensor rstd) -> ()");
  m.def(
      "attention(Tensor(a!) out, Tensor(b!) log_sum_exp, Tensor(c!) tables, Tensor qkv, "
      "Tensor bias_table, Tensor? pad_qkv, Tensor source, Tensor region, Tensor mixed, "
      "Tensor code, int num_heads, int offset, int reach, int depth, float scale) -> ()");
  m.def(
      "attention_backward(Tensor(a!) grad_qkv, Tensor(b!) grad_table, Tensor(c!) grad_pad, "
      "Tensor(d!) tables, Tensor(e!) row_sums, Tensor(f!) factors, Tensor(g!) grad_bias, "
      "Tensor(h!) partial, Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, "
      "Tensor out, Tensor log_sum_exp, Tensor source, Tensor region, Tensor mixed, Tensor code, "
      "Tensor inverse_code, int num_heads, int offset, int reach, int parts, float scale) -> ()");
}

IMPLEMENT(NAMESPACE, DEVICE, m) {
  m.impl("gather_rows", TORCH_BOX(&run_gather_rows));
  m.impl("residual_norm", TORCH_BOX(&run_residual_norm));
  m.impl("residual_norm_backward", TORCH_BOX(&run_residual_norm_backward));
  m.impl("patch_merging", TORCH_BOX(&run_patch_merging));
  m.impl("patch_merging_backward", TORCH_BOX(&run_patch_merging_backward));
  m.impl("attention", TORCH_BOX(&run_attention));
  m.impl("attention_backward", TORCH_BOX(&run_attention_backward));
}

#endif

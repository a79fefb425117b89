// Convolution with the first channels of a full-width weight: forward, input gradient, weight gradient.
// Formulas, shapes and the memory format of each result: gradaug_kernels/ops/slim_conv2d.py.
//
// The operators check their arguments, describe the convolution and leave it to conv/paths.h, which has the list of who
// computes it; the last of each list is PyTorch's own convolution of the slice, here.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/conv/paths.h"
#include "cpu/tensors.h"

namespace {

using namespace gradaug;
using namespace gradaug::cpu;
using at::IntArrayRef;
using at::Tensor;

// NHWC if one of the two is, as torch's convolutions choose.
at::MemoryFormat memory_format(const Tensor& a, const Tensor& b) {
  const bool nhwc = a.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                    b.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// t: [N, C, H, W]
bool channels_adjacent(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1; }

// t, or a copy of it whose channels are adjacent.
Tensor nhwc(const Tensor& t) { return channels_adjacent(t) ? t : t.contiguous(at::MemoryFormat::ChannelsLast); }

Images images(const Tensor& t) {
  return {static_cast<const char*>(t.const_data_ptr()), *dtype_of(t), t.stride(0), t.stride(2), t.stride(3)};
}

MutableImages mutable_images(const Tensor& t) {
  return {static_cast<char*>(t.data_ptr()), *dtype_of(t), t.stride(0), t.stride(2), t.stride(3)};
}

struct Geometry {
  IntArrayRef stride, padding, dilation;
  int64_t groups;

  // x: [N, C, H, W], y: [N, out, OH, OW], weight: [O, I / G, KH, KW]
  ConvAxis axis(int i, IntArrayRef x, IntArrayRef y, IntArrayRef weight) const {
    return {x[2 + i], y[2 + i], weight[2 + i], stride[i], padding[i], dilation[i]};
  }
};

// ---- problems, before anything is copied or allocated

// The strides of nhwc(t), without memory.
Images described(const Tensor& t) {
  const Dtype dtype = dtype_of(t).value_or(Dtype::f32);
  if (channels_adjacent(t)) return {nullptr, dtype, t.stride(0), t.stride(2), t.stride(3)};
  return {nullptr, dtype, t.size(1) * t.size(2) * t.size(3), t.size(1) * t.size(3), t.size(1)};
}

Weight described_weight(const Tensor& t) {
  return {nullptr, dtype_of(t).value_or(Dtype::f32), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// x: [N, C, H, W], y: [N, out, OH, OW], weight: [O, I / G, KH, KW], by their sizes.
void describe(ConvProblem& problem, const Tensor& images, IntArrayRef x, IntArrayRef y, IntArrayRef weight,
              const Geometry& geometry) {
  problem.dtype = dtype_of(images);
  problem.batch = x[0], problem.in = x[1], problem.out = y[1], problem.groups = geometry.groups;
  problem.h = geometry.axis(0, x, y, weight), problem.w = geometry.axis(1, x, y, weight);
}

// Whether channels of a new tensor of this size and memory format are adjacent.
bool channels_adjacent(IntArrayRef size, at::MemoryFormat format) {
  return format == at::MemoryFormat::ChannelsLast || size[1] == 1 || size[2] * size[3] == 1;
}

// y: the size of the result.
GatherProblem forward_problem(const Tensor& x, const Tensor& weight, IntArrayRef y, const Geometry& geometry) {
  GatherProblem problem{};
  describe(problem, x, x.sizes(), y, weight.sizes(), geometry);
  problem.nhwc = channels_adjacent(y, memory_format(x, weight));
  problem.input_grad = false;
  problem.h_phases = forward_gathers(problem.h), problem.w_phases = forward_gathers(problem.w);
  problem.x = described(x), problem.weight = described_weight(weight);
  return problem;
}

GatherProblem input_grad_problem(const Tensor& dy, const Tensor& weight, IntArrayRef x, const Geometry& geometry) {
  GatherProblem problem{};
  describe(problem, dy, x, dy.sizes(), weight.sizes(), geometry);
  problem.nhwc = channels_adjacent(x, memory_format(dy, weight));
  problem.input_grad = true;
  problem.h_phases = input_grad_gathers(problem.h), problem.w_phases = input_grad_gathers(problem.w);
  problem.x = described(dy), problem.weight = described_weight(weight);
  return problem;
}

WeightGradProblem weight_grad_problem(const Tensor& dy, const Tensor& x, const Tensor& dweight,
                                      const Geometry& geometry) {
  WeightGradProblem problem{};
  describe(problem, x, x.sizes(), dy.sizes(), dweight.sizes(), geometry);
  problem.nhwc = channels_adjacent(x) || channels_adjacent(dy);
  problem.dweight_dtype = dtype_of(dweight);
  problem.dy = described(dy), problem.x = described(x);
  const bool in_place = dweight.scalar_type() == at::kFloat;  // otherwise the sum has adjacent input channels
  problem.dweight = {nullptr, dweight.stride(0), dweight.stride(2), dweight.stride(3),
                     in_place ? dweight.stride(1) : 1};
  return problem;
}

// ---- PyTorch's own convolutions, on views

// What is passed to PyTorch's convolutions, so that they take it without fault. tests/ops/test_torch_faults.py fails as
// soon as those of PyTorch 2.14.1 are mended, and this can go:
// - oneDNN's kernels on images narrower than the stride. Forward ends the process where columns of outputs see nothing
//   but padding (bfloat16, and float32 with a bias); weight gradients of bfloat16 keep uninitialised memory (20 of 20
//   calls on 175 x 1 pixels). oneDNN has no float64, and so few pixels cost nothing in it.
// - Forward of bfloat16 with a stride and one column of outputs, one input and several output channels in a group, adds
//   what was in memory before.
// - Convolutions in groups trust the stride of a dimension of one element, which may be anything: weight gradients that
//   of the batch that one image was taken from, forward those of a kernel of one row or column (errors of 8).

// t [A, B, H, W] with the strides of dimensions of one element that its layout would give them.
Tensor with_usual_strides(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  if (t.is_contiguous(at::MemoryFormat::ChannelsLast)) return t.as_strided(t.sizes(), {h * w * c, 1, w * c, c});
  return t.is_contiguous() ? t.as_strided(t.sizes(), {c * h * w, h * w, w, 1}) : t;
}

Tensor for_torch(const Tensor& x, const Geometry& g) {
  return with_usual_strides(x.size(3) < g.stride[1] ? x.to(at::kDouble) : x);
}

// y: the size of the result, [N, out, OH, OW].
bool is_one_column(const Tensor& x, IntArrayRef y, const Geometry& g) {
  const bool one_to_several = g.groups == x.size(1) && y[1] > g.groups;
  return y[3] == 1 && g.stride[1] > 1 && one_to_several && x.scalar_type() == at::kBFloat16;
}

// A parameter in the dtype of x.
Tensor like(const Tensor& x, const Tensor& parameter) { return parameter.to(x.scalar_type()); }

// [O, I / G, KH, KW] -> [out, in / groups, KH, KW]
Tensor slice(const Tensor& weight, int64_t out_channels, int64_t in_channels, int64_t groups) {
  return weight.narrow(0, 0, out_channels).narrow(1, 0, in_channels / groups);
}

// dx, dw [out, in / groups, KH, KW]; undefined where the mask is false.
std::tuple<Tensor, Tensor> torch_gradients(const Tensor& dy, const Tensor& x, const Tensor& w, const Geometry& g,
                                           std::array<bool, 2> mask) {
  auto [dx, dw, db] =
      at::convolution_backward(dy, x, w, std::nullopt, g.stride, g.padding, g.dilation,
                               /*transposed=*/false, /*output_padding=*/{0, 0}, g.groups, {mask[0], mask[1], false});
  return {dx, dw};
}

// ---- the operators

Tensor slim_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_channels,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const auto size = check_conv_forward(x, weight, bias, out_channels, stride, padding, dilation, groups);
  NoAutocast guard;
  const Geometry geometry{stride, padding, dilation, groups};
  const auto format = memory_format(x, weight);
  const auto allocate = [&] { return at::empty(size, x.options().memory_format(format)); };  // [N, out, OH, OW]
  if (c10::multiply_integers(size) == 0) return allocate();
  const auto b = bias ? std::optional<Tensor>(bias->narrow(0, 0, out_channels)) : std::nullopt;
  Tensor y, input, float_bias;
  GatherProblem problem = forward_problem(x, weight, size, geometry);
  const auto operands = [&] {
    y = allocate(), input = nhwc(x);
    problem.x = images(input), problem.y = mutable_images(y);
    problem.weight.data = static_cast<const char*>(weight.const_data_ptr());
    if (!b) return;
    float_bias = b->to(at::kFloat).contiguous();
    problem.bias = float_bias.const_data_ptr<float>();
  };
  const auto torch = [&] {
    input = for_torch(is_one_column(x, size, geometry) ? x.to(at::kDouble) : x, geometry);
    const Tensor w = with_usual_strides(like(input, slice(weight, out_channels, x.size(1), groups)));
    const auto bias_of_x = b ? std::optional<Tensor>(like(input, *b)) : std::nullopt;
    y = like(x, at::conv2d(input, w, bias_of_x, stride, padding, dilation, groups)).contiguous(format);
  };
  run(problem, operands, torch);
  return y;
}

Tensor slim_conv2d_input_grad(const Tensor& dy, const Tensor& weight, IntArrayRef input_size, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_conv_input_grad(dy, weight, input_size, stride, padding, dilation, groups);
  NoAutocast guard;
  const Geometry geometry{stride, padding, dilation, groups};
  const auto format = memory_format(dy, weight);
  Tensor dx = at::empty(input_size, dy.options().memory_format(format)), output;  // [N, C, H, W]
  if (dy.numel() == 0) return dx.zero_();
  GatherProblem problem = input_grad_problem(dy, weight, input_size, geometry);
  const auto operands = [&] {
    output = nhwc(dy);
    problem.x = images(output), problem.y = mutable_images(dx);
    problem.weight.data = static_cast<const char*>(weight.const_data_ptr());
  };
  const auto torch = [&] {
    const Tensor w = with_usual_strides(like(dy, slice(weight, dy.size(1), input_size[1], groups)));
    // Of x only the shape and the memory format matter, which dx has.
    dx = std::get<0>(torch_gradients(with_usual_strides(dy), dx, w, geometry, {true, false})).contiguous(format);
  };
  run(problem, operands, torch);
  return dx;
}

void slim_conv2d_weight_grad_(const Tensor& dy, const Tensor& x, Tensor& dweight, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_conv_weight_grad(dy, x, dweight, stride, padding, dilation, groups);
  NoAutocast guard;
  const Geometry geometry{stride, padding, dilation, groups};
  if (dy.numel() == 0) return;
  Tensor target = slice(dweight, dy.size(1), x.size(1), groups);  // [out, in / groups, KH, KW]
  Tensor sum, input, output;
  WeightGradProblem problem = weight_grad_problem(dy, x, dweight, geometry);
  const auto operands = [&] {
    input = nhwc(x), output = nhwc(dy);
    sum =
        target.scalar_type() == at::kFloat
            ? target
            : at::zeros(target.sizes(), target.options().dtype(at::kFloat)).contiguous(at::MemoryFormat::ChannelsLast);
    problem.dy = images(output), problem.x = images(input);
    problem.dweight = {sum.data_ptr<float>(), sum.stride(0), sum.stride(2), sum.stride(3), sum.stride(1)};
  };
  const auto torch = [&] {
    const Tensor of_torch = for_torch(x, geometry);
    // Of w only the shape and the memory format matter.
    const Tensor w = at::empty(target.sizes(), of_torch.options().memory_format(memory_format(x, dy)));
    const Tensor gradient = with_usual_strides(like(of_torch, dy));
    target.add_(std::get<1>(torch_gradients(gradient, of_torch, w, geometry, {false, true})));
  };
  run(problem, operands, torch);
  if (sum.defined() && !sum.is_same(target)) target.add_(sum);
}

Tensor slim_conv2d_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& weight, IntArrayRef stride,
                               IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  Tensor dweight = at::zeros_like(weight);
  slim_conv2d_weight_grad_(dy, x, dweight, stride, padding, dilation, groups);
  return dweight;
}

// What the lists of conv/paths.cpp say of one convolution in one direction; tensors without memory will do.
std::vector<std::string> conv_paths(const std::string& direction, const Tensor& x, const Tensor& weight,
                                    int64_t out_channels, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                    int64_t groups) {
  check_dims("x", x, 4, "[N, C, H, W]");
  check_floating("x", x);
  check_dims("weight", weight, 4, "[O, I / groups, KH, KW]");
  check_floating("weight", weight);
  const Geometry geometry{stride, padding, dilation, groups};
  const auto size = check_convolution(x.sizes(), weight.sizes(), out_channels, stride, padding, dilation, groups);
  if (direction == "forward") {
    GatherProblem problem = forward_problem(x, weight, size, geometry);
    return lines(explain(problem));
  }
  const Tensor dy = at::empty(size, x.options().memory_format(memory_format(x, weight)));
  if (direction == "input_grad") {
    GatherProblem problem = input_grad_problem(dy, weight, x.sizes(), geometry);
    return lines(explain(problem));
  }
  TORCH_CHECK_VALUE(direction == "weight_grad", "direction must be forward, input_grad or weight_grad, got ",
                    direction);
  WeightGradProblem problem = weight_grad_problem(dy, x, weight, geometry);
  return lines(explain(problem));
}

}  // namespace

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_conv2d", slim_conv2d);
  m.impl("slim_conv2d_input_grad", slim_conv2d_input_grad);
  m.impl("slim_conv2d_weight_grad_", slim_conv2d_weight_grad_);
  m.impl("slim_conv2d_weight_grad", slim_conv2d_weight_grad);
}

TORCH_LIBRARY_FRAGMENT(gradaug, m) {
  m.def(
      "_conv_paths(str direction, Tensor x, Tensor weight, int out_channels, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> str[]",
      conv_paths);
  m.def("_watch_conv_paths(str forced) -> ()", watch);
  m.def("_unwatch_conv_paths() -> str[]", unwatch);
}

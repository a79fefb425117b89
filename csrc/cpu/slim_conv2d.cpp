// Convolution with the first channels of a full-width weight: forward, input gradient, weight gradient.
// Formulas, shapes and the memory format of each result: gradaug_kernels/ops/slim_conv2d.py.
//
// NHWC images run on the kernels of microkernels/table.h, in small groups on those of microkernels/depthwise_table.h.
// Everything else is PyTorch's own convolution of the slice: float64, NCHW results, groups of other sizes, and the
// processors and dtypes for which select_kernels and select_depthwise_kernels have nothing better.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <bit>
#include <optional>

#include "checks.h"
#include "cpu/conv/depthwise.h"
#include "cpu/conv/problem.h"
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

Image image(const Tensor& t) { return {t.const_data_ptr(), *dtype_of(t), t.stride(0), t.stride(2), t.stride(3)}; }

struct Geometry {
  IntArrayRef stride, padding, dilation;
  int64_t groups;

  // x: [N, C, H, W], y: [N, out, OH, OW], weight: [O, I / G, KH, KW]
  ConvAxis axis(int i, IntArrayRef x, IntArrayRef y, IntArrayRef weight) const {
    return {x[2 + i], y[2 + i], weight[2 + i], stride[i], padding[i], dilation[i]};
  }
};

// The kernels for images of the dtype of x, if the result is NHWC.
const Kernels* kernels_for(const Tensor& x, bool nhwc_result, const Geometry& geometry) {
  const auto dtype = dtype_of(x);
  if (!dtype || !nhwc_result || geometry.groups != 1) return nullptr;
  return select_kernels(*dtype);
}

// The kernels for as many output as input channels in groups of 1, 2, 4, .. max_group, under the same conditions.
const DepthwiseKernels* depthwise_kernels_for(const Tensor& x, bool nhwc_result, int64_t in_channels,
                                              int64_t out_channels, const Geometry& geometry) {
  const auto dtype = dtype_of(x);
  const int64_t group = in_channels / geometry.groups;
  if (!dtype || !nhwc_result || geometry.groups == 1 || in_channels != out_channels) return nullptr;
  if (!std::has_single_bit(static_cast<uint64_t>(group))) return nullptr;
  const DepthwiseKernels* kernels = select_depthwise_kernels(*dtype);
  return kernels && group <= kernels->max_group ? kernels : nullptr;
}

// Strided depthwise convolutions of float32, which PyTorch's own (oneDNN) computes from the images in place, and so
// faster than the kernels that copy them: forward, and the gradients of small kernels (of 5x5 its take four times as
// long). Nothing but a small weight is sliced.
bool is_left_to_torch(const Tensor& x, int64_t channels, const Geometry& geometry, int64_t kernel_width) {
  return x.scalar_type() == at::kFloat && geometry.groups == channels && geometry.stride[1] > 1 && kernel_width <= 3;
}

GroupedWeight grouped(const Tensor& weight) {
  return {weight.const_data_ptr(), *dtype_of(weight), weight.stride(0),
          weight.stride(1),        weight.stride(2),  weight.stride(3)};
}

// ---- PyTorch's own convolutions, on views

// What is passed to PyTorch's convolutions, so that they take it without fault. tests/ops/test_torch_faults.py fails as
// soon as those of PyTorch 2.14.1 are mended, and this can go:
// - oneDNN's kernels on images narrower than the stride. Forward ends the process where columns of outputs see nothing
//   but padding (bfloat16, and float32 with a bias); weight gradients of bfloat16 keep uninitialised memory (20 of 20
//   calls on 175 x 1 pixels). oneDNN has no float64, and so few pixels cost nothing in it.
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
  const auto b = bias ? std::optional<Tensor>(bias->narrow(0, 0, out_channels)) : std::nullopt;
  const auto allocate = [&] { return at::empty(size, x.options().memory_format(format)); };  // [N, out, OH, OW]
  if (c10::multiply_integers(size) == 0) return allocate();
  const bool adjacent = format == at::MemoryFormat::ChannelsLast || out_channels == 1 || size[2] * size[3] == 1;
  const auto* small_groups = depthwise_kernels_for(x, adjacent, x.size(1), out_channels, geometry);
  if (small_groups && !is_left_to_torch(x, x.size(1), geometry, 0)) {
    const Tensor y = allocate();
    const Tensor input = nhwc(x), float_bias = b ? b->to(at::kFloat).contiguous() : Tensor();
    depthwise_forward(*small_groups, x.size(0), geometry.axis(0, x.sizes(), size, weight.sizes()),
                      geometry.axis(1, x.sizes(), size, weight.sizes()), image(input), grouped(weight),
                      b ? float_bias.const_data_ptr<float>() : nullptr, image(y), out_channels,
                      static_cast<int>(out_channels / groups));
    return y;
  }
  const Kernels* kernels = kernels_for(x, adjacent, geometry);
  if (!kernels) {
    const Tensor input = for_torch(x, geometry);
    const Tensor w = with_usual_strides(like(input, slice(weight, out_channels, x.size(1), groups)));
    const auto bias_of_x = b ? std::optional<Tensor>(like(input, *b)) : std::nullopt;
    return like(x, at::conv2d(input, w, bias_of_x, stride, padding, dilation, groups)).contiguous(format);
  }
  const Tensor y = allocate();
  const Tensor input = nhwc(x);
  const Tensor float_bias = b ? b->to(at::kFloat).contiguous() : Tensor();
  const Weight view{weight.const_data_ptr(), *dtype_of(weight), weight.stride(2),
                    weight.stride(3),        weight.stride(1),  weight.stride(0)};
  gather_conv(*kernels, x.size(0), forward_gather(geometry.axis(0, x.sizes(), size, weight.sizes())),
              forward_gather(geometry.axis(1, x.sizes(), size, weight.sizes())), image(input), x.size(1), view,
              b ? float_bias.const_data_ptr<float>() : nullptr, image(y), out_channels);
  return y;
}

Tensor slim_conv2d_input_grad(const Tensor& dy, const Tensor& weight, IntArrayRef input_size, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_conv_input_grad(dy, weight, input_size, stride, padding, dilation, groups);
  NoAutocast guard;
  const Geometry geometry{stride, padding, dilation, groups};
  const auto format = memory_format(dy, weight);
  Tensor dx = at::empty(input_size, dy.options().memory_format(format));  // [N, C, H, W]
  if (dy.numel() == 0) return dx.zero_();
  const ConvAxis h = geometry.axis(0, input_size, dy.sizes(), weight.sizes());
  const ConvAxis w = geometry.axis(1, input_size, dy.sizes(), weight.sizes());
  const auto* small_groups = depthwise_kernels_for(dy, channels_adjacent(dx), input_size[1], dy.size(1), geometry);
  if (small_groups && !is_left_to_torch(dy, input_size[1], geometry, weight.size(3))) {
    const Tensor output = nhwc(dy);
    depthwise_input_grad(*small_groups, dy.size(0), h, w, image(output), grouped(weight), image(dx), input_size[1],
                         static_cast<int>(input_size[1] / groups));
    return dx;
  }
  const Kernels* kernels = kernels_for(dy, channels_adjacent(dx), geometry);
  if (!kernels) {
    const Tensor w_slice = with_usual_strides(like(dy, slice(weight, dy.size(1), input_size[1], groups)));
    const Tensor output = with_usual_strides(dy);
    // Of x only the shape and the memory format matter, which dx has.
    return std::get<0>(torch_gradients(output, dx, w_slice, geometry, {true, false})).contiguous(format);
  }
  const Tensor output = nhwc(dy);
  const Weight view{weight.const_data_ptr(), *dtype_of(weight), weight.stride(2),
                    weight.stride(3),        weight.stride(0),  weight.stride(1)};
  std::vector<std::pair<GatherAxis, GatherAxis>> phases;
  for (const GatherAxis& i : input_grad_gathers(h)) {
    for (const GatherAxis& j : input_grad_gathers(w)) phases.emplace_back(i, j);
  }
  const auto empty = [](const auto& p) { return p.first.tap.empty() || p.second.tap.empty(); };
  if (std::any_of(phases.begin(), phases.end(), empty)) dx.zero_();
  for (const auto& phase : phases) {
    if (empty(phase)) continue;
    gather_conv(*kernels, dy.size(0), phase.first, phase.second, image(output), dy.size(1), view, nullptr, image(dx),
                input_size[1]);
  }
  return dx;
}

void slim_conv2d_weight_grad_(const Tensor& dy, const Tensor& x, Tensor& dweight, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_conv_weight_grad(dy, x, dweight, stride, padding, dilation, groups);
  NoAutocast guard;
  const Geometry geometry{stride, padding, dilation, groups};
  if (dy.numel() == 0) return;
  Tensor target = slice(dweight, dy.size(1), x.size(1), groups);  // [out, in / groups, KH, KW]
  const bool any_nhwc = channels_adjacent(x) || channels_adjacent(dy);
  const auto* small_groups = is_left_to_torch(x, x.size(1), geometry, dweight.size(3))
                                 ? nullptr
                                 : depthwise_kernels_for(x, any_nhwc, x.size(1), dy.size(1), geometry);
  const Kernels* kernels = kernels_for(x, any_nhwc, geometry);
  if (!small_groups && !kernels) {
    const Tensor input = for_torch(x, geometry);
    // Of w only the shape and the memory format matter.
    const Tensor w = at::empty(target.sizes(), input.options().memory_format(memory_format(x, dy)));
    target.add_(std::get<1>(torch_gradients(with_usual_strides(like(input, dy)), input, w, geometry, {false, true})));
    return;
  }
  const Tensor input = nhwc(x), output = nhwc(dy);
  const bool in_place = target.scalar_type() == at::kFloat;
  Tensor sum =
      in_place
          ? target
          : at::zeros(target.sizes(), target.options().dtype(at::kFloat)).contiguous(at::MemoryFormat::ChannelsLast);
  const WeightGrad view{sum.data_ptr<float>(), sum.stride(0), sum.stride(2), sum.stride(3), sum.stride(1)};
  const ConvAxis h = geometry.axis(0, x.sizes(), dy.sizes(), target.sizes());
  const ConvAxis w = geometry.axis(1, x.sizes(), dy.sizes(), target.sizes());
  if (small_groups) {
    depthwise_weight_grad(*small_groups, x.size(0), h, w, image(output), image(input), x.size(1),
                          static_cast<int>(x.size(1) / groups), view);
  } else {
    conv_weight_grad(*kernels, x.size(0), h, w, image(output), dy.size(1), image(input), x.size(1), view);
  }
  if (!in_place) target.add_(sum);
}

Tensor slim_conv2d_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& weight, IntArrayRef stride,
                               IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  Tensor dweight = at::zeros_like(weight);
  slim_conv2d_weight_grad_(dy, x, dweight, stride, padding, dilation, groups);
  return dweight;
}

}  // namespace

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_conv2d", slim_conv2d);
  m.impl("slim_conv2d_input_grad", slim_conv2d_input_grad);
  m.impl("slim_conv2d_weight_grad_", slim_conv2d_weight_grad_);
  m.impl("slim_conv2d_weight_grad", slim_conv2d_weight_grad);
}

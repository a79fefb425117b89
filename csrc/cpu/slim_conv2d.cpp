// Convolution with the first channels of a full-width weight: forward, input gradient, weight gradient.
// Formulas, shapes and the memory format of each result: gradaug_kernels/ops/slim_conv2d.py.
#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>

namespace {

using at::IntArrayRef;
using at::Tensor;

// The kernels compute in the dtypes they are given: no inner call may be cast by an enclosing torch.autocast.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// [O, I / G, KH, KW] -> [out, in / groups, KH, KW], a view
Tensor slice(const Tensor& weight, int64_t out_channels, int64_t in_channels, int64_t groups) {
  return weight.narrow(0, 0, out_channels).narrow(1, 0, in_channels / groups);
}

// NHWC if one of the two is, as torch's convolutions choose.
at::MemoryFormat memory_format(const Tensor& a, const Tensor& b) {
  const bool nhwc = a.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                    b.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// dx, dw [out, in / groups, KH, KW]; an undefined tensor where the mask is false.
std::tuple<Tensor, Tensor> gradients(const Tensor& dy, const Tensor& x, const Tensor& w, IntArrayRef stride,
                                     IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                     std::array<bool, 2> mask) {
  auto [dx, dw, db] = at::convolution_backward(dy, x, w, std::nullopt, stride, padding, dilation, /*transposed=*/false,
                                               /*output_padding=*/{0, 0}, groups, {mask[0], mask[1], false});
  return {dx, dw};
}

Tensor slim_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_channels,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  NoAutocast guard;
  const Tensor w = slice(weight, out_channels, x.size(1), groups);
  const auto b = bias ? std::optional<Tensor>(bias->narrow(0, 0, out_channels)) : std::nullopt;
  return at::conv2d(x, w, b, stride, padding, dilation, groups).contiguous(memory_format(x, weight));
}

Tensor slim_conv2d_input_grad(const Tensor& dy, const Tensor& weight, IntArrayRef input_size, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  NoAutocast guard;
  const auto format = memory_format(dy, weight);
  if (dy.numel() == 0) return at::empty(input_size, dy.options().memory_format(format)).zero_();
  const Tensor w = slice(weight, dy.size(1), input_size[1], groups);
  // Only the shape of x matters for dx: one element, expanded.
  const Tensor x = at::zeros({1}, dy.options()).expand(input_size);  // [N, C, H, W]
  return std::get<0>(gradients(dy, x, w, stride, padding, dilation, groups, {true, false})).contiguous(format);
}

void slim_conv2d_weight_grad_(const Tensor& dy, const Tensor& x, Tensor& dweight, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  NoAutocast guard;
  if (dy.numel() == 0) return;
  Tensor target = slice(dweight, dy.size(1), x.size(1), groups);  // [out, in / groups, KH, KW]
  const Tensor w = at::zeros({1}, x.options()).expand(target.sizes());
  target.add_(std::get<1>(gradients(dy, x, w, stride, padding, dilation, groups, {false, true})));
}

}  // namespace

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_conv2d", slim_conv2d);
  m.impl("slim_conv2d_input_grad", slim_conv2d_input_grad);
  m.impl("slim_conv2d_weight_grad_", slim_conv2d_weight_grad_);
}

// Checks of what protects memory, shared by the bindings of all devices: operators may be called without the Python
// functions, which check the whole contract (gradaug_kernels/ops) in the same words. Comparisons of sizes, no copies.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>

namespace gradaug {

using at::IntArrayRef;
using at::Tensor;

// Sums of products of sizes below this stay far from the limits of 64 bits.
constexpr int64_t kMaxSize = INT32_MAX;

inline void check_dims(const char* name, const Tensor& t, int64_t dims, const char* shape) {
  TORCH_CHECK_VALUE(t.dim() == dims, name, " must be ", shape, ", got ", t.dim(), " dimensions");
}

inline void check_floating(const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   " must be float32, float64, bfloat16 or float16, got ", dtype);
}

inline void check_device(const char* name, const Tensor& t, const Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on ", like.device(), ", got ", t.device());
}

// dy beside x.
inline void check_same_dtype(const char* name, const Tensor& t, const Tensor& like) {
  check_device(name, t, like);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(), ", got ",
                   t.scalar_type());
}

// A weight or bias: on the CPU float32 ones fit a low-precision x, whose kernels round them as they are read.
inline void check_parameter_dtype(const char* name, const Tensor& p, const Tensor& x) {
  check_device(name, p, x);
  const bool low = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  const bool rounded = x.is_cpu() && low && p.scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(p.scalar_type() == x.scalar_type() || rounded, name, " must have the dtype of x, ", x.scalar_type(),
                   ", got ", p.scalar_type());
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t out, const Tensor& x) {
  if (!bias) return;
  check_parameter_dtype("bias", *bias, x);
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) >= out, "bias must have at least ", out, " elements, got shape ",
                    bias->sizes());
}

inline void check_pair(const char* name, IntArrayRef pair, int64_t least) {
  TORCH_CHECK_VALUE(pair.size() == 2 && std::min(pair[0], pair[1]) >= least, name, " must be two integers of at least ",
                    least, ", got ", pair);
  TORCH_CHECK_VALUE(std::max(pair[0], pair[1]) <= kMaxSize, name, " must be at most ", kMaxSize, ", got ", pair);
}

// ---- results that are written in place

// The bytes from the first to the last element of t.
inline std::pair<uintptr_t, uintptr_t> extent(const Tensor& t) {
  int64_t elements = 1;
  for (int64_t d = 0; d < t.dim(); d++) elements += (t.size(d) - 1) * t.stride(d);
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return {begin, begin + elements * t.element_size()};
}

// Each element has memory of its own. Windows that interleave without meeting are refused too: no slice of a dense
// tensor, in any order of its dimensions, is one.
inline void check_no_overlap(const char* name, const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return;
  c10::SmallVector<std::pair<int64_t, int64_t>, 5> axes;  // stride, size
  for (int64_t d = 0; d < t.dim(); d++) {
    if (t.size(d) > 1) axes.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(axes.begin(), axes.end());
  int64_t covered = 1;
  for (const auto& [stride, size] : axes) {
    TORCH_CHECK_VALUE(stride >= covered, name, " must not overlap itself, got shape ", t.sizes(), " with strides ",
                      t.strides());
    covered += (size - 1) * stride;
  }
}

inline void check_apart(const char* name, const Tensor& written, const char* other_name, const Tensor& read) {
  if (written.numel() == 0 || read.numel() == 0) return;
  const auto a = extent(written), b = extent(read);
  TORCH_CHECK_VALUE(a.second <= b.first || b.second <= a.first, name, " must not share memory with ", other_name,
                    ", got one buffer for both");
}

// A buffer that gradients are added to.
inline void check_gradient_buffer(const Tensor& dweight, const Tensor& dy, const Tensor& x) {
  check_device("dweight", dweight, x);
  check_floating("dweight", dweight);
  check_no_overlap("dweight", dweight);
  check_apart("dweight", dweight, "dy", dy);
  check_apart("dweight", dweight, "x", x);
}

// ---- convolution

// x [N, C, H, W] and weight [O, I / G, KH, KW], by their sizes. Returns the size of y.
inline std::array<int64_t, 4> check_convolution(IntArrayRef x, IntArrayRef weight, int64_t out_channels,
                                                IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                int64_t groups) {
  TORCH_CHECK_VALUE(0 < out_channels && out_channels <= weight[0], "out_channels must be in [1, ", weight[0], "], got ",
                    out_channels);
  TORCH_CHECK_VALUE(groups >= 1 && x[1] % groups == 0 && out_channels % groups == 0, "groups must divide ", x[1],
                    " input and ", out_channels, " output channels, got ", groups);
  TORCH_CHECK_VALUE(x[1] >= 1 && x[1] / groups <= weight[1], "x must have between 1 and ", weight[1] * groups,
                    " channels (", weight[1], " for each of ", groups, " groups), got ", x[1]);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  check_pair("the size of the kernel", weight.slice(2), 1);
  TORCH_CHECK_VALUE(x[0] >= 0, "x must have a batch size of at least 0, got ", x[0]);
  check_pair("the size of the image", x.slice(2), 1);
  std::array<int64_t, 4> y{x[0], out_channels, 0, 0};
  for (int a = 0; a < 2; a++) {
    const int64_t window = dilation[a] * (weight[2 + a] - 1) + 1, padded = x[2 + a] + 2 * padding[a];
    TORCH_CHECK_VALUE(padded >= window, "the padded image must be at least as large as the dilated kernel, ", window,
                      ", got ", padded, " along ", a == 0 ? "height" : "width");
    y[2 + a] = (padded - window) / stride[a] + 1;
  }
  return y;
}

inline std::array<int64_t, 4> check_conv_forward(const Tensor& x, const Tensor& weight,
                                                 const std::optional<Tensor>& bias, int64_t out_channels,
                                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                 int64_t groups) {
  check_dims("x", x, 4, "[N, C, H, W]");
  check_floating("x", x);
  check_dims("weight", weight, 4, "[O, I / groups, KH, KW]");
  check_parameter_dtype("weight", weight, x);
  const auto y = check_convolution(x.sizes(), weight.sizes(), out_channels, stride, padding, dilation, groups);
  check_bias(bias, out_channels, x);
  return y;
}

inline void check_output_gradient(const Tensor& dy, const std::array<int64_t, 4>& size) {
  TORCH_CHECK_VALUE(dy.sizes() == IntArrayRef(size), "dy must have the shape of the output, ", IntArrayRef(size),
                    ", got ", dy.sizes());
}

inline void check_conv_input_grad(const Tensor& dy, const Tensor& weight, IntArrayRef input_size, IntArrayRef stride,
                                  IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_dims("dy", dy, 4, "[N, out, OH, OW]");
  check_floating("dy", dy);
  check_dims("weight", weight, 4, "[O, I / groups, KH, KW]");
  check_parameter_dtype("weight", weight, dy);
  TORCH_CHECK_VALUE(input_size.size() == 4, "input_size must be four integers, got ", input_size);
  check_output_gradient(dy,
                        check_convolution(input_size, weight.sizes(), dy.size(1), stride, padding, dilation, groups));
}

inline void check_conv_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dweight, IntArrayRef stride,
                                   IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_dims("dy", dy, 4, "[N, out, OH, OW]");
  check_dims("x", x, 4, "[N, C, H, W]");
  check_floating("x", x);
  check_same_dtype("dy", dy, x);
  check_dims("dweight", dweight, 4, "[O, I / groups, KH, KW]");
  check_output_gradient(dy,
                        check_convolution(x.sizes(), dweight.sizes(), dy.size(1), stride, padding, dilation, groups));
  check_gradient_buffer(dweight, dy, x);
}

// ---- linear layer

// x [.., F] or dy [.., out] with the weight [O, I] beside it: `features` of x, `out` of y.
inline void check_linear(const Tensor& weight, int64_t features, int64_t out) {
  TORCH_CHECK_VALUE(0 < features && features <= weight.size(1), "x must have between 1 and ", weight.size(1),
                    " features, got ", features);
  TORCH_CHECK_VALUE(0 < out && out <= weight.size(0), "out_features must be in [1, ", weight.size(0), "], got ", out);
}

inline void check_rows(const char* name, const Tensor& t, const char* shape) {
  TORCH_CHECK_VALUE(t.dim() >= 1, name, " must be ", shape, ", got ", t.dim(), " dimensions");
  check_floating(name, t);
}

inline void check_linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 int64_t out_features) {
  check_rows("x", x, "[..., F]");
  check_dims("weight", weight, 2, "[O, I]");
  check_parameter_dtype("weight", weight, x);
  check_linear(weight, x.size(-1), out_features);
  check_bias(bias, out_features, x);
}

inline void check_linear_input_grad(const Tensor& dy, const Tensor& weight, int64_t in_features) {
  check_rows("dy", dy, "[..., out]");
  check_dims("weight", weight, 2, "[O, I]");
  check_parameter_dtype("weight", weight, dy);
  check_linear(weight, in_features, dy.size(-1));
}

inline void check_linear_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  check_rows("x", x, "[..., F]");
  check_rows("dy", dy, "[..., out]");
  check_same_dtype("dy", dy, x);
  TORCH_CHECK_VALUE(dy.sizes().slice(0, dy.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                    "dy must have the shape of x but for its last dimension, ", x.sizes(), ", got ", dy.sizes());
  check_dims("weight", weight, 2, "[O, I]");
  check_device("weight", weight, x);
  check_linear(weight, x.size(-1), dy.size(-1));
}

// ---- max pooling

// x: [N, C, H, W], by its size. Returns the size of y.
inline std::array<int64_t, 4> check_pooling(IntArrayRef x, IntArrayRef kernel, IntArrayRef stride,
                                            IntArrayRef padding) {
  check_pair("kernel", kernel, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  TORCH_CHECK_VALUE(kernel[0] * kernel[1] <= 255, "kernel must have at most 255 pixels, got ", kernel);
  TORCH_CHECK_VALUE(2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1],
                    "padding must be at most half of the kernel, ", kernel, ", got ", padding);
  TORCH_CHECK_VALUE(x[0] >= 0 && std::min({x[1], x[2], x[3]}) >= 1 && std::max(x[2], x[3]) <= kMaxSize,
                    "x must have channels, rows and columns, got shape ", x);
  std::array<int64_t, 4> y{x[0], x[1], 0, 0};
  for (int a = 0; a < 2; a++) {
    TORCH_CHECK_VALUE(x[2 + a] + 2 * padding[a] >= kernel[a],
                      "the padded image must be at least as large as the kernel, got ", x);
    y[2 + a] = (x[2 + a] + 2 * padding[a] - kernel[a]) / stride[a] + 1;
  }
  return y;
}

inline void check_pooling_backward(const Tensor& dy, const std::optional<Tensor>& y, const Tensor& offset,
                                   IntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride,
                                   IntArrayRef padding) {
  check_dims("dy", dy, 4, "[N, C, OH, OW]");
  check_floating("dy", dy);
  TORCH_CHECK_VALUE(input_size.size() == 4, "input_size must be four integers, got ", input_size);
  check_output_gradient(dy, check_pooling(input_size, kernel, stride, padding));
  TORCH_CHECK_VALUE(offset.sizes() == dy.sizes() && offset.scalar_type() == at::kByte,
                    "offset must have the shape of dy, ", dy.sizes(), ", and be uint8, got ", offset.sizes(), " ",
                    offset.scalar_type());
  check_device("offset", offset, dy);
  if (!y) return;
  check_same_dtype("y", *y, dy);
  TORCH_CHECK_VALUE(y->sizes() == dy.sizes(), "y must have the shape of dy, ", dy.sizes(), ", got ", y->sizes());
}

}  // namespace gradaug

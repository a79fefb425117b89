// Convolution of a batch norm's output, on the CPU: the two operators one after the other, and in the backward pass the
// activation between them made again. Formulas and shapes: gradaug_kernels/ops/slim_norm_conv2d.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "operators.h"

namespace {

using namespace gradaug::operators;

Tensor none(const Tensor& like) { return at::empty({0}, like.options()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const MaybeTensor& mean,
                                                           const MaybeTensor& var, const MaybeTensor& gamma,
                                                           const MaybeTensor& beta, bool batch_stats, bool relu,
                                                           double eps, const Tensor& weight, const MaybeTensor& bias,
                                                           SymInt out_channels, Integers stride, Integers padding,
                                                           Integers dilation, SymInt groups, bool statistics) {
  const auto [a, used_mean, used_var] = slim_batch_norm().call(x, gamma, beta, mean, var, std::nullopt, relu, eps);
  const Tensor y = slim_conv2d().call(a, weight, bias, out_channels, stride, padding, dilation, groups);
  if (!statistics) return {y, used_mean, used_var, none(used_mean), none(used_mean)};
  const auto [unused, y_mean, y_var] = slim_batch_norm().call(y, {}, {}, {}, {}, {}, false, 0.0);
  return {y, used_mean, used_var, y_mean, y_var};
}

std::tuple<Tensor, Tensor, Tensor> backward_(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                             const MaybeTensor& gamma, const MaybeTensor& beta, bool batch_stats,
                                             bool relu, double eps, const Tensor& weight, Tensor& dweight,
                                             Integers stride, Integers padding, Integers dilation, SymInt groups,
                                             bool needs_dx, bool needs_dweight) {
  if (needs_dweight) gradaug::check_apart("dweight", dweight, "x", x);  // which is read after dweight is written
  MaybeTensor a;
  if (needs_dweight || (needs_dx && relu)) {
    a = std::get<0>(slim_batch_norm().call(x, gamma, beta, mean, var, std::nullopt, relu, eps));
  }
  if (needs_dweight) slim_conv2d_weight_grad_().call(dy, *a, dweight, stride, padding, dilation, groups);
  if (!needs_dx) return {none(x), none(mean), none(mean)};
  const Tensor da = slim_conv2d_input_grad().call(dy, weight, x.sym_sizes(), stride, padding, dilation, groups);
  auto [dx, dz, dgamma, dbeta] = slim_batch_norm_backward().call(da, x, relu ? a : std::nullopt, gamma, beta, mean, var,
                                                                 batch_stats, /*needs_dz=*/false, eps);
  return {dx, dgamma, dbeta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                    const Tensor& var, const MaybeTensor& gamma,
                                                    const MaybeTensor& beta, bool batch_stats, bool relu, double eps,
                                                    const Tensor& weight, Integers stride, Integers padding,
                                                    Integers dilation, SymInt groups, bool needs_dx,
                                                    bool needs_dweight) {
  Tensor dweight = needs_dweight ? at::zeros_like(weight) : none(weight);
  auto [dx, dgamma, dbeta] = backward_(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, dweight, stride,
                                       padding, dilation, groups, needs_dx, needs_dweight);
  return {dx, dgamma, dbeta, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_norm_conv2d", forward);
  m.impl("slim_norm_conv2d_backward_", backward_);
  m.impl("slim_norm_conv2d_backward", backward);
}

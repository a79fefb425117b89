// Linear layer with the first features of a full-width weight: forward, input gradient, weight gradient.
// Formulas and shapes: gradaug_kernels/ops/slim_linear.py.
//
// A linear layer is a 1x1 convolution of images of one pixel, and runs on the kernels of microkernels/table.h, which
// read the slice of the weight, and add to that of its gradient, in place. What select_kernels has nothing better for
// is PyTorch's own matrix product, whose weight operand has the full number of features as its leading dimension.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "checks.h"
#include "cpu/conv/problem.h"
#include "cpu/tensors.h"

namespace {

using namespace gradaug;
using namespace gradaug::cpu;
using at::Tensor;

const ConvAxis kPoint{1, 1, 1, 1, 0, 1};

// The kernels for rows of the dtype of x.
const Kernels* kernels_for(const Tensor& x) {
  const auto dtype = dtype_of(x);
  return dtype ? select_kernels(*dtype) : nullptr;
}

// [.., F] -> [N, F], features adjacent.
Tensor rows(const Tensor& t) {
  const Tensor t2 = t.reshape({-1, t.size(-1)});
  return t2.size(1) == 1 || t2.stride(1) == 1 ? t2 : t2.contiguous();
}

// t: [N, F]
Image image(const Tensor& t) {
  const int64_t pitch = t.size(0) == 1 ? t.size(1) : t.stride(0);
  return {t.const_data_ptr(), *dtype_of(t), pitch, pitch, pitch};
}

// y = x @ weight.T + bias of rows x [N, F]; weight [out, F] with any strides, bias [out] or none, y [N, out].
void multiply(const Kernels& kernels, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y) {
  const Weight view{weight.const_data_ptr(), *dtype_of(weight), 0, 0, weight.stride(1), weight.stride(0)};
  const GatherAxis point = forward_gather(kPoint);
  gather_conv(kernels, x.size(0), point, point, image(x), x.size(1), view,
              bias.defined() ? bias.const_data_ptr<float>() : nullptr, image(y), y.size(1));
}

// Input gradients of few rows of bfloat16: PyTorch's own product (oneDNN) reads the weight in place, and takes a tenth
// less than packing it.
bool is_left_to_torch(const Kernels& kernels, const Tensor& dy, const Tensor& weight) {
  return kernels.pair == 2 && dy.numel() <= 16 * dy.size(-1) && weight.scalar_type() == dy.scalar_type();
}

std::vector<int64_t> with_features(const Tensor& t, int64_t features) {
  std::vector<int64_t> size = t.sizes().vec();
  size.back() = features;
  return size;
}

Tensor slim_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features) {
  check_linear_forward(x, weight, bias, out_features);
  NoAutocast guard;
  const Tensor w = weight.narrow(0, 0, out_features).narrow(1, 0, x.size(-1));  // [out, F]
  const auto b = bias ? std::optional<Tensor>(bias->narrow(0, 0, out_features)) : std::nullopt;
  const Kernels* kernels = kernels_for(x);
  if (!kernels || x.numel() == 0) {
    const auto dtype = x.scalar_type();
    return at::linear(x, w.to(dtype), b ? std::optional<Tensor>(b->to(dtype)) : std::nullopt);
  }
  Tensor y = at::empty(with_features(x, out_features), x.options());
  multiply(*kernels, rows(x), w, b ? b->to(at::kFloat).contiguous() : Tensor(), y.view({-1, out_features}));
  return y;
}

Tensor slim_linear_input_grad(const Tensor& dy, const Tensor& weight, int64_t in_features) {
  check_linear_input_grad(dy, weight, in_features);
  NoAutocast guard;
  const Tensor w = weight.narrow(0, 0, dy.size(-1)).narrow(1, 0, in_features);  // [out, F]
  const Kernels* kernels = kernels_for(dy);
  if (!kernels || dy.numel() == 0 || is_left_to_torch(*kernels, dy, w)) return at::matmul(dy, w.to(dy.scalar_type()));
  Tensor dx = at::empty(with_features(dy, in_features), dy.options());
  multiply(*kernels, rows(dy), w.t(), Tensor(), dx.view({-1, in_features}));
  return dx;
}

void slim_linear_weight_grad_(const Tensor& dy, const Tensor& x, Tensor& dweight) {
  check_linear_weight_grad(dy, x, dweight);
  check_gradient_buffer(dweight, dy, x);
  NoAutocast guard;
  const Tensor outputs = rows(dy), inputs = rows(x);                                   // [N, out], [N, F]
  Tensor target = dweight.narrow(0, 0, outputs.size(1)).narrow(1, 0, inputs.size(1));  // [out, F]
  if (outputs.numel() == 0) return;
  const bool in_place = target.scalar_type() == at::kFloat;
  const Kernels* kernels = kernels_for(x);
  // The kernels sum in floats: a buffer of x's own 16-bit dtype would need another of twice its size.
  if (target.scalar_type() == x.scalar_type() && (!kernels || !in_place)) {
    target.addmm_(outputs.t(), inputs);
    return;
  }
  if (!kernels) {
    target.add_(at::mm(outputs.t(), inputs));
    return;
  }
  Tensor sum = in_place ? target : at::zeros(target.sizes(), target.options().dtype(at::kFloat));
  const WeightGrad view{sum.data_ptr<float>(), sum.stride(0), 0, 0, sum.stride(1)};
  conv_weight_grad(*kernels, outputs.size(0), kPoint, kPoint, image(outputs), outputs.size(1), image(inputs),
                   inputs.size(1), view);
  if (!in_place) target.add_(sum);
}

Tensor slim_linear_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  check_linear_weight_grad(dy, x, weight);
  const bool whole = dy.size(-1) == weight.size(0) && x.size(-1) == weight.size(1);
  if (whole && dy.scalar_type() == weight.scalar_type() && weight.is_contiguous()) return at::mm(rows(dy).t(), rows(x));
  Tensor dweight = at::zeros_like(weight);
  slim_linear_weight_grad_(dy, x, dweight);
  return dweight;
}

}  // namespace

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_linear", slim_linear);
  m.impl("slim_linear_input_grad", slim_linear_input_grad);
  m.impl("slim_linear_weight_grad_", slim_linear_weight_grad_);
  m.impl("slim_linear_weight_grad", slim_linear_weight_grad);
}

// Linear layer with the first features of a full-width weight: forward, input gradient, weight gradient.
// Formulas and shapes: gradaug_kernels/ops/slim_linear.py.
//
// A linear layer is a 1x1 convolution of images of one pixel, and has the same list of who computes it (conv/paths.h).
// The last is PyTorch's own matrix product, whose weight operand has the full number of features as its leading
// dimension.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "checks.h"
#include "cpu/conv/paths.h"
#include "cpu/tensors.h"

namespace {

using namespace gradaug;
using namespace gradaug::cpu;
using at::Tensor;

const ConvAxis kPoint{1, 1, 1, 1, 0, 1};

// [.., F] -> [N, F], features adjacent.
Tensor rows(const Tensor& t) {
  const Tensor t2 = t.reshape({-1, t.size(-1)});
  return t2.size(1) == 1 || t2.stride(1) == 1 ? t2 : t2.contiguous();
}

// t: [N, F]
Images described(const Tensor& t) {
  const int64_t pitch = t.size(0) == 1 ? t.size(1) : t.stride(0);
  return {nullptr, dtype_of(t).value_or(Dtype::f32), pitch, pitch, pitch};
}

Images images(const Tensor& t) {
  Images found = described(t);
  found.data = static_cast<const char*>(t.const_data_ptr());
  return found;
}

MutableImages mutable_images(const Tensor& t) {
  const Images found = described(t);
  return {static_cast<char*>(t.data_ptr()), found.dtype, found.n, found.h, found.w};
}

// t: rows of x or dy.
void describe(ConvProblem& problem, const Tensor& t, int64_t in, int64_t out) {
  problem.dtype = dtype_of(t);
  problem.nhwc = problem.linear = true;
  problem.batch = t.size(0), problem.in = in, problem.out = out, problem.groups = 1;
  problem.h = problem.w = kPoint;
}

// y = x @ weight.T + bias, or dx = dy @ weight; rows are x or dy [N, ..], weight [out, F] with any strides.
GatherProblem gather_problem(const Tensor& rows, const Tensor& weight, bool input_grad) {
  GatherProblem problem{};
  describe(problem, rows, weight.size(1), weight.size(0));
  problem.input_grad = input_grad;
  problem.h_phases = forward_gathers(kPoint), problem.w_phases = forward_gathers(kPoint);
  problem.x = described(rows);
  problem.weight = {nullptr, dtype_of(weight).value_or(Dtype::f32), weight.stride(0), weight.stride(1), 0, 0};
  return problem;
}

// dy [N, out], x [N, F], dweight [out, F]
WeightGradProblem weight_grad_problem(const Tensor& dy, const Tensor& x, const Tensor& dweight) {
  WeightGradProblem problem{};
  describe(problem, x, x.size(1), dy.size(1));
  problem.dweight_dtype = dtype_of(dweight);
  problem.dy = described(dy), problem.x = described(x);
  problem.dweight = {nullptr, dweight.stride(0), 0, 0, dweight.stride(1)};
  return problem;
}

std::vector<int64_t> with_features(const Tensor& t, int64_t features) {
  std::vector<int64_t> size = t.sizes().vec();
  size.back() = features;
  return size;
}

Tensor slim_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features) {
  check_linear_forward(x, weight, bias, out_features);
  NoAutocast guard;
  if (x.numel() == 0) return at::empty(with_features(x, out_features), x.options());
  const Tensor w = weight.narrow(0, 0, out_features).narrow(1, 0, x.size(-1));  // [out, F]
  const auto b = bias ? std::optional<Tensor>(bias->narrow(0, 0, out_features)) : std::nullopt;
  const Tensor inputs = rows(x);
  Tensor y, float_bias;
  GatherProblem problem = gather_problem(inputs, w, false);
  const auto operands = [&] {
    y = at::empty(with_features(x, out_features), x.options());
    problem.x = images(inputs), problem.y = mutable_images(y.view({-1, out_features}));
    problem.weight.data = static_cast<const char*>(w.const_data_ptr());
    if (!b) return;
    float_bias = b->to(at::kFloat).contiguous();
    problem.bias = float_bias.const_data_ptr<float>();
  };
  const auto torch = [&] {
    const auto dtype = x.scalar_type();
    y = at::linear(x, w.to(dtype), b ? std::optional<Tensor>(b->to(dtype)) : std::nullopt);
  };
  run(problem, operands, torch);
  return y;
}

Tensor slim_linear_input_grad(const Tensor& dy, const Tensor& weight, int64_t in_features) {
  check_linear_input_grad(dy, weight, in_features);
  NoAutocast guard;
  if (dy.numel() == 0) return at::empty(with_features(dy, in_features), dy.options());
  const Tensor w = weight.narrow(0, 0, dy.size(-1)).narrow(1, 0, in_features);  // [out, F]
  const Tensor outputs = rows(dy);
  Tensor dx;
  GatherProblem problem = gather_problem(outputs, w, true);
  const auto operands = [&] {
    dx = at::empty(with_features(dy, in_features), dy.options());
    problem.x = images(outputs), problem.y = mutable_images(dx.view({-1, in_features}));
    problem.weight.data = static_cast<const char*>(w.const_data_ptr());
  };
  run(problem, operands, [&] { dx = at::matmul(dy, w.to(dy.scalar_type())); });
  return dx;
}

// Adds the gradient of rows dy [N, out] and x [N, F] to `target` [out, F]; is_new: or writes it there, whatever was.
void add_weight_grad(const Tensor& dy, const Tensor& x, Tensor& target, bool is_new) {
  Tensor sum;
  WeightGradProblem problem = weight_grad_problem(dy, x, target);
  problem.is_new = is_new;
  const auto operands = [&] {
    if (is_new) target.zero_();
    const bool in_place = target.scalar_type() == at::kFloat;
    sum = in_place ? target : at::zeros(target.sizes(), target.options().dtype(at::kFloat));
    problem.dy = images(dy), problem.x = images(x);
    problem.dweight = {sum.data_ptr<float>(), sum.stride(0), 0, 0, sum.stride(1)};
  };
  const auto torch = [&] {
    if (is_new) {
      at::mm_out(target, dy.t(), x);
    } else if (target.scalar_type() == x.scalar_type()) {
      target.addmm_(dy.t(), x);
    } else {
      target.add_(at::mm(dy.t(), x));
    }
  };
  run(problem, operands, torch);
  if (sum.defined() && !sum.is_same(target)) target.add_(sum);
}

void slim_linear_weight_grad_(const Tensor& dy, const Tensor& x, Tensor& dweight) {
  check_linear_weight_grad(dy, x, dweight);
  check_gradient_buffer(dweight, dy, x);
  NoAutocast guard;
  const Tensor outputs = rows(dy), inputs = rows(x);                                   // [N, out], [N, F]
  Tensor target = dweight.narrow(0, 0, outputs.size(1)).narrow(1, 0, inputs.size(1));  // [out, F]
  if (outputs.numel() > 0) add_weight_grad(outputs, inputs, target, false);
}

Tensor slim_linear_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  check_linear_weight_grad(dy, x, weight);
  const bool whole = dy.size(-1) == weight.size(0) && x.size(-1) == weight.size(1);
  if (whole && dy.scalar_type() == weight.scalar_type() && weight.is_contiguous() && dy.numel() > 0) {
    Tensor dweight = at::empty_like(weight);
    NoAutocast guard;
    add_weight_grad(rows(dy), rows(x), dweight, true);
    return dweight;
  }
  Tensor dweight = at::zeros_like(weight);
  slim_linear_weight_grad_(dy, x, dweight);
  return dweight;
}

// What the lists of conv/paths.cpp say of one linear layer in one direction; tensors without memory will do.
std::vector<std::string> linear_paths(const std::string& direction, const Tensor& x, const Tensor& weight,
                                      int64_t out_features) {
  check_rows("x", x, "[..., F]");
  check_dims("weight", weight, 2, "[O, I]");
  check_floating("weight", weight);
  check_linear(weight, x.size(-1), out_features);
  const Tensor inputs = rows(x), w = weight.narrow(0, 0, out_features).narrow(1, 0, inputs.size(1));
  const Tensor outputs = at::empty({inputs.size(0), out_features}, x.options());
  if (direction == "weight_grad") {
    WeightGradProblem problem = weight_grad_problem(outputs, inputs, w);
    return lines(explain(problem));
  }
  TORCH_CHECK_VALUE(direction == "forward" || direction == "input_grad",
                    "direction must be forward, input_grad or weight_grad, got ", direction);
  const bool forward = direction == "forward";
  GatherProblem problem = gather_problem(forward ? inputs : outputs, w, !forward);
  return lines(explain(problem));
}

}  // namespace

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_linear", slim_linear);
  m.impl("slim_linear_input_grad", slim_linear_input_grad);
  m.impl("slim_linear_weight_grad_", slim_linear_weight_grad_);
  m.impl("slim_linear_weight_grad", slim_linear_weight_grad);
}

TORCH_LIBRARY_FRAGMENT(gradaug, m) {
  m.def("_linear_paths(str direction, Tensor x, Tensor weight, int out_features) -> str[]", linear_paths);
}

// The operators as a layer calls them in eager mode: the forward pass, and autograd's node, without Python.
//
// Formulas, shapes and errors are those of gradaug_kernels/ops, which serve torch.compile, functorch and builds without
// native code; tests/ops/test_library.py compares the two. Python's took 10 to 30 us more for each layer.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/new_zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "operators.h"

namespace {

using namespace gradaug::operators;
using at::IntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Inside a function transform (torch.func) or a level of forward mode, which nothing here follows.
bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// Operators go straight to their kernels, but where their derivatives may be asked for. Saved tensors are unpacked
// before: that may run user code which needs autograd and autocast, such as a forward pass that was checkpointed.
class BelowAutograd {
 public:
  BelowAutograd() {
    if (!at::GradMode::is_enabled() && !is_transformed()) guards_.emplace();
  }

 private:
  struct Guards {
    at::AutoDispatchBelowADInplaceOrView autograd;
    c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
  };
  std::optional<Guards> guards_;
};

// Numbers the inputs that are tensors, as needs_input_grad does.
class Inputs {
 public:
  explicit Inputs(AutogradContext* ctx) : ctx_(ctx) {}
  bool next(bool given = true) { return given && ctx_->needs_input_grad(i_++); }

 private:
  AutogradContext* ctx_;
  size_t i_ = 0;
};

Tensor or_undefined(const MaybeTensor& t) { return t.value_or(Tensor()); }
MaybeTensor or_none(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

// The gradient [size] of a full-width bias: dy summed over all but its channels, then zeros.
Tensor bias_grad(const Tensor& dy, int64_t channel_dim, const SymInt& size) {
  std::vector<int64_t> others;
  for (int64_t d = 0; d < dy.dim(); d++) {
    if (d != channel_dim) others.push_back(d);
  }
  const Tensor sum = others.empty() ? dy : dy.sum(others);  // sum({}) would sum everything
  if (sum.sym_size(0) == size) return sum;
  Tensor dbias = dy.new_zeros_symint({size});
  dbias.narrow_symint(0, 0, sum.sym_size(0)).copy_(sum);
  return dbias;
}

// What a weight's gradient is added to, the last input of a formula: a buffer, or a parameter's .grad as the backward
// pass finds it. See Destination in gradaug_kernels/_library.py.
class Destination {
 public:
  static void save(AutogradContext* ctx, const MaybeTensor& given) {
    ctx->saved_data[given && given->requires_grad() ? "parameter" : "buffer"] = given;
  }
  explicit Destination(AutogradContext* ctx)
      : parameter_(ctx->saved_data["parameter"]), buffer_(ctx->saved_data["buffer"]) {
    TORCH_CHECK(!given() || !at::GradMode::is_enabled(),
                "a weight's gradient that is added to a buffer has no second derivative (create_graph=True); "
                "leave gradients to autograd (accumulate=False)");
  }

  bool given() const { return parameter_.isTensor() || buffer_.isTensor(); }
  // Whether the gradient is asked for; `needs` has come to the last input.
  bool needed(Inputs& needs, bool needs_weight) const { return parameter_.isTensor() ? needs.next() : needs_weight; }

  // The tensor to add to.
  Tensor take() {
    Tensor sum;
    if (buffer_.isTensor()) {
      sum = buffer_.toTensor();
    } else {
      const Tensor parameter = parameter_.toTensor();
      sum = parameter.grad();
      if (!is_plain_backward() || !takes(sum, parameter)) sum = for_autograd_ = at::zeros_like(parameter);
    }
    sum.unsafeGetTensorImpl()->bump_version();
    return sum;
  }
  // What autograd gets for the last input.
  const Tensor& for_autograd() const { return for_autograd_; }

 private:
  // Not torch.autograd.grad or backward(inputs=...), which ask for some gradients only.
  static bool is_plain_backward() { return torch::autograd::get_current_graph_task_exec_info()->empty(); }
  static bool takes(const Tensor& grad, const Tensor& weight) {
    namespace impl = torch::autograd::impl;
    const bool plain = weight.requires_grad() && impl::hooks(weight).empty() && !impl::post_acc_grad_hooks(weight);
    return plain && grad.defined() && grad.layout() == at::kStrided && !grad.requires_grad() &&
           grad.dtype() == weight.dtype() && grad.device() == weight.device() && grad.sizes() == weight.sizes() &&
           grad.strides() == weight.strides();
  }

  c10::IValue parameter_, buffer_;
  Tensor for_autograd_;
};

SymInt size_of(const MaybeTensor& bias) { return bias ? bias->sym_size(0) : SymInt(0); }

// Stride, padding, dilation and groups of a convolution.
struct Geometry {
  c10::DimVector stride, padding, dilation;
  SymInt groups;

  Geometry(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, SymInt groups)
      : stride(stride), padding(padding), dilation(dilation), groups(std::move(groups)) {}
  explicit Geometry(AutogradContext* ctx)
      : stride(ctx->saved_data["stride"].toDimVector()),
        padding(ctx->saved_data["padding"].toDimVector()),
        dilation(ctx->saved_data["dilation"].toDimVector()),
        groups(ctx->saved_data["groups"].toSymInt()) {}

  void save(AutogradContext* ctx) const {
    ctx->saved_data["stride"] = IntArrayRef(stride);
    ctx->saved_data["padding"] = IntArrayRef(padding);
    ctx->saved_data["dilation"] = IntArrayRef(dilation);
    ctx->saved_data["groups"] = groups;
  }
  Integers s() const { return c10::fromIntArrayRefSlow(stride); }
  Integers p() const { return c10::fromIntArrayRefSlow(padding); }
  Integers d() const { return c10::fromIntArrayRefSlow(dilation); }
};

// ---- gradaug_kernels/ops/slim_conv2d.py

struct Conv2d : Function<Conv2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                        const SymInt& out_channels, const Geometry& g, const MaybeTensor& weight_grad) {
    const BelowAutograd guard;
    ctx->save_for_backward({x, weight});
    Destination::save(ctx, weight_grad);
    ctx->saved_data["bias_size"] = size_of(bias);
    g.save(ctx);
    return slim_conv2d().call(x, weight, bias, out_channels, g.s(), g.p(), g.d(), g.groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd guard;
    const Tensor &dy = grads[0], &x = saved[0], &weight = saved[1];
    const Geometry g(ctx);
    const SymInt bias_size = ctx->saved_data["bias_size"].toSymInt();
    Destination destination(ctx);
    Inputs needs(ctx);
    const bool needs_x = needs.next(), needs_weight = needs.next(), needs_bias = needs.next(bias_size > 0);
    variable_list found(6);
    if (destination.given()) {
      if (destination.needed(needs, needs_weight)) {
        Tensor sum = destination.take();
        slim_conv2d_weight_grad_().call(dy, x, sum, g.s(), g.p(), g.d(), g.groups);
        found[5] = destination.for_autograd();
      }
    } else if (needs_weight) {
      found[1] = slim_conv2d_weight_grad().call(dy, x, weight, g.s(), g.p(), g.d(), g.groups);
    }
    // Last, so that it is still in the caches when the layer before reads it.
    if (needs_x) found[0] = slim_conv2d_input_grad().call(dy, weight, x.sym_sizes(), g.s(), g.p(), g.d(), g.groups);
    if (needs_bias) found[2] = bias_grad(dy, 1, bias_size);
    return found;
  }
};

// ---- gradaug_kernels/ops/slim_linear.py

struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                        const SymInt& out_features, const MaybeTensor& weight_grad) {
    const BelowAutograd guard;
    ctx->save_for_backward({x, weight});
    Destination::save(ctx, weight_grad);
    ctx->saved_data["bias_size"] = size_of(bias);
    return slim_linear().call(x, weight, bias, out_features);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd guard;
    const Tensor &dy = grads[0], &x = saved[0], &weight = saved[1];
    const SymInt bias_size = ctx->saved_data["bias_size"].toSymInt();
    Destination destination(ctx);
    Inputs needs(ctx);
    const bool needs_x = needs.next(), needs_weight = needs.next(), needs_bias = needs.next(bias_size > 0);
    variable_list found(5);
    if (needs_x) found[0] = slim_linear_input_grad().call(dy, weight, x.sym_size(-1));
    if (destination.given()) {
      if (destination.needed(needs, needs_weight)) {
        Tensor sum = destination.take();
        slim_linear_weight_grad_().call(dy, x, sum);
        found[4] = destination.for_autograd();
      }
    } else if (needs_weight) {
      found[1] = slim_linear_weight_grad().call(dy, x, weight);
    }
    if (needs_bias) found[2] = bias_grad(dy, dy.dim() - 1, bias_size);
    return found;
  }
};

// ---- gradaug_kernels/ops/slim_batch_norm.py

struct BatchNorm : Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& weight,
                               const MaybeTensor& bias, const MaybeTensor& mean, const MaybeTensor& var,
                               const MaybeTensor& residual, bool relu, double eps) {
    const BelowAutograd guard;
    auto [y, used_mean, used_var] = slim_batch_norm().call(x, weight, bias, mean, var, residual, relu, eps);
    ctx->mark_non_differentiable({used_mean, used_var});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, relu ? y : Tensor(), or_undefined(weight), or_undefined(bias), used_mean, used_var});
    ctx->saved_data["batch_stats"] = !mean.has_value();
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["eps"] = eps;
    return {y, used_mean, used_var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list found(8);
    if (!grads[0].defined()) return found;
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd guard;
    const Tensor &dy = grads[0], &x = saved[0], &y = saved[1], &weight = saved[2], &bias = saved[3];
    const bool batch_stats = ctx->saved_data["batch_stats"].toBool();
    Inputs needs(ctx);
    const bool needs_x = needs.next();
    // weight, bias, mean, var
    for (const bool given : {weight.defined(), bias.defined(), !batch_stats, !batch_stats}) needs.next(given);
    const bool needs_residual = needs.next(ctx->saved_data["has_residual"].toBool());
    auto [dx, dz, dweight, dbias] =
        slim_batch_norm_backward().call(dy, x, or_none(y), or_none(weight), or_none(bias), saved[4], saved[5],
                                        batch_stats, needs_residual && y.defined(), ctx->saved_data["eps"].toDouble());
    if (needs_x) found[0] = dx;
    if (weight.defined()) found[1] = dweight;
    if (bias.defined()) found[2] = dbias;
    if (needs_residual) found[5] = y.defined() ? dz : dy;
    return found;
  }
};

// ---- gradaug_kernels/ops/slim_norm_conv2d.py

struct NormConv2d : Function<NormConv2d> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var,
                               const MaybeTensor& gamma, const MaybeTensor& beta, bool batch_stats, bool relu,
                               double eps, const Tensor& weight, const MaybeTensor& bias, const SymInt& out_channels,
                               const Geometry& g, bool statistics, const MaybeTensor& weight_grad) {
    const BelowAutograd guard;
    auto [y, used_mean, used_var, y_mean, y_var] =
        slim_norm_conv2d().call(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, g.s(),
                                g.p(), g.d(), g.groups, statistics);
    ctx->mark_non_differentiable({used_mean, used_var, y_mean, y_var});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, used_mean, used_var, or_undefined(gamma), or_undefined(beta), weight});
    ctx->saved_data["given"] = mean.has_value();
    ctx->saved_data["batch_stats"] = batch_stats || !mean.has_value();
    ctx->saved_data["relu"] = relu;
    ctx->saved_data["eps"] = eps;
    Destination::save(ctx, weight_grad);
    ctx->saved_data["bias_size"] = size_of(bias);
    g.save(ctx);
    return {y, used_mean, used_var, y_mean, y_var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list found(14);
    if (!grads[0].defined()) return found;
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd guard;
    const Tensor &dy = grads[0], &x = saved[0], &mean = saved[1], &var = saved[2], &weight = saved[5];
    const MaybeTensor gamma = or_none(saved[3]), beta = or_none(saved[4]);
    const bool given = ctx->saved_data["given"].toBool(), batch_stats = ctx->saved_data["batch_stats"].toBool();
    const bool relu = ctx->saved_data["relu"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    const Geometry g(ctx);
    const SymInt bias_size = ctx->saved_data["bias_size"].toSymInt();
    Destination destination(ctx);
    Inputs needs(ctx);
    const bool needs_x = needs.next();
    for (int i = 0; i < 2; i++) needs.next(given);  // mean, var
    const bool needs_gamma = needs.next(gamma.has_value()), needs_beta = needs.next(beta.has_value());
    const bool needs_weight = needs.next(), needs_bias = needs.next(bias_size > 0);
    const bool needs_dx = needs_x || needs_gamma || needs_beta;
    Tensor dx, dgamma, dbeta;
    if (destination.given() && destination.needed(needs, needs_weight)) {
      Tensor sum = destination.take();
      std::tie(dx, dgamma, dbeta) =
          slim_norm_conv2d_backward_().call(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, sum, g.s(),
                                            g.p(), g.d(), g.groups, needs_dx, true);
      found[13] = destination.for_autograd();
    } else {
      const bool returns_weight = needs_weight && !destination.given();
      Tensor dweight;
      std::tie(dx, dgamma, dbeta, dweight) =
          slim_norm_conv2d_backward().call(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, g.s(), g.p(),
                                           g.d(), g.groups, needs_dx, returns_weight);
      if (returns_weight) found[8] = dweight;
    }
    if (needs_x) found[0] = dx;
    if (needs_gamma) found[3] = dgamma;
    if (needs_beta) found[4] = dbeta;
    if (needs_bias) found[9] = bias_grad(dy, 1, bias_size);
    return found;
  }
};

}  // namespace

// Called without the GIL; exceptions keep their Python type, that of a checkpoint's early stop included.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using pybind11::arg, pybind11::none, torch::wrap_pybind_function_no_gil;
  m.doc() = "The operators as eager layers call them; see csrc/autograd.cpp.";
  m.def("slim_conv2d",
        wrap_pybind_function_no_gil([](const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                       const SymInt& out_channels, IntArrayRef stride, IntArrayRef padding,
                                       IntArrayRef dilation, const SymInt& groups, const MaybeTensor& weight_grad) {
          return Conv2d::apply(x, weight, bias, out_channels, Geometry(stride, padding, dilation, groups), weight_grad);
        }),
        arg("x"), arg("weight"), arg("bias"), arg("out_channels"), arg("stride"), arg("padding"), arg("dilation"),
        arg("groups"), arg("weight_grad") = none());
  m.def("slim_linear",
        wrap_pybind_function_no_gil(
            [](const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const SymInt& out_features,
               const MaybeTensor& weight_grad) { return Linear::apply(x, weight, bias, out_features, weight_grad); }),
        arg("x"), arg("weight"), arg("bias"), arg("out_features"), arg("weight_grad") = none());
  m.def("slim_batch_norm",
        wrap_pybind_function_no_gil([](const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                       const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& residual,
                                       bool relu, double eps) {
          const variable_list found = BatchNorm::apply(x, weight, bias, mean, var, residual, relu, eps);
          return std::make_tuple(found[0], found[1], found[2]);
        }),
        arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"), arg("residual"), arg("relu"), arg("eps"));
  m.def("slim_norm_conv2d",
        wrap_pybind_function_no_gil(
            [](const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& gamma,
               const MaybeTensor& beta, bool batch_stats, bool relu, double eps, const Tensor& weight,
               const MaybeTensor& bias, const SymInt& out_channels, IntArrayRef stride, IntArrayRef padding,
               IntArrayRef dilation, const SymInt& groups, bool statistics, const MaybeTensor& weight_grad) {
              const variable_list found =
                  NormConv2d::apply(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels,
                                    Geometry(stride, padding, dilation, groups), statistics, weight_grad);
              return std::make_tuple(found[0], found[1], found[2], found[3], found[4]);
            }),
        arg("x"), arg("mean"), arg("var"), arg("gamma"), arg("beta"), arg("batch_stats"), arg("relu"), arg("eps"),
        arg("weight"), arg("bias"), arg("out_channels"), arg("stride"), arg("padding"), arg("dilation"), arg("groups"),
        arg("statistics"), arg("weight_grad") = none());
  m.def(
      "has_prehooks",
      [](const Tensor& parameter) {
        const auto node = torch::autograd::impl::try_get_grad_accumulator(parameter);
        return node && !node->pre_hooks().empty();
      },
      "Whether the node that adds to a parameter's .grad has hooks that see the gradient before.", arg("parameter"));
}

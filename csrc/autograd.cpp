// The operators as a layer calls them in eager mode: the forward pass, and autograd's node, without Python.
//
// Formulas, shapes and errors are those of gradaug_kernels/ops, which serve torch.compile, functorch and builds without
// native code. Both call the same operators, through the dispatcher, so these serve every device. They take as long as
// PyTorch's own layers do, where Python's took 30 us more for each layer, forward and backward.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/new_zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;

template <class Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Operators go straight to their kernels, but where a second derivative may be asked for, which they refuse.
struct BelowAutograd {
  struct Guards {
    at::AutoDispatchBelowAutograd autograd;
    c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
  };
  std::optional<Guards> guards;
  BelowAutograd() {
    if (!at::GradMode::is_enabled()) guards.emplace();
  }
};

// The gradient [size] of a full-width bias: dy summed over all but its channels, then zeros.
Tensor bias_grad(const Tensor& dy, int64_t channel_dim, int64_t size) {
  std::vector<int64_t> others;
  for (int64_t d = 0; d < dy.dim(); d++) {
    if (d != channel_dim) others.push_back(d);
  }
  const Tensor sum = others.empty() ? dy : dy.sum(others);  // sum({}) would sum everything
  if (sum.size(0) == size) return sum;
  Tensor dbias = dy.new_zeros({size});
  dbias.narrow(0, 0, sum.size(0)).copy_(sum);
  return dbias;
}

MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

// ---- gradaug_kernels/ops/slim_conv2d.py

struct Conv2d : Function<Conv2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                        int64_t out_channels, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        int64_t groups, const MaybeTensor& weight_grad) {
    static const auto conv2d =
        find_operator<Tensor(const Tensor&, const Tensor&, const MaybeTensor&, SymInt, SymIntArrayRef, SymIntArrayRef,
                             SymIntArrayRef, SymInt)>("gradaug::slim_conv2d");
    const BelowAutograd guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["weight_grad"] = weight_grad;
    ctx->saved_data["bias_size"] = bias ? bias->size(0) : 0;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    return conv2d.call(x, weight, bias, out_channels, c10::fromIntArrayRefSlow(stride),
                       c10::fromIntArrayRefSlow(padding), c10::fromIntArrayRefSlow(dilation), groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto input_grad =
        find_operator<Tensor(const Tensor&, const Tensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef,
                             SymIntArrayRef, SymInt)>("gradaug::slim_conv2d_input_grad");
    static const auto add_weight_grad =
        find_operator<void(const Tensor&, const Tensor&, Tensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef,
                           SymInt)>("gradaug::slim_conv2d_weight_grad_");
    static const auto weight_grad =
        find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, SymIntArrayRef, SymIntArrayRef,
                             SymIntArrayRef, SymInt)>("gradaug::slim_conv2d_weight_grad");
    const BelowAutograd guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &weight = saved[1];
    const auto integers = [&](const char* name) { return ctx->saved_data[name].toDimVector(); };
    const auto stride = integers("stride"), padding = integers("padding"), dilation = integers("dilation");
    const auto s = c10::fromIntArrayRefSlow(stride), p = c10::fromIntArrayRefSlow(padding),
               d = c10::fromIntArrayRefSlow(dilation);
    const int64_t groups = ctx->saved_data["groups"].toInt(), bias_size = ctx->saved_data["bias_size"].toInt();
    const auto& buffer = ctx->saved_data["weight_grad"];
    variable_list found(9);
    if (ctx->needs_input_grad(1) && buffer.isTensor()) {
      Tensor sum = buffer.toTensor();
      add_weight_grad.call(dy, x, sum, s, p, d, groups);
    } else if (ctx->needs_input_grad(1)) {
      found[1] = weight_grad.call(dy, x, weight, s, p, d, groups);
    }
    // Last, so that it is still in the caches when the layer before reads it.
    if (ctx->needs_input_grad(0)) found[0] = input_grad.call(dy, weight, x.sym_sizes(), s, p, d, groups);
    if (bias_size > 0 && ctx->needs_input_grad(2)) found[2] = bias_grad(dy, 1, bias_size);
    return found;
  }
};

// ---- gradaug_kernels/ops/slim_linear.py

struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                        int64_t out_features, const MaybeTensor& weight_grad) {
    static const auto linear =
        find_operator<Tensor(const Tensor&, const Tensor&, const MaybeTensor&, SymInt)>("gradaug::slim_linear");
    const BelowAutograd guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["weight_grad"] = weight_grad;
    ctx->saved_data["bias_size"] = bias ? bias->size(0) : 0;
    return linear.call(x, weight, bias, out_features);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto input_grad =
        find_operator<Tensor(const Tensor&, const Tensor&, SymInt)>("gradaug::slim_linear_input_grad");
    static const auto add_weight_grad =
        find_operator<void(const Tensor&, const Tensor&, Tensor&)>("gradaug::slim_linear_weight_grad_");
    static const auto weight_grad =
        find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&)>("gradaug::slim_linear_weight_grad");
    const BelowAutograd guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &weight = saved[1];
    const int64_t bias_size = ctx->saved_data["bias_size"].toInt();
    const auto& buffer = ctx->saved_data["weight_grad"];
    variable_list found(5);
    if (ctx->needs_input_grad(0)) found[0] = input_grad.call(dy, weight, x.sym_size(-1));
    if (ctx->needs_input_grad(1) && buffer.isTensor()) {
      Tensor sum = buffer.toTensor();
      add_weight_grad.call(dy, x, sum);
    } else if (ctx->needs_input_grad(1)) {
      found[1] = weight_grad.call(dy, x, weight);
    }
    if (bias_size > 0 && ctx->needs_input_grad(2)) found[2] = bias_grad(dy, dy.dim() - 1, bias_size);
    return found;
  }
};

// ---- gradaug_kernels/ops/slim_batch_norm.py

struct BatchNorm : Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& weight,
                               const MaybeTensor& bias, const MaybeTensor& mean, const MaybeTensor& var,
                               const MaybeTensor& residual, bool relu, double eps) {
    static const auto batch_norm = find_operator<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
        const MaybeTensor&, bool, double)>("gradaug::slim_batch_norm");
    const BelowAutograd guard;
    auto [y, used_mean, used_var] = batch_norm.call(x, weight, bias, mean, var, residual, relu, eps);
    ctx->mark_non_differentiable({used_mean, used_var});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {x, relu ? y : Tensor(), weight.value_or(Tensor()), bias.value_or(Tensor()), used_mean, used_var});
    ctx->saved_data["batch_stats"] = !mean.has_value();
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["eps"] = eps;
    return {y, used_mean, used_var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto gradients = find_operator<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const Tensor&,
        const Tensor&, bool, bool, double)>("gradaug::slim_batch_norm_backward");
    variable_list found(8);
    if (!grads[0].defined()) return found;
    const BelowAutograd guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &y = saved[1], &weight = saved[2], &bias = saved[3];
    const bool batch_stats = ctx->saved_data["batch_stats"].toBool();
    // The statistics that were given come before the residual among the inputs that are tensors.
    const size_t residual = 1 + weight.defined() + bias.defined() + (batch_stats ? 0 : 2);
    const bool needs_dresidual = ctx->saved_data["has_residual"].toBool() && ctx->needs_input_grad(residual);
    auto [dx, dz, dweight, dbias] =
        gradients.call(dy, x, maybe(y), maybe(weight), maybe(bias), saved[4], saved[5], batch_stats,
                       needs_dresidual && y.defined(), ctx->saved_data["eps"].toDouble());
    if (ctx->needs_input_grad(0)) found[0] = dx;
    if (weight.defined()) found[1] = dweight;
    if (bias.defined()) found[2] = dbias;
    if (needs_dresidual) found[5] = y.defined() ? dz : dy;
    return found;
  }
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using pybind11::arg, pybind11::none;
  using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.doc() = "The operators as eager layers call them; see csrc/autograd.cpp.";
  m.def(
      "slim_conv2d",
      [](const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t out_channels, IntArrayRef stride,
         IntArrayRef padding, IntArrayRef dilation, int64_t groups, const MaybeTensor& weight_grad) {
        return Conv2d::apply(x, weight, bias, out_channels, stride, padding, dilation, groups, weight_grad);
      },
      arg("x"), arg("weight"), arg("bias"), arg("out_channels"), arg("stride"), arg("padding"), arg("dilation"),
      arg("groups"), arg("weight_grad") = none(), NoGil());
  m.def(
      "slim_linear",
      [](const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t out_features,
         const MaybeTensor& weight_grad) { return Linear::apply(x, weight, bias, out_features, weight_grad); },
      arg("x"), arg("weight"), arg("bias"), arg("out_features"), arg("weight_grad") = none(), NoGil());
  m.def(
      "slim_batch_norm",
      [](const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& mean,
         const MaybeTensor& var, const MaybeTensor& residual, bool relu, double eps) {
        const variable_list found = BatchNorm::apply(x, weight, bias, mean, var, residual, relu, eps);
        return std::make_tuple(found[0], found[1], found[2]);
      },
      arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"), arg("residual"), arg("relu"), arg("eps"), NoGil());
}

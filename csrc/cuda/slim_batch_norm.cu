// Batch norm on CUDA: what slim_batch_norm.cuh computes, on torch's tensors, in the current stream.
#include "cuda/slim_batch_norm.cuh"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "slim_batch_norm_binding.h"

namespace gradaug::batch_norm {
namespace {

// Calls f with a null pointer of the kernels' type for a dtype that check_activation has seen.
template <typename F>
void with_type(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kHalf:
      return f(static_cast<__half*>(nullptr));
    case at::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case at::kFloat:
      return f(static_cast<float*>(nullptr));
    default:
      return f(static_cast<double*>(nullptr));
  }
}

Extent extent_of(const Tensor& x, const Layout& layout) {
  const int64_t n = x.size(0), c = x.size(1), s = x.size(2) * x.size(3);
  return layout.rows ? Extent{true, c, n * s, c} : Extent{false, c, n, s};
}

// An undefined tensor gives null data. The kernels' half types have the layout of c10's.
template <typename T>
Lines<const T> lines_of(const Tensor& t, const Layout& layout) {
  if (!t.defined()) return {nullptr, 0, 0};
  const T* data = static_cast<const T*>(t.const_data_ptr());
  return layout.rows ? Lines<const T>{data, row_pitch(t), 0} : Lines<const T>{data, t.stride(0), t.stride(1)};
}

template <typename T>
Lines<T> written_lines_of(const Tensor& t, const Layout& layout) {
  if (!t.defined()) return {nullptr, 0, 0};
  const Lines<const T> lines = lines_of<T>(t, layout);
  return {static_cast<T*>(t.mutable_data_ptr()), lines.line, lines.channel};
}

Parameter parameter_of(const std::optional<Tensor>& p, const Tensor& x) {
  if (!p) return {nullptr, 0, false};
  return {p->const_data_ptr(), p->stride(0), p->scalar_type() == x.scalar_type()};
}

ParameterGradient gradient_of(const Tensor& t, const std::optional<Tensor>& p, const Tensor& x) {
  if (!p) return {nullptr, 0, false};
  return {t.mutable_data_ptr(), t.size(0), t.scalar_type() == x.scalar_type()};
}

template <typename A>
Statistic<A> statistic_of(const std::optional<Tensor>& t) {
  if (!t) return {nullptr, 0};
  return {t->const_data_ptr<A>(), t->stride(0)};
}

int multiprocessors() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

Tensor workspace_for(const Plan& plan, const Tensor& x) {
  return at::empty({workspace_size(plan)}, x.options().dtype(at::kDouble));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& given_mean,
                                           const std::optional<Tensor>& given_var,
                                           const std::optional<Tensor>& residual, bool relu, double eps) {
  check_forward(x, weight, bias, given_mean, given_var, residual, eps);
  const c10::cuda::CUDAGuard guard(x.device());
  const Layout layout(x);
  Tensor y = layout.empty(x);  // [N, C, H, W]
  const auto stats = x.options().dtype(stats_dtype(x));
  if (x.numel() == 0) {
    if (given_mean) return {y, given_mean->clone(), given_var->clone()};
    return {y, at::zeros({x.size(1)}, stats), at::zeros({x.size(1)}, stats)};
  }
  Tensor mean = at::empty({x.size(1)}, stats), var = at::empty({x.size(1)}, stats);  // [C]
  const Tensor x_read = layout.readable(x), residual_read = residual ? layout.readable(*residual) : Tensor();
  with_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    const ForwardTensors<T> tensors{lines_of<T>(x_read, layout),    lines_of<T>(residual_read, layout),
                                    written_lines_of<T>(y, layout), parameter_of(weight, x),
                                    parameter_of(bias, x),          statistic_of<A>(given_mean),
                                    statistic_of<A>(given_var),     mean.mutable_data_ptr<A>(),
                                    var.mutable_data_ptr<A>()};
    const bool aligned = vectorisable(tensors.x) && vectorisable(tensors.residual) && vectorisable(tensors.y);
    const Plan plan = make_plan<T>(extent_of(x, layout), aligned, multiprocessors());
    Tensor workspace = workspace_for(plan, x);
    launch_forward(plan, tensors, relu, eps, workspace.mutable_data_ptr<double>(), at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, const Tensor& mean,
                                                    const Tensor& var, bool batch_stats, bool needs_dz, double eps) {
  check_backward(dy, x, y, weight, bias, mean, var, eps);
  const c10::cuda::CUDAGuard guard(x.device());
  const Layout layout(x);
  Tensor dx = layout.empty(x);                                           // [N, C, H, W]
  Tensor dz = needs_dz ? layout.empty(x) : at::empty({0}, x.options());  // [N, C, H, W]
  const auto full_width = [&](const std::optional<Tensor>& p) {
    if (!p) return at::empty({0}, mean.options());
    return x.numel() == 0 ? at::zeros({p->size(0)}, p->options()) : at::empty({p->size(0)}, p->options());
  };
  Tensor dweight = full_width(weight), dbias = full_width(bias);  // [F]
  if (x.numel() == 0) return {dx, dz, dweight, dbias};
  const Tensor dy_read = layout.readable(dy), x_read = layout.readable(x);
  const Tensor y_read = y ? layout.readable(*y) : Tensor(), dz_written = needs_dz ? dz : Tensor();
  with_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    const BackwardTensors<T> tensors{lines_of<T>(dy_read, layout),
                                     lines_of<T>(x_read, layout),
                                     lines_of<T>(y_read, layout),
                                     written_lines_of<T>(dx, layout),
                                     written_lines_of<T>(dz_written, layout),
                                     parameter_of(weight, x),
                                     statistic_of<A>(mean),
                                     statistic_of<A>(var),
                                     gradient_of(dweight, weight, x),
                                     gradient_of(dbias, bias, x)};
    const bool aligned = vectorisable(tensors.dy) && vectorisable(tensors.x) && vectorisable(tensors.y) &&
                         vectorisable(tensors.dx) && vectorisable(tensors.dz);
    const Plan plan = make_plan<T>(extent_of(x, layout), aligned, multiprocessors());
    Tensor workspace = workspace_for(plan, x);
    launch_backward(plan, tensors, batch_stats, eps, workspace.mutable_data_ptr<double>(),
                    at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dz, dweight, dbias};
}

}  // namespace
}  // namespace gradaug::batch_norm

TORCH_LIBRARY_IMPL(gradaug, CUDA, m) {
  m.impl("slim_batch_norm", &gradaug::batch_norm::forward);
  m.impl("slim_batch_norm_backward", &gradaug::batch_norm::backward);
}

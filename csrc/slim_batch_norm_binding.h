// What the CPU and the CUDA binding of batch norm share: checks of what protects memory, outputs, and how a tensor is
// read in place. The Python function checks the whole contract (gradaug_kernels/ops/slim_batch_norm.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "checks.h"

namespace gradaug::batch_norm {

using at::Tensor;

inline at::ScalarType stats_dtype(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_activation(const Tensor& x, double eps) {
  check_dims("x", x, 4, "[N, C, H, W]");
  check_floating("x", x);
  TORCH_CHECK_VALUE(eps >= 0, "eps must be at least 0, got ", eps);
}

// residual, dy and y: like x.
inline void check_like(const Tensor& x, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.sizes() == x.sizes() && t.scalar_type() == x.scalar_type(), name,
                    " must have the shape and dtype of x, ", x.sizes(), " ", x.scalar_type(), ", got ", t.sizes(), " ",
                    t.scalar_type());
  check_device(name, t, x);
}

// weight and bias: [F] with F >= C, of the statistics' dtype or that of x.
inline void check_parameter(const Tensor& x, const char* name, const std::optional<Tensor>& p) {
  if (!p) return;
  TORCH_CHECK_VALUE(p->dim() == 1 && p->size(0) >= x.size(1), name, " must have at least ", x.size(1),
                    " elements, got shape ", p->sizes());
  TORCH_CHECK_TYPE(p->scalar_type() == x.scalar_type() || p->scalar_type() == stats_dtype(x), name, " must be ",
                   stats_dtype(x), " or the dtype of x, got ", p->scalar_type());
  check_device(name, *p, x);
}

// mean and var: [C].
inline void check_statistic(const Tensor& x, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == x.size(1), name, " must have ", x.size(1), " elements, got shape ",
                    t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == stats_dtype(x), name, " must be ", stats_dtype(x), ", got ", t.scalar_type());
  check_device(name, t, x);
}

inline void check_forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                          const std::optional<Tensor>& residual, double eps) {
  check_activation(x, eps);
  check_parameter(x, "weight", weight);
  check_parameter(x, "bias", bias);
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), "mean and var must be given together, got only ",
                    mean ? "mean" : "var");
  if (mean) check_statistic(x, "mean", *mean);
  if (var) check_statistic(x, "var", *var);
  if (residual) check_like(x, "residual", *residual);
}

inline void check_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y,
                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& mean,
                           const Tensor& var, double eps) {
  check_activation(x, eps);
  check_like(x, "dy", dy);
  if (y) check_like(x, "y", *y);
  check_parameter(x, "weight", weight);
  check_parameter(x, "bias", bias);
  check_statistic(x, "mean", mean);
  check_statistic(x, "var", var);
}

// running: [F], F >= C, changed in place; of the batch: [C].
inline void check_record(const char* name, const Tensor& running, const char* batch_name, const Tensor& of_batch) {
  TORCH_CHECK_VALUE(of_batch.dim() == 1, batch_name, " must be [C], got ", of_batch.dim(), " dimensions");
  check_floating(batch_name, of_batch);
  check_device(batch_name, of_batch, running);
  check_floating(name, running);
  TORCH_CHECK_VALUE(running.dim() == 1 && running.size(0) >= of_batch.size(0), name, " must have at least ",
                    of_batch.size(0), " elements, got shape ", running.sizes());
  check_no_overlap(name, running);
  check_apart(name, running, batch_name, of_batch);
}

inline void check_records(const Tensor& running_mean, const Tensor& running_var, const Tensor& num_batches,
                          const Tensor& mean, const Tensor& var, int64_t values) {
  check_record("running_mean", running_mean, "mean", mean);
  check_record("running_var", running_var, "var", var);
  check_apart("running_mean", running_mean, "running_var", running_var);
  check_device("num_batches", num_batches, running_mean);
  TORCH_CHECK_VALUE(mean.size(0) == var.size(0), "mean and var must have as many elements, got ", mean.size(0), " and ",
                    var.size(0));
  TORCH_CHECK_VALUE(num_batches.numel() == 1 && num_batches.scalar_type() == at::kLong,
                    "num_batches must be one int64, got shape ", num_batches.sizes(), " ", num_batches.scalar_type());
  TORCH_CHECK_VALUE(values >= 2, "values must be at least 2, got ", values);
}

// Pitch of t seen as N * H * W rows of C adjacent values, -1 where its strides are not that. Broadcast rows have 0.
inline int64_t row_pitch(const Tensor& t) {
  if (t.size(1) > 1 && t.stride(1) != 1) return -1;
  int64_t pitch = t.size(1), rows = 1;
  for (const int dim : {3, 2, 0}) {
    if (t.size(dim) == 1) continue;
    if (rows == 1) pitch = t.stride(dim);
    if (t.stride(dim) != pitch * rows) return -1;
    rows *= t.size(dim);
  }
  return pitch;
}

// Is t N * C planes of H * W adjacent values? The planes may lie anywhere.
inline bool has_planes(const Tensor& t) {
  return (t.size(3) == 1 || t.stride(3) == 1) && (t.size(2) == 1 || t.stride(2) == t.size(3));
}

// How the kernels walk over an activation.
struct Layout {
  bool rows;  // N * H * W rows of C channels (channels_last), else N * C planes of H * W (contiguous)
  at::MemoryFormat format;

  explicit Layout(const Tensor& x) : format(x.suggest_memory_format()) {
    const bool one_pixel = x.size(2) * x.size(3) == 1;
    rows = one_pixel || (format == at::MemoryFormat::ChannelsLast && x.size(1) > 1);
  }

  Tensor empty(const Tensor& x) const { return at::empty(x.sizes(), x.options().memory_format(format)); }

  // t itself where its strides allow it to be read in place, else a copy in the layout's format.
  Tensor readable(const Tensor& t) const {
    return (rows ? row_pitch(t) >= 0 : has_planes(t)) ? t : t.contiguous(format);
  }
};

}  // namespace gradaug::batch_norm

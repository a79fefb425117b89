// The operators as C++ calls them: through the dispatcher, so by whatever kernel serves the device of the tensors.
// Schemas and shapes: gradaug_kernels/ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace gradaug::operators {

using at::Tensor;
using c10::SymInt;
using Integers = c10::SymIntArrayRef;
using MaybeTensor = std::optional<Tensor>;

// Found at the first call: Python declares the operators after the libraries are loaded.
#define GRADAUG_OPERATOR(name, ...)                                                                 \
  inline const c10::TypedOperatorHandle<__VA_ARGS__>& name() {                                      \
    static const auto handle =                                                                      \
        c10::Dispatcher::singleton().findSchemaOrThrow("gradaug::" #name, "").typed<__VA_ARGS__>(); \
    return handle;                                                                                  \
  }

GRADAUG_OPERATOR(slim_conv2d,
                 Tensor(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, SymInt out_channels,
                        Integers stride, Integers padding, Integers dilation, SymInt groups))
GRADAUG_OPERATOR(slim_conv2d_input_grad, Tensor(const Tensor& dy, const Tensor& weight, Integers input_size,
                                                Integers stride, Integers padding, Integers dilation, SymInt groups))
GRADAUG_OPERATOR(slim_conv2d_weight_grad_, void(const Tensor& dy, const Tensor& x, Tensor& dweight, Integers stride,
                                                Integers padding, Integers dilation, SymInt groups))
GRADAUG_OPERATOR(slim_conv2d_weight_grad, Tensor(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                 Integers stride, Integers padding, Integers dilation, SymInt groups))

GRADAUG_OPERATOR(slim_linear,
                 Tensor(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, SymInt out_features))
GRADAUG_OPERATOR(slim_linear_input_grad, Tensor(const Tensor& dy, const Tensor& weight, SymInt in_features))
GRADAUG_OPERATOR(slim_linear_weight_grad_, void(const Tensor& dy, const Tensor& x, Tensor& dweight))
GRADAUG_OPERATOR(slim_linear_weight_grad, Tensor(const Tensor& dy, const Tensor& x, const Tensor& weight))

// y, mean, var
GRADAUG_OPERATOR(slim_batch_norm,
                 std::tuple<Tensor, Tensor, Tensor>(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                                    const MaybeTensor& mean, const MaybeTensor& var,
                                                    const MaybeTensor& residual, bool relu, double eps))
// dx, dz, dweight, dbias
GRADAUG_OPERATOR(slim_batch_norm_backward,
                 std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& dy, const Tensor& x, const MaybeTensor& y,
                                                            const MaybeTensor& weight, const MaybeTensor& bias,
                                                            const Tensor& mean, const Tensor& var, bool batch_stats,
                                                            bool needs_dz, double eps))

// y, mean, var, y_mean, y_var
GRADAUG_OPERATOR(slim_norm_conv2d,
                 std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
                     const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& gamma,
                     const MaybeTensor& beta, bool batch_stats, bool relu, double eps, const Tensor& weight,
                     const MaybeTensor& bias, SymInt out_channels, Integers stride, Integers padding, Integers dilation,
                     SymInt groups, bool statistics))
// dx, dgamma, dbeta
GRADAUG_OPERATOR(slim_norm_conv2d_backward_,
                 std::tuple<Tensor, Tensor, Tensor>(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                    const Tensor& var, const MaybeTensor& gamma,
                                                    const MaybeTensor& beta, bool batch_stats, bool relu, double eps,
                                                    const Tensor& weight, Tensor& dweight, Integers stride,
                                                    Integers padding, Integers dilation, SymInt groups, bool needs_dx,
                                                    bool needs_dweight))
// dx, dgamma, dbeta, dweight
GRADAUG_OPERATOR(slim_norm_conv2d_backward,
                 std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                            const Tensor& var, const MaybeTensor& gamma,
                                                            const MaybeTensor& beta, bool batch_stats, bool relu,
                                                            double eps, const Tensor& weight, Integers stride,
                                                            Integers padding, Integers dilation, SymInt groups,
                                                            bool needs_dx, bool needs_dweight))

#undef GRADAUG_OPERATOR

}  // namespace gradaug::operators

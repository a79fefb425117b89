// Linear layer with the first features of a full-width weight: forward, input gradient, weight gradient.
// Strided GEMMs: the weight operand's leading dimension is the full number of features, so nothing is copied.
// float32 parameters of a low-precision x are rounded first.
#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>

namespace {

using at::Tensor;

constexpr int64_t kFewRows = 32;     // of 16-bit operands, which are as soon converted to floats
constexpr int64_t kBlock = 1 << 17;  // elements of the weight gradient that are computed at a time

struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

Tensor slim_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features) {
  NoAutocast guard;
  const auto dtype = x.scalar_type();
  const Tensor w = weight.narrow(0, 0, out_features).narrow(1, 0, x.size(-1)).to(dtype);  // [out, F]
  const auto b = bias ? std::optional<Tensor>(bias->narrow(0, 0, out_features).to(dtype)) : std::nullopt;
  return at::linear(x, w, b);
}

Tensor slim_linear_input_grad(const Tensor& dy, const Tensor& weight, int64_t in_features) {
  NoAutocast guard;
  return at::matmul(dy, weight.narrow(0, 0, dy.size(-1)).narrow(1, 0, in_features).to(dy.scalar_type()));  // [..., F]
}

void slim_linear_weight_grad_(const Tensor& dy, const Tensor& x, Tensor& dweight) {
  NoAutocast guard;
  const Tensor dy2 = dy.reshape({-1, dy.size(-1)});                            // [N, out]
  const Tensor x2 = x.reshape({-1, x.size(-1)});                               // [N, F]
  Tensor target = dweight.narrow(0, 0, dy2.size(1)).narrow(1, 0, x2.size(1));  // [out, F]
  if (target.scalar_type() == x.scalar_type()) {
    target.addmm_(dy2.t(), x2);
  } else if (target.scalar_type() == at::kFloat && x2.size(0) <= kFewRows) {
    target.addmm_(dy2.to(at::kFloat).t(), x2.to(at::kFloat));
  } else {
    // In blocks of rows: the product, and its copy in the target's dtype, would be as large as the weight.
    const int64_t rows = std::max<int64_t>(64, kBlock / std::max<int64_t>(1, x2.size(1)));
    for (int64_t o = 0; o < target.size(0); o += rows) {
      const int64_t n = std::min(rows, target.size(0) - o);
      target.narrow(0, o, n).add_(at::mm(dy2.narrow(1, o, n).t(), x2));
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_linear", slim_linear);
  m.impl("slim_linear_input_grad", slim_linear_input_grad);
  m.impl("slim_linear_weight_grad_", slim_linear_weight_grad_);
}

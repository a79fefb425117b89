// What the operators on the kernels of conv/problem.h share about tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

#include "cpu/microkernels/table.h"

namespace gradaug::cpu {

// The kernels compute in the dtypes they are given: no inner call may be cast by an enclosing torch.autocast.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

inline std::optional<Dtype> dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      return std::nullopt;
  }
}

}  // namespace gradaug::cpu

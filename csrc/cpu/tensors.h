// What the operators on the paths of conv/paths.h share about tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/conv/paths.h"

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

// Verdicts as Python takes them: four strings each, empty where there is none.
inline std::vector<std::string> lines(const std::vector<Verdict>& verdicts) {
  std::vector<std::string> found;
  for (const Verdict& v : verdicts) {
    for (const char* text : {v.pixels.c_str(), v.path, v.cannot, v.loses}) found.emplace_back(text ? text : "");
  }
  return found;
}

}  // namespace gradaug::cpu

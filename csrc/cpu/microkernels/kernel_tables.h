// All kernels of an instruction set: what its translation unit defines. kernel_tables.cpp has the list of the sets.
#pragma once

#include <type_traits>

#include "cpu/microkernels/depthwise_table.h"
#include "cpu/microkernels/table.h"
#include "cpu/norm/table.h"

namespace gradaug::cpu {

// Null where the set serves no such elements (kernel_tables.cpp).
struct NormTables {
  const batch_norm::NormKernels<double>* f64 = nullptr;
  const batch_norm::NormKernels<float>* f32 = nullptr;
  const batch_norm::NormKernels<c10::BFloat16>* bf16 = nullptr;
  const batch_norm::NormKernels<c10::Half>* f16 = nullptr;

  template <typename T>
  const batch_norm::NormKernels<T>& of() const {
    if constexpr (std::is_same_v<T, double>)
      return *f64;
    else if constexpr (std::is_same_v<T, float>)
      return *f32;
    else if constexpr (std::is_same_v<T, c10::BFloat16>)
      return *bf16;
    else
      return *f16;
  }
};

struct KernelTables {
  const Kernels* gemm = nullptr;                // null: PyTorch's own convolutions are used
  const DepthwiseKernels* depthwise = nullptr;  // likewise
  NormTables norm;
};

extern const KernelTables portable_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels;

}  // namespace gradaug::cpu

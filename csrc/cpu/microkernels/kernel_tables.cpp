// Which kernels serve which dtype in this process.
#include "cpu/microkernels/kernel_tables.h"

#include <c10/core/ScalarType.h>

#include "cpu/simd/isa.h"

namespace gradaug::cpu {
namespace {

struct InstructionSet {
  const KernelTables* kernels;
  bool (*serves)(const Processor& has, c10::ScalarType dtype);
};

// The best first.
constexpr InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {.kernels = &avx512_bf16_kernels,
     .serves = [](const Processor& has, c10::ScalarType dtype) { return has.avx512_bf16 && dtype == c10::kBFloat16; }},
    {.kernels = &avx512_kernels, .serves = [](const Processor& has, c10::ScalarType) { return has.avx512; }},
    {.kernels = &avx2_kernels, .serves = [](const Processor& has, c10::ScalarType) { return has.avx2; }},
#endif
    {.kernels = &portable_kernels, .serves = [](const Processor&, c10::ScalarType) { return true; }},
};

const KernelTables& tables(c10::ScalarType dtype) {
  const InstructionSet* set = kInstructionSets;
  while (!set->serves(processor(), dtype)) set++;
  return *set->kernels;
}

c10::ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16:
      return c10::kBFloat16;
    case Dtype::f16:
      return c10::kHalf;
    default:
      return c10::kFloat;
  }
}

}  // namespace

const Kernels* select_kernels(Dtype dtype) {
  // Matrix products in 16 bits that oneDNN's convolutions have and these kernels do not. Batch norm and convolutions in
  // small groups are no matrix products: those kernels stay.
  if (dtype == Dtype::bf16 && processor().amx_bf16) return nullptr;
  if (dtype == Dtype::f16 && processor().avx512_fp16) return nullptr;
  return tables(scalar_type(dtype)).gemm;
}

const DepthwiseKernels* select_depthwise_kernels(Dtype dtype) { return tables(scalar_type(dtype)).depthwise; }

}  // namespace gradaug::cpu

namespace gradaug::batch_norm {

template <typename T>
const NormKernels<T>& norm_kernels() {
  static const NormKernels<T>& chosen = cpu::tables(c10::CppTypeToScalarType<T>::value).norm.template of<T>();
  return chosen;
}

template const NormKernels<float>& norm_kernels();
template const NormKernels<double>& norm_kernels();
template const NormKernels<c10::BFloat16>& norm_kernels();
template const NormKernels<c10::Half>& norm_kernels();

}  // namespace gradaug::batch_norm

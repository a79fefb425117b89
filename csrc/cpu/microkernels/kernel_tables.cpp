// Which kernels serve which dtype on this processor.
#include "cpu/microkernels/depthwise_table.h"
#include "cpu/microkernels/table.h"
#include "cpu/simd/isa.h"

namespace gradaug::cpu {

const Kernels* select_kernels(Dtype dtype) {
  const Processor& has = processor();
  // Products of matrices in 16 bits that PyTorch's own convolutions (oneDNN) have and these kernels do not.
  if (dtype == Dtype::bf16 && has.amx_bf16) return nullptr;
  if (dtype == Dtype::f16 && has.avx512_fp16) return nullptr;
  if (dtype == Dtype::bf16 && has.avx512_bf16) return avx512_bf16_kernels();
  return has.avx512 ? avx512_kernels() : has.avx2 ? avx2_kernels() : nullptr;
}

const DepthwiseKernels* select_depthwise_kernels(Dtype dtype) {
  const Processor& has = processor();
  if (dtype == Dtype::bf16 && has.avx512_bf16) return avx512_bf16_depthwise_kernels();
  return has.avx512 ? avx512_depthwise_kernels() : has.avx2 ? avx2_depthwise_kernels() : nullptr;
}

}  // namespace gradaug::cpu

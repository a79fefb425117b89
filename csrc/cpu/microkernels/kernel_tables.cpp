// Which kernels serve which dtype on this processor.
#include "cpu/microkernels/table.h"

#include <ATen/Version.h>

#include <string>

#include "cpu/microkernels/depthwise_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gradaug::cpu {
namespace {

// Bits of CPUID leaf 7: features that PyTorch's own convolutions (oneDNN) make better use of than these kernels.
struct Features {
  bool avx512_bf16 = false, avx512_fp16 = false, amx_bf16 = false;

  Features() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
      amx_bf16 = d >> 22 & 1;
      avx512_fp16 = d >> 23 & 1;
    }
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512_bf16 = a >> 5 & 1;
#endif
  }
};

const std::string& capability() {
  static const std::string name = at::get_cpu_capability();  // ATEN_CPU_CAPABILITY can lower it
  return name;
}

const Features& features() {
  static const Features found;
  return found;
}

}  // namespace

const Kernels* select_kernels(Dtype dtype) {
  if (capability() == "AVX2") return avx2_kernels();
  if (capability() != "AVX512") return nullptr;
  if (dtype == Dtype::bf16 && features().amx_bf16) return nullptr;
  if (dtype == Dtype::f16 && features().avx512_fp16) return nullptr;
  return dtype == Dtype::bf16 && features().avx512_bf16 ? avx512_bf16_kernels() : avx512_kernels();
}

const DepthwiseKernels* select_depthwise_kernels(Dtype dtype) {
  if (capability() == "AVX2") return avx2_depthwise_kernels();
  if (capability() != "AVX512") return nullptr;
  return dtype == Dtype::bf16 && features().avx512_bf16 ? avx512_bf16_depthwise_kernels() : avx512_depthwise_kernels();
}

}  // namespace gradaug::cpu

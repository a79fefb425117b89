#include "cpu/simd/isa.h"

#include <ATen/Version.h>

#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gradaug::cpu {
namespace {

Processor detect() {
  Processor has;
  const std::string capability = at::get_cpu_capability();
  has.avx512 = capability == "AVX512";
  has.avx2 = has.avx512 || capability == "AVX2";
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (has.avx512 && __get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    has.amx_bf16 = d >> 22 & 1;
    has.avx512_fp16 = d >> 23 & 1;
  }
  if (has.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) has.avx512_bf16 = a >> 5 & 1;
#endif
  return has;
}

}  // namespace

const Processor& processor() {
  static const Processor found = detect();
  return found;
}

}  // namespace gradaug::cpu

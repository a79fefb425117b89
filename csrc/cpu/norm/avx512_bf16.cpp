// The kernels of norm/table.h for AVX-512 with AVX512_BF16.
#include "cpu/norm/table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include "cpu/norm/instantiate.h"
#include "cpu/simd/norm_avx512.h"

namespace gradaug::batch_norm {

template <typename T>
const NormKernels<T>& Avx512Bf16Kernels::get() {
  return norm_table<Avx512<T, true>>;
}

template const NormKernels<float>& Avx512Bf16Kernels::get();
template const NormKernels<double>& Avx512Bf16Kernels::get();
template const NormKernels<c10::BFloat16>& Avx512Bf16Kernels::get();
template const NormKernels<c10::Half>& Avx512Bf16Kernels::get();

}  // namespace gradaug::batch_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

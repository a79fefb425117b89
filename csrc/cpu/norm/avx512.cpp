// The kernels of norm/table.h for AVX-512 (F, BW, DQ, VL).
#include "cpu/norm/table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "cpu/norm/instantiate.h"
#include "cpu/simd/norm_avx512.h"

namespace gradaug::batch_norm {

template <typename T>
const NormKernels<T>& Avx512Kernels::get() {
  return norm_table<Avx512<T, false>>;
}

template const NormKernels<float>& Avx512Kernels::get();
template const NormKernels<double>& Avx512Kernels::get();
template const NormKernels<c10::BFloat16>& Avx512Kernels::get();
template const NormKernels<c10::Half>& Avx512Kernels::get();

}  // namespace gradaug::batch_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// The kernels of norm/table.h for AVX2 with FMA and F16C.
#include "cpu/norm/table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/norm/instantiate.h"

namespace gradaug::batch_norm {
namespace {

template <typename T>
struct Avx2 : Vectors<T, 32> {};

template <>
struct Avx2<c10::Half> : Vectors<c10::Half, 32> {
  static GRADAUG_INLINE Wide widen(Raw raw) {
    const __m256i halves = (__m256i)raw.bits[0];
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
  }
  static GRADAUG_INLINE Raw narrow(Wide w) {
    constexpr int to_nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {(Bits)_mm256_set_m128i(_mm256_cvtps_ph(w.v[1], to_nearest), _mm256_cvtps_ph(w.v[0], to_nearest))};
  }
};

}  // namespace

template <typename T>
const NormKernels<T>& Avx2Kernels::get() {
  return norm_table<Avx2<T>>;
}

template const NormKernels<float>& Avx2Kernels::get();
template const NormKernels<double>& Avx2Kernels::get();
template const NormKernels<c10::BFloat16>& Avx2Kernels::get();
template const NormKernels<c10::Half>& Avx2Kernels::get();

}  // namespace gradaug::batch_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// The kernels of kernels.h for AVX2 (with FMA and F16C).
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels_impl.h"
#include "simd_avx2.h"  // after it: uses GRADAUG_UNROLL

const gradaug::cpu::Kernels* gradaug::cpu::avx2_kernels() { return &Impl<Avx2>::table; }

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const gradaug::cpu::Kernels* gradaug::cpu::avx2_kernels() { return nullptr; }
#endif

// Vectors of AVX2 with FMA and F16C, for depthwise_impl.h.
// Included only in translation units that are compiled for that instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace gradaug::cpu {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int lanes = 8;
  static constexpr int pair = 1;
  static constexpr int registers = 16;

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  // lane c = v[index[c]]
  static V permute(V v, const int32_t* index) {
    return _mm256_permutevar8x32_ps(v, _mm256_load_si256(reinterpret_cast<const __m256i*>(index)));
  }

  // n <= 8 elements as floats, zeros beyond.
  static V load_floats(const void* p, Dtype dtype, int64_t n) {
    if (dtype == Dtype::f32) return _mm256_maskload_ps(static_cast<const float*>(p), mask(n));
    __m128i raw;
    if (n >= 8) {
      raw = _mm_loadu_si128(static_cast<const __m128i*>(p));
    } else {
      alignas(16) uint16_t some[8] = {};
      for (int64_t i = 0; i < n; i++) some[i] = static_cast<const uint16_t*>(p)[i];
      raw = _mm_load_si128(reinterpret_cast<const __m128i*>(some));
    }
    if (dtype == Dtype::f16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }

  static void store_floats(void* p, V v, Dtype dtype, int64_t n) {
    if (dtype == Dtype::f32) {
      if (n >= 8) return _mm256_storeu_ps(static_cast<float*>(p), v);
      return _mm256_maskstore_ps(static_cast<float*>(p), mask(n), v);
    }
    const __m128i raw =
        dtype == Dtype::f16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : to_bf16(v);
    if (n >= 8) return _mm_storeu_si128(static_cast<__m128i*>(p), raw);
    alignas(16) uint16_t all[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(all), raw);
    for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(p)[i] = all[i];
  }

 private:
  static __m256i mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  // Round to nearest even; a NaN becomes a quiet NaN.
  static __m128i to_bf16(V v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
};

}  // namespace
}  // namespace gradaug::cpu

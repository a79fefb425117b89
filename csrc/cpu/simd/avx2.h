// Vectors of AVX2, with FMA and F16C: of units for the convolutions, of elements for batch norm.
// Included only in translation units that are compiled for that instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/microkernels/table.h"
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/portable.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

// Units for convolutions: bfloat16 and float16 become float32 on the way in.
struct Avx2 {
  using V = __m256;
  static constexpr int lanes = 8;
  static constexpr int pair = 1;
  static constexpr int max_rows = 6;
  static constexpr int registers = 16;

  static __m256i mask(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n >= 8 ? 8 : static_cast<int>(n)), lane);
  }

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_to_write(const void* p) { _m_prefetchw(const_cast<void*>(p)); }
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const float* p, int64_t n) { return n >= 8 ? load(p) : _mm256_maskload_ps(p, mask(n)); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store(float* p, V v, int64_t n) {
    if (n >= 8) return store(p, v);
    __m128 half = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, half);
      half = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), half);
      half = _mm_movehl_ps(half, half);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, half);
  }
  static V broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static V constant(float x) { return _mm256_set1_ps(x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  // lane c = v[index[c]]
  static V permute(V v, const int32_t* index) {
    return _mm256_permutevar8x32_ps(v, _mm256_load_si256(reinterpret_cast<const __m256i*>(index)));
  }
  static V unit_fma(V a, V b, V c) { return fma(a, b, c); }

  // n <= 8 elements as floats, zeros beyond.
  static V load_floats(const void* p, Dtype dtype, int64_t n) {
    if (dtype == Dtype::f32) return load(static_cast<const float*>(p), n);
    __m128i raw;
    if (n >= 8) {
      raw = _mm_loadu_si128(static_cast<const __m128i*>(p));
    } else {
      uint16_t some[8] = {};
      if (n > 0) std::memcpy(some, p, n * sizeof(uint16_t));
      raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(some));
    }
    if (dtype == Dtype::f16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }

  static void store_floats(void* p, V v, Dtype dtype, int64_t n) {
    if (dtype == Dtype::f32) return store(static_cast<float*>(p), v, n);
    const __m128i raw =
        dtype == Dtype::f16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : to_bf16(v);
    if (n >= 8) return _mm_storeu_si128(static_cast<__m128i*>(p), raw);
    if (n <= 0) return;
    uint16_t some[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(some), raw);
    std::memcpy(p, some, n * sizeof(uint16_t));
  }

  // n elements as units, n <= 8, zeros beyond.
  static V load_units(const void* p, Dtype dtype, int64_t n) { return load_floats(p, dtype, n); }

  // rows[i][j] -> rows[j][i]: 2 x 2 blocks of 4 lanes, after those within four lanes.
  static void transpose(V (&rows)[8]) {
    V t[8];
    GRADAUG_UNROLL
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    GRADAUG_UNROLL
    for (int i = 0; i < 8; i += 4) {
      rows[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      rows[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      rows[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      rows[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    GRADAUG_UNROLL
    for (int i = 0; i < 4; i++) {
      const V low = rows[i], high = rows[i + 4];
      rows[i] = _mm256_permute2f128_ps(low, high, 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
  }

 private:
  static __m128i to_bf16(V v) {
    typedef uint32_t Bits __attribute__((vector_size(32)));
    const auto high = (__m256i)(rounded_to_bfloat16<Bits>(v) >> 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

}  // namespace
}  // namespace gradaug::cpu

namespace gradaug::batch_norm {
namespace {

template <typename T>
struct Avx2Elements : Elements<T, 32> {};

template <>
struct Avx2Elements<c10::Half> : Elements<c10::Half, 32> {
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
}  // namespace gradaug::batch_norm

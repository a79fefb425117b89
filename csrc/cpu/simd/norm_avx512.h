// Vectors of AVX-512 (F, BW, DQ, VL) for norm/rows.h. kRounds: AVX512_BF16 rounds to bfloat16.
// Included only in translation units that are compiled for that instruction set.
#pragma once

#include <immintrin.h>

#include "cpu/simd/portable.h"

namespace gradaug::batch_norm {
namespace {

template <typename Element, bool kRounds>
struct Avx512 : Vectors<Element, 64> {
  using Base = Vectors<Element, 64>;
  using typename Base::A;
  using typename Base::Bits;
  using typename Base::Raw;
  using typename Base::V;
  using typename Base::Wide;
  using T = Element;

  using Base::read;
  static GRADAUG_INLINE Raw read(const T* p, int n, Raw fill) {
    if constexpr (sizeof(T) == 2) {
      return {(Bits)_mm512_mask_loadu_epi16((__m512i)fill.bits[0], (1u << n) - 1, p)};
    } else if constexpr (sizeof(T) == 4) {
      const uint32_t mask = (1u << n) - 1;
      return {(Bits)_mm512_mask_loadu_epi32((__m512i)fill.bits[0], mask, p),
              (Bits)_mm512_mask_loadu_epi32((__m512i)fill.bits[1], mask >> 16, p + 16)};
    } else {
      return Base::read(p, n, fill);
    }
  }

  static GRADAUG_INLINE V relu(V z) {
    if constexpr (sizeof(A) == 4) {
      return _mm512_max_ps(V{}, z);  // z where it is NaN
    } else {
      return _mm512_max_pd(V{}, z);
    }
  }

  static GRADAUG_INLINE Raw positive(Raw dy, Raw y) {
    if constexpr (sizeof(T) == 2) {
      constexpr short infinity = std::is_same_v<T, c10::Half> ? 0x7c00 : 0x7f80;
      const __m512i before = _mm512_sub_epi16((__m512i)y.bits[0], _mm512_set1_epi16(1));
      const __mmask32 mask = _mm512_cmplt_epu16_mask(before, _mm512_set1_epi16(infinity));
      return {(Bits)_mm512_maskz_mov_epi16(mask, (__m512i)dy.bits[0])};
    } else {
      return Base::positive(dy, y);
    }
  }

  static GRADAUG_INLINE Wide widen(Raw raw) {
    if constexpr (std::is_same_v<T, c10::Half>) {
      const __m512i halves = (__m512i)raw.bits[0];
      return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
    } else {
      return Base::widen(raw);
    }
  }

  static GRADAUG_INLINE Raw narrow(Wide w) {
    if constexpr (std::is_same_v<T, c10::Half>) {
      constexpr int to_nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(w.v[0], to_nearest));
      return {(Bits)_mm512_inserti64x4(low, _mm512_cvtps_ph(w.v[1], to_nearest), 1)};
    } else if constexpr (Base::interleaved && kRounds) {
      return {(Bits)_mm512_permutexvar_epi16(zipped(), (__m512i)_mm512_cvtne2ps_pbh(w.v[1], w.v[0]))};
    } else {
      return Base::narrow(w);
    }
  }

 private:
  // 0, 16, 1, 17, ...
  static GRADAUG_INLINE __m512i zipped() {
    const __m512i pair = _mm512_set1_epi32(16 << 16), step = _mm512_set1_epi32(1 << 16 | 1);
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi16(pair, _mm512_mullo_epi16(_mm512_or_si512(index, _mm512_slli_epi32(index, 16)), step));
  }
};

}  // namespace
}  // namespace gradaug::batch_norm

// Vectors of AVX-512 (F, BW, DQ, VL) and of AVX512_BF16: of units for the convolutions, of elements for batch norm.
// Included only in translation units that are compiled for that instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/microkernels/table.h"
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/portable.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

// Units for convolutions. kPairs: AVX512_BF16 multiplies pairs of bfloat16.
template <bool kPairs>
struct Avx512 {
  using V = __m512;
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  static constexpr int pair = kPairs ? 2 : 1;
  static constexpr int max_rows = 14;

  static __mmask16 mask(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
  static __mmask32 mask32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_to_write(const void* p) { _m_prefetchw(const_cast<void*>(p)); }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  // Partial stores are powers of two: a masked store costs some processors a hundred cycles amid loads.
  static void store(float* p, V v, int64_t n) {
    if (n >= 16) return _mm512_storeu_ps(p, v);
    __m256 half = _mm512_castps512_ps256(v);
    if (n & 8) {
      _mm256_storeu_ps(p, half);
      half = _mm512_extractf32x8_ps(v, 1);
      p += 8;
    }
    __m128 quarter = _mm256_castps256_ps128(half);
    if (n & 4) {
      _mm_storeu_ps(p, quarter);
      quarter = _mm256_extractf128_ps(half, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), quarter);
      quarter = _mm_movehl_ps(quarter, quarter);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, quarter);
  }
  static V broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static V constant(float x) { return _mm512_set1_ps(x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }

  // lane c = v[index[c]]
  static V permute(V v, const int32_t* index) { return _mm512_permutexvar_ps(_mm512_load_si512(index), v); }

  // The product of two units, added to c.
  static V unit_fma(V a, V b, V c) {
    if constexpr (kPairs) {
      return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    } else {
      return fma(a, b, c);
    }
  }

  // n <= 16 elements as floats, zeros beyond.
  static V load_floats(const void* p, Dtype dtype, int64_t n) {
    if (dtype == Dtype::f32) return load(static_cast<const float*>(p), n);
    const __m256i raw = _mm256_maskz_loadu_epi16(mask(n), p);
    if (dtype == Dtype::f16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }

  static void store_floats(void* p, V v, Dtype dtype, int64_t n) {
    if (dtype == Dtype::f32) return store(static_cast<float*>(p), v, n);
    const __m256i raw =
        dtype == Dtype::f16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : to_bf16(v);
    if (n >= 16) return _mm256_storeu_si256(static_cast<__m256i*>(p), raw);
    auto* to = static_cast<uint16_t*>(p);
    __m128i half = _mm256_castsi256_si128(raw);
    if (n & 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
      half = _mm256_extracti128_si256(raw, 1);
      to += 8;
    }
    if (n & 4) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), half);
      half = _mm_srli_si128(half, 8);
      to += 4;
    }
    if (n & 2) {
      _mm_storeu_si32(to, half);
      half = _mm_srli_si128(half, 4);
      to += 2;
    }
    if (n & 1) _mm_storeu_si16(to, half);
  }

  // n elements as units, n <= 16 * pair, zeros beyond.
  static V load_units(const void* p, Dtype dtype, int64_t n) {
    if constexpr (kPairs) {
      if (dtype == Dtype::f32) {
        const auto* floats = static_cast<const float*>(p);
        const V low = load(floats, n), high = n > 16 ? load(floats + 16, n - 16) : zero();
        return reinterpret_cast<V>(_mm512_cvtne2ps_pbh(high, low));
      }
      return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask32(n), p));
    } else {
      return load_floats(p, dtype, n);
    }
  }

  // Pixels of an odd number of 16-bit channels, adjacent in memory, as whole units each: which element goes where.
  struct Spreading {
    __m512i index;
    __mmask32 used;
  };
  static Spreading spreading(int64_t channels, int64_t units) {
    alignas(64) uint16_t index[32];
    __mmask32 used = 0;
    for (int64_t i = 0; i < 32; i++) {
      const int64_t pixel = i / (2 * units), k = i % (2 * units);
      index[i] = k < channels ? pixel * channels + k : 0;
      used |= static_cast<__mmask32>(k < channels) << i;
    }
    return {_mm512_load_si512(index), used};
  }
  static V spread(const void* p, int64_t n, const Spreading& to) {
    const __m512i elements = _mm512_maskz_loadu_epi16(mask32(n), p);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(to.used, to.index, elements));
  }

  // v[i] = (first[i], second[i]) for n bfloat16 values each, zeros beyond and where one is null.
  static V zip(const uint16_t* first, const uint16_t* second, int64_t n) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first ? mask(n) : 0, first));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second ? mask(n) : 0, second));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // v[i] = (first[i], second[i]) for n floats each, rounded to bfloat16; zeros beyond and where second is null.
  static V zip(const float* first, const float* second, int64_t n) {
    const __m512i low = _mm512_cvtepu16_epi32(to_bf16(load(first, n)));
    const __m512i high = second ? _mm512_cvtepu16_epi32(to_bf16(load(second, n))) : _mm512_setzero_si512();
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static V zip(const uint16_t* first, const uint16_t* second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // rows[i][j] -> rows[j][i]: 2 x 2 blocks of 4, 8 and 16 lanes, then within four lanes.
  static void transpose(V (&rows)[16]) {
    V t[16];
    GRADAUG_UNROLL
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    GRADAUG_UNROLL
    for (int i = 0; i < 16; i += 4) {
      rows[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      rows[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      rows[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      rows[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    GRADAUG_UNROLL
    for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    GRADAUG_UNROLL
    for (int i = 0; i < 4; i++) {
      rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

 private:
  static __m256i to_bf16(V v) {
    if constexpr (kPairs) {
      return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
    } else {
      typedef uint32_t Bits __attribute__((vector_size(64)));
      return _mm512_cvtepi32_epi16((__m512i)(rounded_to_bfloat16<Bits>(v) >> 16));
    }
  }
};

}  // namespace
}  // namespace gradaug::cpu

namespace gradaug::batch_norm {
namespace {

// kRounds: AVX512_BF16 rounds to bfloat16.
template <typename Element, bool kRounds>
struct Avx512ElementsOf : Elements<Element, 64> {
  using Base = Elements<Element, 64>;
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

template <typename T>
using Avx512Elements = Avx512ElementsOf<T, false>;
using Avx512Bf16Elements = Avx512ElementsOf<c10::BFloat16, true>;

}  // namespace
}  // namespace gradaug::batch_norm

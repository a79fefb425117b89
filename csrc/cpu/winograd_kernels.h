// The transforms of winograd.cpp, written once for any vector type S (simd_*.h).
// Included by kernels_impl.h alone.
//
//         [1  0 -1  0]        [1    0    0  ]
//   B^T = [0  1  1  0]    G = [1/2  1/2  1/2]    A^T = [1  1  1  0]
//         [0 -1  1  0]        [1/2 -1/2  1/2]          [0  1 -1 -1]
//         [0  1  0 -1]        [0    0    1  ]
#pragma once

#include "kernels.h"

namespace gradaug::cpu {
namespace {

template <class S>
struct Winograd {
  using V = typename S::V;

  static V half(V v) { return S::mul(v, S::constant(0.5f)); }
  static void input(V& a, V& b, V& c, V& d) {
    const V first = S::sub(a, c), second = S::add(b, c), third = S::sub(c, b);
    d = S::sub(b, d);
    a = first, b = second, c = third;
  }

  static void input_tile(float* dst, int64_t dst_tap, int64_t panel, int64_t dst_panel, const void* const pixels[16],
                         Dtype dtype, int64_t channels) {
    const int64_t size = size_of(dtype);
    for (int64_t k = 0; k < channels; k += S::lanes) {
      V d[16];
      GRADAUG_UNROLL
      for (int i = 0; i < 16; i++) {
        d[i] = S::load_floats(static_cast<const char*>(pixels[i]) + k * size, dtype, channels - k);
      }
      GRADAUG_UNROLL
      for (int i = 0; i < 4; i++) input(d[i], d[4 + i], d[8 + i], d[12 + i]);
      GRADAUG_UNROLL
      for (int i = 0; i < 16; i += 4) input(d[i], d[i + 1], d[i + 2], d[i + 3]);
      float* to = dst + k / panel * dst_panel + k % panel;
      GRADAUG_UNROLL
      for (int i = 0; i < 16; i++) S::store(to + i * dst_tap, d[i]);
    }
  }

  static void gradient_tile(float* dst, int64_t dst_tap, const void* const pixels[4], Dtype dtype, int64_t channels) {
    const int64_t size = size_of(dtype);
    for (int64_t k = 0; k < channels; k += S::lanes, dst += S::lanes) {
      V rows[4][2];
      GRADAUG_UNROLL
      for (int j = 0; j < 2; j++) {
        const V y0 = S::load_floats(static_cast<const char*>(pixels[j]) + k * size, dtype, channels - k);
        const V y1 = S::load_floats(static_cast<const char*>(pixels[2 + j]) + k * size, dtype, channels - k);
        rows[0][j] = y0, rows[1][j] = S::add(y0, y1), rows[2][j] = S::sub(y0, y1), rows[3][j] = S::sub(S::zero(), y1);
      }
      GRADAUG_UNROLL
      for (int i = 0; i < 4; i++) {
        const V y0 = rows[i][0], y1 = rows[i][1];
        S::store(dst + (4 * i) * dst_tap, y0);
        S::store(dst + (4 * i + 1) * dst_tap, S::add(y0, y1));
        S::store(dst + (4 * i + 2) * dst_tap, S::sub(y0, y1));
        S::store(dst + (4 * i + 3) * dst_tap, S::sub(S::zero(), y1));
      }
    }
  }

  static void weight(float* dst, int64_t dst_tap, const float* src, int64_t src_tap, int64_t count) {
    for (int64_t k = 0; k < count; k += S::lanes) {
      V rows[4][3];
      GRADAUG_UNROLL
      for (int j = 0; j < 3; j++) {
        const V g0 = S::load(src + k + j * src_tap), g1 = S::load(src + k + (3 + j) * src_tap),
                g2 = S::load(src + k + (6 + j) * src_tap);
        filter(g0, g1, g2, rows[0][j], rows[1][j], rows[2][j], rows[3][j]);
      }
      GRADAUG_UNROLL
      for (int i = 0; i < 4; i++) {
        V u[4];
        filter(rows[i][0], rows[i][1], rows[i][2], u[0], u[1], u[2], u[3]);
        GRADAUG_UNROLL
        for (int j = 0; j < 4; j++) S::store(dst + k + (4 * i + j) * dst_tap, u[j]);
      }
    }
  }

  static void output_tile(void* const pixels[4], Dtype dtype, const float* src, int64_t src_tap, const float* bias,
                          int64_t columns) {
    for (int64_t j = 0; j < columns; j += S::lanes) {
      V rows[2][4];
      GRADAUG_UNROLL
      for (int i = 0; i < 4; i++) {
        const V m0 = S::load(src + j + i * src_tap), m1 = S::load(src + j + (4 + i) * src_tap),
                m2 = S::load(src + j + (8 + i) * src_tap), m3 = S::load(src + j + (12 + i) * src_tap);
        rows[0][i] = S::add(S::add(m0, m1), m2);
        rows[1][i] = S::sub(S::sub(m1, m2), m3);
      }
      const V shift = bias ? S::load(bias + j) : S::zero();
      GRADAUG_UNROLL
      for (int i = 0; i < 2; i++) {
        const V y[2] = {S::add(S::add(rows[i][0], rows[i][1]), rows[i][2]),
                        S::sub(S::sub(rows[i][1], rows[i][2]), rows[i][3])};
        GRADAUG_UNROLL
        for (int k = 0; k < 2; k++) {
          char* to = static_cast<char*>(pixels[2 * i + k]);
          if (to) S::store_floats(to + j * size_of(dtype), S::add(y[k], shift), dtype, columns - j);
        }
      }
    }
  }

  static void add_weight_grad(float* const taps[9], const float* src, int64_t src_tap, int64_t count) {
    for (int64_t k = 0; k < count; k += S::lanes) {
      const int64_t n = count - k;
      V rows[3][4];
      GRADAUG_UNROLL
      for (int j = 0; j < 4; j++) {
        const V u0 = S::load(src + k + j * src_tap, n), u1 = S::load(src + k + (4 + j) * src_tap, n),
                u2 = S::load(src + k + (8 + j) * src_tap, n), u3 = S::load(src + k + (12 + j) * src_tap, n);
        filter_transposed(u0, u1, u2, u3, rows[0][j], rows[1][j], rows[2][j]);
      }
      GRADAUG_UNROLL
      for (int i = 0; i < 3; i++) {
        V g[3];
        filter_transposed(rows[i][0], rows[i][1], rows[i][2], rows[i][3], g[0], g[1], g[2]);
        GRADAUG_UNROLL
        for (int j = 0; j < 3; j++) {
          float* to = taps[3 * i + j] + k;
          S::store(to, S::add(S::load(to, n), g[j]), n);
        }
      }
    }
  }

 private:
  // u = G g
  static void filter(V g0, V g1, V g2, V& u0, V& u1, V& u2, V& u3) {
    const V even = half(S::add(g0, g2)), odd = half(g1);
    u0 = g0, u1 = S::add(even, odd), u2 = S::sub(even, odd), u3 = g2;
  }
  // g = G^T u
  static void filter_transposed(V u0, V u1, V u2, V u3, V& g0, V& g1, V& g2) {
    const V even = half(S::add(u1, u2));
    g0 = S::add(u0, even), g1 = half(S::sub(u1, u2)), g2 = S::add(even, u3);
  }
};

}  // namespace
}  // namespace gradaug::cpu

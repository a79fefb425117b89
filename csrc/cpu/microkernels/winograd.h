// The transforms of conv/winograd.h, for any vector type S (simd/) and tile F. One call reads a tile of every channel
// (or one weight) once, keeps a vector of channels of all its places in registers, and writes each place once.
#pragma once

#include "cpu/microkernels/table.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

// One axis of F(2, 3), from the polynomials' values at 0, 1, -1 and infinity:
//
//         [1  0 -1  0]        [1    0    0  ]
//   B^T = [0  1  1  0]    G = [1/2  1/2  1/2]    A^T = [1  1  1  0]
//         [0 -1  1  0]        [1/2 -1/2  1/2]          [0  1 -1 -1]
//         [0  1  0 -1]        [0    0    1  ]
template <class S>
struct F2 {
  using V = typename S::V;
  static constexpr int outputs = 2, inputs = 4;

  // B^T d
  static void input(const V (&d)[4], V (&v)[4]) {
    v[0] = S::sub(d[0], d[2]), v[1] = S::add(d[1], d[2]), v[2] = S::sub(d[2], d[1]), v[3] = S::sub(d[1], d[3]);
  }
  // G g
  static void weight(const V (&g)[3], V (&u)[4]) {
    const V half = S::constant(0.5f), even = S::mul(half, S::add(g[0], g[2])), odd = S::mul(half, g[1]);
    u[0] = g[0], u[1] = S::add(even, odd), u[2] = S::sub(even, odd), u[3] = g[2];
  }
  // A^T m
  static void output(const V (&m)[4], V (&y)[2]) {
    y[0] = S::add(S::add(m[0], m[1]), m[2]), y[1] = S::sub(S::sub(m[1], m[2]), m[3]);
  }
  // A y
  static void gradient(const V (&y)[2], V (&z)[4]) {
    z[0] = y[0], z[1] = S::add(y[0], y[1]), z[2] = S::sub(y[0], y[1]), z[3] = S::sub(S::zero(), y[1]);
  }
  // G^T u
  static void weight_grad(const V (&u)[4], V (&g)[3]) {
    const V half = S::constant(0.5f), even = S::mul(half, S::add(u[1], u[2]));
    g[0] = S::add(u[0], even), g[1] = S::mul(half, S::sub(u[1], u[2])), g[2] = S::add(even, u[3]);
  }
};

// One axis of F(4, 3), from the values at 0, a, -a, b, -b and infinity. With the usual 1 and 2 the error would be
// twice that of 5/8 and 3/2.
//
//         [a2b2   0  -a2-b2   0    1  0]        [ 1   0   0] / a2b2              [1  1  1  1  1  0]
//         [ 0  -ab2   -b2     a    1  0]        [ 1   a  a2] / 2a2(a2-b2)        [0  a -a  b -b  0]
//   B^T = [ 0   ab2   -b2    -a    1  0]    G = [ 1  -a  a2] / 2a2(a2-b2)  A^T = [0 a2 a2 b2 b2  0]
//         [ 0  -a2b   -a2     b    1  0]        [ 1   b  b2] / 2b2(b2-a2)        [0 a3-a3 b3-b3  1]
//         [ 0   a2b   -a2    -b    1  0]        [ 1  -b  b2] / 2b2(b2-a2)
//         [ 0  a2b2    0   -a2-b2  0  1]        [ 0   0   1]
template <class S>
struct F4 {
  using V = typename S::V;
  static constexpr int outputs = 4, inputs = 6;
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;
  static constexpr double f_0 = a2 * b2, f_a = 2 * a2 * (a2 - b2), f_b = 2 * b2 * (b2 - a2);  // exact

  static V times(float c, V v) { return S::mul(S::constant(c), v); }
  // v / c without a division, which takes longer than all else of a transform. The inverse is the sum of two floats:
  // one alone would bias all results by the same 2e-8.
  static V over(V v, double c) {
    const float inverse = static_cast<float>(1 / c), rest = static_cast<float>(1 / c - inverse);
    return plus(times(rest, v), inverse, v);
  }
  static V plus(V v, float c, V w) { return S::fma(S::constant(c), w, v); }  // v + c w

  static void input(const V (&d)[6], V (&v)[6]) {
    const V even_a = plus(d[4], -b2, d[2]), odd_a = times(a, plus(d[3], -b2, d[1]));
    const V even_b = plus(d[4], -a2, d[2]), odd_b = times(b, plus(d[3], -a2, d[1]));
    v[0] = plus(plus(d[4], -a2 - b2, d[2]), a2 * b2, d[0]);
    v[1] = S::add(even_a, odd_a), v[2] = S::sub(even_a, odd_a);
    v[3] = S::add(even_b, odd_b), v[4] = S::sub(even_b, odd_b);
    v[5] = plus(plus(d[5], -a2 - b2, d[3]), a2 * b2, d[1]);
  }
  static void weight(const V (&g)[3], V (&u)[6]) {
    const V even_a = over(plus(g[0], a2, g[2]), f_a), odd_a = over(times(a, g[1]), f_a);
    const V even_b = over(plus(g[0], b2, g[2]), f_b), odd_b = over(times(b, g[1]), f_b);
    u[0] = over(g[0], f_0);
    u[1] = S::add(even_a, odd_a), u[2] = S::sub(even_a, odd_a);
    u[3] = S::add(even_b, odd_b), u[4] = S::sub(even_b, odd_b);
    u[5] = g[2];
  }
  static void output(const V (&m)[6], V (&y)[4]) {
    const V even_a = S::add(m[1], m[2]), odd_a = S::sub(m[1], m[2]);
    const V even_b = S::add(m[3], m[4]), odd_b = S::sub(m[3], m[4]);
    y[0] = S::add(m[0], S::add(even_a, even_b));
    y[1] = plus(times(a, odd_a), b, odd_b);
    y[2] = plus(times(a2, even_a), b2, even_b);
    y[3] = plus(plus(m[5], a * a2, odd_a), b * b2, odd_b);
  }
  static void gradient(const V (&y)[4], V (&z)[6]) {
    const V even_a = plus(y[0], a2, y[2]), odd_a = plus(times(a, y[1]), a * a2, y[3]);
    const V even_b = plus(y[0], b2, y[2]), odd_b = plus(times(b, y[1]), b * b2, y[3]);
    z[0] = y[0];
    z[1] = S::add(even_a, odd_a), z[2] = S::sub(even_a, odd_a);
    z[3] = S::add(even_b, odd_b), z[4] = S::sub(even_b, odd_b);
    z[5] = y[3];
  }
  static void weight_grad(const V (&u)[6], V (&g)[3]) {
    const V even_a = over(S::add(u[1], u[2]), f_a), odd_a = over(times(a, S::sub(u[1], u[2])), f_a);
    const V even_b = over(S::add(u[3], u[4]), f_b), odd_b = over(times(b, S::sub(u[3], u[4])), f_b);
    g[0] = S::add(S::add(even_a, even_b), over(u[0], f_0));
    g[1] = S::add(odd_a, odd_b);
    g[2] = plus(plus(u[5], a2, even_a), b2, even_b);
  }
};

// Both axes: a vector of channels of every pixel, tap or place of a tile at a time.
template <class S, class F>
struct Winograd {
  using V = typename S::V;
  static constexpr int m = F::outputs, n = F::inputs;

  // f along the columns of `from`, then along the rows.
  template <auto f, int kFrom, int kTo>
  static inline __attribute__((always_inline)) void both_axes(const V (&from)[kFrom][kFrom], V (&to)[kTo][kTo]) {
    V half[kTo][kFrom];
    GRADAUG_UNROLL
    for (int j = 0; j < kFrom; j++) {
      V column[kFrom], result[kTo];
      GRADAUG_UNROLL
      for (int i = 0; i < kFrom; i++) column[i] = from[i][j];
      f(column, result);
      GRADAUG_UNROLL
      for (int i = 0; i < kTo; i++) half[i][j] = result[i];
    }
    GRADAUG_UNROLL
    for (int i = 0; i < kTo; i++) f(half[i], to[i]);
  }

  static void input_tile(float* dst, int64_t dst_tap, int64_t panel, int64_t dst_panel, const void* const* pixels,
                         Dtype dtype, int64_t channels) {
    const int64_t size = size_of(dtype);
    for (int64_t k = 0; k < channels; k += S::lanes) {
      V d[n][n], v[n][n];
      GRADAUG_UNROLL
      for (int i = 0; i < n * n; i++) {
        d[i / n][i % n] = S::load_floats(static_cast<const char*>(pixels[i]) + k * size, dtype, channels - k);
      }
      both_axes<F::input>(d, v);
      float* to = dst + k / panel * dst_panel + k % panel;
      GRADAUG_UNROLL
      for (int i = 0; i < n * n; i++) S::store(to + i * dst_tap, v[i / n][i % n]);
    }
  }

  static void gradient_tile(float* dst, int64_t dst_tap, const void* const* pixels, Dtype dtype, int64_t channels) {
    const int64_t size = size_of(dtype);
    for (int64_t k = 0; k < channels; k += S::lanes, dst += S::lanes) {
      V y[m][m], z[n][n];
      GRADAUG_UNROLL
      for (int i = 0; i < m * m; i++) {
        y[i / m][i % m] = S::load_floats(static_cast<const char*>(pixels[i]) + k * size, dtype, channels - k);
      }
      both_axes<F::gradient>(y, z);
      GRADAUG_UNROLL
      for (int i = 0; i < n * n; i++) S::store(dst + i * dst_tap, z[i / n][i % n]);
    }
  }

  static void weight(float* dst, int64_t dst_tap, const float* src, int64_t src_tap, int64_t count) {
    for (int64_t k = 0; k < count; k += S::lanes) {
      V g[3][3], u[n][n];
      GRADAUG_UNROLL
      for (int i = 0; i < 9; i++) g[i / 3][i % 3] = S::load(src + k + i * src_tap);
      both_axes<F::weight>(g, u);
      GRADAUG_UNROLL
      for (int i = 0; i < n * n; i++) S::store(dst + k + i * dst_tap, u[i / n][i % n]);
    }
  }

  static void output_tile(void* const* pixels, Dtype dtype, const float* src, int64_t src_tap, const float* bias,
                          int64_t columns) {
    for (int64_t j = 0; j < columns; j += S::lanes) {
      V sums[n][n], y[m][m];
      GRADAUG_UNROLL
      for (int i = 0; i < n * n; i++) sums[i / n][i % n] = S::load(src + j + i * src_tap);
      both_axes<F::output>(sums, y);
      const V shift = bias ? S::load(bias + j) : S::zero();
      GRADAUG_UNROLL
      for (int i = 0; i < m * m; i++) {
        char* to = static_cast<char*>(pixels[i]);
        if (to) S::store_floats(to + j * size_of(dtype), S::add(y[i / m][i % m], shift), dtype, columns - j);
      }
    }
  }

  static void add_weight_grad(float* const taps[9], const float* src, int64_t src_tap, int64_t count) {
    for (int64_t k = 0; k < count; k += S::lanes) {
      V u[n][n], g[3][3];
      GRADAUG_UNROLL
      for (int i = 0; i < n * n; i++) u[i / n][i % n] = S::load(src + k + i * src_tap, count - k);
      both_axes<F::weight_grad>(u, g);
      GRADAUG_UNROLL
      for (int i = 0; i < 9; i++) {
        float* to = taps[i] + k;
        S::store(to, S::add(S::load(to, count - k), g[i / 3][i % 3]), count - k);
      }
    }
  }

  static constexpr WinogradKernels table = {
      .outputs = m,
      .inputs = n,
      .input_tile = input_tile,
      .gradient_tile = gradient_tile,
      .weight = weight,
      .output_tile = output_tile,
      .add_weight_grad = add_weight_grad,
  };
};

}  // namespace
}  // namespace gradaug::cpu

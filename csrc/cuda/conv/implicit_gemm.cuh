// The three products of a convolution as matrix products, of which im2col's matrix is never made:
//
//   forward       y[p, o]          = sum over (tap, c) of x[pixel of p under tap, c] * w[o, tap, c]
//   input grad    dx[q, c]         = sum over (tap, o) of dy[pixel whose tap meets q, o] * w[o, tap, c]
//   weight grad   dw[o, (tap, c)] += sum over p of dy[p, o] * x[pixel of p under tap, c]
//
// with pixel p = (n, oh, ow), tap = (kh, kw), c and o counted inside one group. What tensor_core_sm80.cuh and fma.cuh
// share: the taps that a reduction runs over, the size of the product, and where its rows go.
#pragma once

#include "cuda/conv/problem.cuh"

namespace gradaug::conv {

// The taps that a reduction runs over along one axis, and where tap i displaces a pixel to: base + i * delta.
// Forward: all taps, pixel oh * stride - pad displaced by kh * dilation.
// Input gradient: input pixels ih = phase + stride * j meet exactly the taps with (phase + pad - kh * dilation) a
// multiple of the stride, and then oh = j + (phase + pad - kh * dilation) / stride. One block works on one phase, so
// that a strided convolution multiplies no zeros.
struct AxisTaps {
  int first, step, count, base, delta;
};

__device__ inline AxisTaps all_taps(int kernel, int dilation) { return {0, 1, kernel, 0, dilation}; }

__device__ inline AxisTaps phase_taps(int phase, int step, int kernel, int stride, int pad, int dilation) {
  int first = 0;
  while (first < kernel && (phase + pad - first * dilation) % stride != 0) ++first;
  if (first == kernel) return {0, step, 0, 0, 0};
  return {first, step, (kernel - first - 1) / step + 1, (phase + pad - first * dilation) / stride,
          -(step * dilation / stride)};
}

// Rows, columns and parallel copies of a pass's GEMM.
struct Extent {
  int64_t rows, columns, copies;
};

template <typename T>
Extent extent_of(const Conv<T>& conv, Pass pass) {
  const Shape& s = conv.shape;
  if (pass == Pass::kForward) return {int64_t{s.batch} * s.out_h * s.out_w, s.out_channels, s.groups};
  if (pass == Pass::kInputGrad) {
    return {int64_t{s.batch} * conv.phase_hw.value, s.in_channels, int64_t{s.groups} * s.stride_h * s.stride_w};
  }
  return {s.out_channels, weight_grad_columns(conv), s.groups};
}

// Parts of a group's product that blocks work on apart: phases of the input gradient, splits of the weight gradient.
template <typename T>
int parts_of(const Conv<T>& conv, Pass pass) {
  if (pass == Pass::kInputGrad) return conv.shape.stride_h * conv.shape.stride_w;
  return pass == Pass::kWeightGrad ? conv.splits : 1;
}

// Where the rows of a finished tile go: pixels of y, pixels of dx, or rows of the partial weight gradient.
template <typename T, Pass kPass>
struct Target {
  using Element = std::conditional_t<kPass == Pass::kWeightGrad, Sum<T>, T>;
  const Conv<T>& conv;
  Element* data;
  int rows, columns, phase_h, phase_w;
  bool vector;  // rows are aligned to 16 bytes and columns are contiguous
  int64_t column_stride;

  __device__ Target(const Conv<T>& conv, int group, int part) : conv(conv), phase_h(0), phase_w(0) {
    const Shape& s = conv.shape;
    if constexpr (kPass == Pass::kForward) {
      rows = s.batch * s.out_h * s.out_w;
      columns = s.out_channels;
      data = conv.y.data + static_cast<int64_t>(group) * columns * conv.y.c;
      column_stride = conv.y.c;
      vector = conv.y_alignment == 16 && column_stride == 1;
    } else if constexpr (kPass == Pass::kInputGrad) {
      phase_h = part / s.stride_w;
      phase_w = part % s.stride_w;
      rows = s.batch * static_cast<int>(conv.phase_hw.value);
      columns = s.in_channels;
      data = conv.x.data + static_cast<int64_t>(group) * columns * conv.x.c;
      column_stride = conv.x.c;
      vector = conv.x_alignment == 16 && column_stride == 1;
    } else {
      rows = s.out_channels;
      columns = s.kernel_h * s.kernel_w * static_cast<int>(conv.padded_in.value);
      data = conv.partial + (static_cast<int64_t>(part) * s.groups + group) * rows * columns;
      column_stride = 1;
      vector = columns % 8 == 0;
    }
  }

  __device__ Element* row(int index) const {  // null where there is none
    const Shape& s = conv.shape;
    if (index >= rows) return nullptr;
    if constexpr (kPass == Pass::kForward) {
      const Pixel p = pixel_at(index, conv.out_hw, conv.out_w);
      return data + p.n * conv.y.n + p.h * conv.y.h + p.w * conv.y.w;
    } else if constexpr (kPass == Pass::kInputGrad) {
      const Pixel p = pixel_at(index, conv.phase_hw, conv.phase_w);
      const int h = p.h * s.stride_h + phase_h, w = p.w * s.stride_w + phase_w;
      return inside(h, w, s.in_h, s.in_w) ? data + p.n * conv.x.n + h * conv.x.h + w * conv.x.w : nullptr;
    } else {
      return data + static_cast<int64_t>(index) * columns;
    }
  }
};

}  // namespace gradaug::conv

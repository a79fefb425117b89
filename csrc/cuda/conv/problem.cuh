// One sliced convolution, as every kernel takes it: sizes, strides, and the arithmetic of indices.
//
// Images are in NHWC, the full weight in OHWI, both read in place through their strides.
//   storage     x, y, w, bias in T; partial sums of a weight gradient in Sum<T>; the gradient buffer in any type
//   arithmetic  float32, products of TF32 on tensor cores where torch allows it; float64 for double
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "cuda/launch.cuh"

namespace gradaug::conv {

enum class Pass { kForward, kInputGrad, kWeightGrad };

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float load(const __half* p) { return __half2float(*p); }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ inline float load(const float* p) { return *p; }
__device__ inline double load(const double* p) { return *p; }
__device__ inline void store(__half* p, float v) { *p = __float2half_rn(v); }
__device__ inline void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }
__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(double* p, double v) { *p = v; }

// Division of indices below 2^31 by a divisor known at launch: a multiplication and a shift.
struct Divisor {
  uint32_t value, multiplier, shift;
  __host__ __device__ Divisor(int divisor = 1) : value(divisor), shift(0) {
    while ((uint64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - value)) / value + 1);
  }
  __host__ __device__ int divide(int n) const {
    const uint32_t high = static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
  __host__ __device__ int remainder(int n, int quotient) const { return n - quotient * static_cast<int>(value); }
};

// [N, H, W, C] with strides in elements.
template <typename T>
struct Image {
  T* data;
  int64_t n, h, w, c;
};

// [O, KH, KW, I] of the full width, with strides in elements.
template <typename T>
struct Filter {
  T* data;
  int64_t o, h, w, c;
};

struct Shape {
  int batch, in_h, in_w, out_h, out_w;
  int in_channels, out_channels;  // of one group
  int groups, kernel_h, kernel_w;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int greatest_common_divisor(int a, int b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

// One convolution, as every kernel takes it. x is the input or its gradient, y the output or its gradient.
template <typename T>
struct Conv {
  Shape shape;
  Image<T> x;       // [N, H, W, groups * C]
  Image<T> y;       // [N, OH, OW, groups * O]
  Filter<T> w;      // [>= groups * O, KH, KW, >= C]; unused by the weight gradient
  const T* bias;    // [groups * O] or null; forward
  Sum<T>* partial;  // [splits, groups * O, taps * padded C]; weight gradient
  int splits;
  // Largest copy, of 16, 8, 4 or sizeof(T) bytes, to which all rows of x, y and w are aligned.
  int x_alignment, y_alignment, w_alignment;
  // Channels of one tap rounded up to a 16-byte chunk, so that no chunk of a reduction crosses taps.
  Divisor padded_in, padded_out;
  Divisor kernel_w, in_w, in_hw, out_w, out_hw;
  Divisor phase_w, phase_hw;   // input pixels of one phase of the stride, see AxisTaps
  int tap_step_h, tap_step_w;  // distance of two taps that meet input pixels of the same phase
};

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

// The device, and how torch lets it multiply.
struct Device {
  int architecture;  // its compute capability: 80, 90, 120
  int multiprocessors;
  bool allow_tf32;  // float32 operands may be rounded to TF32
};

inline int64_t tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

// Largest copy, of 16, 8, 4 or sizeof(T) bytes, to which data and everything at these strides from it are aligned.
template <typename T>
int alignment(const T* data, std::initializer_list<int64_t> strides) {
  int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  for (int64_t stride : strides) bits |= stride * static_cast<int64_t>(sizeof(T));
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : static_cast<int>(sizeof(T));
}

// Fills in what follows from shape and strides.
template <typename T>
void prepare(Conv<T>& conv) {
  const Shape& s = conv.shape;
  // Each group's first channel must be as aligned as the rows, but for depthwise_kernel, whose vectors cross groups.
  const bool grouped = s.groups > 1 && (s.in_channels > 1 || s.out_channels > 1);
  const int64_t x_group = grouped ? s.in_channels : 0, y_group = grouped ? s.out_channels : 0;
  conv.x_alignment = alignment(conv.x.data, {conv.x.n, conv.x.h, conv.x.w, x_group});
  conv.y_alignment = alignment(conv.y.data, {conv.y.n, conv.y.h, conv.y.w, y_group});
  conv.w_alignment = alignment(conv.w.data, {conv.w.o, conv.w.h, conv.w.w});
  conv.padded_in = Divisor(round_up(s.in_channels, kChunk<T>));
  conv.padded_out = Divisor(round_up(s.out_channels, kChunk<T>));
  conv.kernel_w = Divisor(s.kernel_w);
  conv.in_w = Divisor(s.in_w);
  conv.in_hw = Divisor(s.in_h * s.in_w);
  conv.out_w = Divisor(s.out_w);
  conv.out_hw = Divisor(s.out_h * s.out_w);
  const int phase_h = (s.in_h + s.stride_h - 1) / s.stride_h, phase_w = (s.in_w + s.stride_w - 1) / s.stride_w;
  conv.phase_w = Divisor(phase_w);
  conv.phase_hw = Divisor(phase_h * phase_w);
  conv.tap_step_h = s.stride_h / greatest_common_divisor(s.stride_h, s.dilation_h);
  conv.tap_step_w = s.stride_w / greatest_common_divisor(s.stride_w, s.dilation_w);
}

template <typename T>
int weight_grad_columns(const Conv<T>& conv) {
  return conv.shape.kernel_h * conv.shape.kernel_w * static_cast<int>(conv.padded_in.value);
}

struct Pixel {
  int n, h, w;
};

__device__ inline Pixel pixel_at(int index, const Divisor& per_image, const Divisor& per_row) {
  const int n = per_image.divide(index), rest = per_image.remainder(index, n), h = per_row.divide(rest);
  return {n, h, per_row.remainder(rest, h)};
}

__device__ inline bool inside(int h, int w, int height, int width) {
  return static_cast<unsigned>(h) < static_cast<unsigned>(height) &&
         static_cast<unsigned>(w) < static_cast<unsigned>(width);
}

// The pixel that tap kh (or kw) joins to pixel `at` along one axis, or -1: input for an output, output for an input.
template <Pass kPass>
__device__ inline int joined(int at, int tap, int stride, int pad, int dilation, int size) {
  const int position = kPass == Pass::kForward ? at * stride - pad + tap * dilation : at + pad - tap * dilation;
  if constexpr (kPass == Pass::kForward) return position >= 0 && position < size ? position : -1;
  if (position < 0 || position % stride != 0) return -1;
  return position / stride < size ? position / stride : -1;
}

}  // namespace gradaug::conv

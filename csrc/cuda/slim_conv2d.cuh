// Sliced convolution on CUDA: images in NHWC, the full weight in OHWI, both read in place through their strides.
//
// Three products, with pixel p = (n, oh, ow), tap = (kh, kw), c and o counted inside one group:
//   forward       y[p, o]          = sum over (tap, c) of x[pixel of p under tap, c] * w[o, tap, c]
//   input grad    dx[q, c]         = sum over (tap, o) of dy[pixel whose tap meets q, o] * w[o, tap, c]
//   weight grad   dw[o, (tap, c)] += sum over p of dy[p, o] * x[pixel of p under tap, c]
//
//   tensor_core_kernel   __half, __nv_bfloat16, float as TF32; channels contiguous in x, dy and w; any group
//   fma_kernel           float, double; any strides; any group
//   direct_kernel, direct_weight_grad_kernel   all types, any strides; for groups of few channels (ResNeXt, depthwise)
//   depthwise_kernel     forward and input gradient where each group has one channel in and one out
//   accumulate_kernel    second step of every weight gradient: partial sums, in order, into the caller's buffer
//
//   storage     x, y, w, bias in T; partial sums of a weight gradient in Sum<T>; the gradient buffer in any type
//   arithmetic  float32, products of TF32 in tensor_core_kernel<float>; float64 for double
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/conv/mma_sm80.cuh"

namespace gradaug::conv {

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
  Divisor phase_w, phase_hw;   // input pixels of one phase of the stride, see Taps
  int tap_step_h, tap_step_w;  // distance of two taps that meet input pixels of the same phase
};

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

// Fills in what follows from shape and strides.
template <typename T>
void prepare(Conv<T>& conv) {
  const Shape& s = conv.shape;
  auto alignment = [](const void* data, std::initializer_list<int64_t> strides) {
    int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
    for (int64_t stride : strides) bits |= stride * static_cast<int64_t>(sizeof(T));
    return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : static_cast<int>(sizeof(T));
  };
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

enum class Pass { kForward, kInputGrad, kWeightGrad };

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

// ---- Taps of one pass

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

// ---- Tensor cores

// A tile's operands lie in shared memory as 64 bytes of the reduction for each row or column of the tile, in one of
// two layouts, both in 16-byte chunks, permuted so that neither copies nor fragment loads meet bank conflicts:
//   rows     [tile][64 bytes of the reduction]     where the reduction is contiguous in memory
//   columns  [reduction][tile]                     where the tile's own index is
constexpr int kStages = 3;

template <typename T>
constexpr int kDepth = 64 / static_cast<int>(sizeof(T));  // length of the reduction in one step

__device__ inline int rows_offset(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

template <typename T, int kTile>
__device__ inline int columns_offset(int k, int chunk) {
  const int permutation = sizeof(T) == 2 ? k & 7 : (k & 3) << 1;
  return k * kTile * static_cast<int>(sizeof(T)) + ((chunk ^ permutation) << 4);
}

// A chunk to copy: the first `valid` elements at data, zeros after them.
template <typename T>
struct Source {
  const T* data;
  int valid;
};

__device__ inline int clamp(int value, int high) { return value < 0 ? 0 : value > high ? high : value; }

struct Registers {
  uint32_t word[4];
};

// Starts the copy of a chunk, or holds it in registers where its rows have no 4-byte alignment for a copy.
template <typename T>
__device__ inline void fetch(unsigned char* shared, const Source<T>& source, int alignment, Registers& held) {
  const int valid = source.valid * static_cast<int>(sizeof(T));
  const char* data = reinterpret_cast<const char*>(source.data);
  if (alignment == 16) {
    copy_async<16>(shared, data, valid);
  } else if (alignment == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int part = clamp(valid - 8 * i, 8);
      copy_async<8>(shared + 8 * i, part > 0 ? data + 8 * i : data, part);
    }
  } else if (sizeof(T) == 4 || alignment == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int part = clamp(valid - 4 * i, 4);
      copy_async<4>(shared + 4 * i, part > 0 ? data + 4 * i : data, part);
    }
  } else {
    const uint16_t* element = reinterpret_cast<const uint16_t*>(source.data);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < source.valid ? element[2 * i] : 0;
      const uint32_t high = 2 * i + 1 < source.valid ? element[2 * i + 1] : 0;
      held.word[i] = low | high << 16;
    }
  }
}

// Fragments of the left operand: kCount tiles of [16, 32 bytes of the reduction], from `first` on.
template <typename T, bool kColumns, int kTile, int kCount>
__device__ inline void load_left(uint32_t (&fragments)[kCount][4], const unsigned char* tile, int first, int half,
                                 int lane) {
  if constexpr (!kColumns || sizeof(T) == 2) {
    const void* rows[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int start = first + 16 * i;
      rows[i] =
          tile + (kColumns ? columns_offset<T, kTile>(16 * half + lane % 8 + lane / 16 * 8, start / 8 + lane / 8 % 2)
                           : rows_offset(start + lane % 16, 2 * half + lane / 16));
    }
    load_matrices<kColumns>(fragments, rows);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first + 16 * i + lane / 4 + 8 * (j % 2), k = 8 * half + lane % 4 + 4 * (j / 2);
        fragments[i][j] =
            *reinterpret_cast<const uint32_t*>(tile + columns_offset<T, kTile>(k, column / 4) + 4 * (column % 4));
      }
    }
  }
}

// Fragments of the right operand: kCount pairs of [32 bytes of the reduction, 8], from `first` on.
template <typename T, bool kColumns, int kTile, int kCount>
__device__ inline void load_right(uint32_t (&fragments)[2 * kCount][2], const unsigned char* tile, int first, int half,
                                  int lane) {
  uint32_t pairs[kCount][4];  // both halves of the reduction for columns 0 to 7, then for 8 to 15
  if constexpr (!kColumns || sizeof(T) == 2) {
    const void* rows[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int start = first + 16 * i;
      rows[i] = tile + (kColumns ? columns_offset<T, kTile>(16 * half + lane % 16, start / 8 + lane / 16)
                                 : rows_offset(start + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
    }
    load_matrices<kColumns>(pairs, rows);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first + 16 * i + lane / 4 + 8 * (j / 2), k = 8 * half + lane % 4 + 4 * (j % 2);
        pairs[i][j] =
            *reinterpret_cast<const uint32_t*>(tile + columns_offset<T, kTile>(k, column / 4) + 4 * (column % 4));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) fragments[2 * i + j / 2][j % 2] = pairs[i][j];
  }
}

template <int kTileM, int kTileN>
struct TileShape {
  static constexpr int kWarpM = kTileM / 2, kWarpN = 32;
  static constexpr int kWarpsN = kTileN / kWarpN;
  static constexpr int kThreads = 2 * kWarpsN * 32;
  static constexpr int kStageBytes = (kTileM + kTileN) * 64;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kCopies = kTileM * 4 / kThreads;  // chunks of each operand that a thread copies in one step
  static_assert(kTileM == kTileN, "a thread's chunks of both operands lie in the same rows");
};

// Blocks that a multiprocessor's registers must hold: 2, but for the one kernel that would spill.
template <typename T, Pass kPass, int kTile>
constexpr int kResidentBlocks = std::is_same_v<T, float> && kPass == Pass::kInputGrad && kTile == 128 ? 1 : 2;

using LargeTile = TileShape<128, 128>;
using SmallTile = TileShape<64, 64>;

// Where one thread's chunks of the two operands come from, for each pass.
template <typename T, Pass kPass, int kTileM, int kTileN>
struct Sources;

// Left: [pixels of the output, (tap, c)] of x. Right: [o, (tap, c)] of w. Both in rows.
template <typename T, int kTileM, int kTileN>
struct Sources<T, Pass::kForward, kTileM, kTileN> {
  static constexpr bool kLeftColumns = false, kRightColumns = false;
  static constexpr int kCopies = TileShape<kTileM, kTileN>::kCopies;
  static constexpr int kRowStep = TileShape<kTileM, kTileN>::kThreads / 4;

  const Conv<T>& conv;
  int depth, k;  // length of the reduction; this thread's first k in a step
  const T* image[kCopies];
  int h[kCopies], w[kCopies];
  const T* filter[kCopies];  // null beyond the last output channel

  __device__ Sources(const Conv<T>& conv, int first_row, int first_column, int group, int) : conv(conv) {
    const Shape& s = conv.shape;
    depth = s.kernel_h * s.kernel_w * static_cast<int>(conv.padded_in.value);
    k = threadIdx.x % 4 * kChunk<T>;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = first_row + static_cast<int>(threadIdx.x) / 4 + i * kRowStep;
      const bool exists = row < s.batch * s.out_h * s.out_w;
      const Pixel p = exists ? pixel_at(row, conv.out_hw, conv.out_w) : Pixel{0, 0, 0};
      image[i] = conv.x.data + static_cast<int64_t>(group) * s.in_channels + p.n * conv.x.n;
      h[i] = exists ? p.h * s.stride_h - s.pad_h : INT32_MIN / 2;  // outside under every tap
      w[i] = p.w * s.stride_w - s.pad_w;
      const int o = first_column + static_cast<int>(threadIdx.x) / 4 + i * kRowStep;
      filter[i] =
          o < s.out_channels ? conv.w.data + (static_cast<int64_t>(group) * s.out_channels + o) * conv.w.o : nullptr;
    }
  }

  __device__ void at(int step, Source<T> (&left)[kCopies], Source<T> (&right)[kCopies]) const {
    const Shape& s = conv.shape;
    const int index = step * kDepth<T> + k;
    const int tap = conv.padded_in.divide(index), c = conv.padded_in.remainder(index, tap);
    const int kh = conv.kernel_w.divide(tap), kw = conv.kernel_w.remainder(tap, kh);
    const int valid = index < depth ? clamp(s.in_channels - c, kChunk<T>) : 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = h[i] + kh * s.dilation_h, column = w[i] + kw * s.dilation_w;
      const bool exists = valid > 0 && inside(row, column, s.in_h, s.in_w);
      left[i] = {exists ? image[i] + row * conv.x.h + column * conv.x.w + c : conv.x.data, exists ? valid : 0};
      const bool has_filter = valid > 0 && filter[i] != nullptr;
      right[i] = {has_filter ? filter[i] + kh * conv.w.h + kw * conv.w.w + c : conv.w.data, has_filter ? valid : 0};
    }
  }
};

// Left: [input pixels of one phase, (tap, o)] of dy, in rows. Right: [(tap, o), c] of w, in columns.
template <typename T, int kTileM, int kTileN>
struct Sources<T, Pass::kInputGrad, kTileM, kTileN> {
  static constexpr bool kLeftColumns = false, kRightColumns = true;
  static constexpr int kCopies = TileShape<kTileM, kTileN>::kCopies, kThreads = TileShape<kTileM, kTileN>::kThreads;
  static constexpr int kRowStep = kThreads / 4;
  static constexpr int kColumnChunks = kTileN / kChunk<T>;

  const Conv<T>& conv;
  AxisTaps taps_h, taps_w;
  Divisor count_w;
  int depth, k, c, valid_c;
  const T* image[kCopies];
  int h[kCopies], w[kCopies];
  const T* filter;

  __device__ Sources(const Conv<T>& conv, int first_row, int first_column, int group, int phase) : conv(conv) {
    const Shape& s = conv.shape;
    const int phase_h = phase / s.stride_w, phase_w = phase % s.stride_w;
    taps_h = phase_taps(phase_h, conv.tap_step_h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
    taps_w = phase_taps(phase_w, conv.tap_step_w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
    count_w = Divisor(taps_w.count > 0 ? taps_w.count : 1);
    depth = taps_h.count * taps_w.count * static_cast<int>(conv.padded_out.value);
    k = threadIdx.x % 4 * kChunk<T>;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = first_row + static_cast<int>(threadIdx.x) / 4 + i * kRowStep;
      const bool exists = row < s.batch * static_cast<int>(conv.phase_hw.value);
      const Pixel p = exists ? pixel_at(row, conv.phase_hw, conv.phase_w) : Pixel{0, 0, 0};
      image[i] = conv.y.data + static_cast<int64_t>(group) * s.out_channels + p.n * conv.y.n;
      h[i] = exists ? p.h : INT32_MIN / 2;
      w[i] = p.w;
    }
    c = first_column + static_cast<int>(threadIdx.x) % kColumnChunks * kChunk<T>;
    valid_c = clamp(s.in_channels - c, kChunk<T>);
    filter = conv.w.data + static_cast<int64_t>(group) * s.out_channels * conv.w.o + c;
  }

  __device__ void at(int step, Source<T> (&left)[kCopies], Source<T> (&right)[kCopies]) const {
    const Shape& s = conv.shape;
    {
      const int index = step * kDepth<T> + k;
      const int tap = conv.padded_out.divide(index), o = conv.padded_out.remainder(index, tap);
      const int tap_h = count_w.divide(tap), tap_w = count_w.remainder(tap, tap_h);
      const int valid = index < depth ? clamp(s.out_channels - o, kChunk<T>) : 0;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int row = h[i] + taps_h.base + tap_h * taps_h.delta, column = w[i] + taps_w.base + tap_w * taps_w.delta;
        const bool exists = valid > 0 && inside(row, column, s.out_h, s.out_w);
        left[i] = {exists ? image[i] + row * conv.y.h + column * conv.y.w + o : conv.y.data, exists ? valid : 0};
      }
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index =
          step * kDepth<T> + static_cast<int>(threadIdx.x) / kColumnChunks + i * (kThreads / kColumnChunks);
      const int tap = conv.padded_out.divide(index), o = conv.padded_out.remainder(index, tap);
      const int tap_h = count_w.divide(tap), tap_w = count_w.remainder(tap, tap_h);
      const bool exists = valid_c > 0 && index < depth && o < s.out_channels;
      const int64_t offset = o * conv.w.o + (taps_h.first + tap_h * taps_h.step) * conv.w.h +
                             (taps_w.first + tap_w * taps_w.step) * conv.w.w;
      right[i] = {exists ? filter + offset : conv.w.data, exists ? valid_c : 0};
    }
  }
};

// Left: [pixels of the output, o] of dy. Right: [pixels of the output, (tap, c)] of x. Both in columns.
template <typename T, int kTileM, int kTileN>
struct Sources<T, Pass::kWeightGrad, kTileM, kTileN> {
  static constexpr bool kLeftColumns = true, kRightColumns = true;
  static constexpr int kCopies = TileShape<kTileM, kTileN>::kCopies, kThreads = TileShape<kTileM, kTileN>::kThreads;
  static constexpr int kColumnChunks = kTileM / kChunk<T>;

  const Conv<T>& conv;
  int depth, valid_o, valid_c, displace_h, displace_w;
  const T *left_data, *right_data;

  __device__ Sources(const Conv<T>& conv, int first_row, int first_column, int group, int) : conv(conv) {
    const Shape& s = conv.shape;
    depth = s.batch * s.out_h * s.out_w;
    const int chunk = static_cast<int>(threadIdx.x) % kColumnChunks * kChunk<T>;
    const int o = first_row + chunk;
    valid_o = clamp(s.out_channels - o, kChunk<T>);
    left_data = conv.y.data + static_cast<int64_t>(group) * s.out_channels + o;
    const int column = first_column + chunk;
    const int tap = conv.padded_in.divide(column), c = conv.padded_in.remainder(column, tap);
    const int kh = conv.kernel_w.divide(tap), kw = conv.kernel_w.remainder(tap, kh);
    valid_c = kh < s.kernel_h ? clamp(s.in_channels - c, kChunk<T>) : 0;
    displace_h = kh * s.dilation_h - s.pad_h;
    displace_w = kw * s.dilation_w - s.pad_w;
    right_data = conv.x.data + static_cast<int64_t>(group) * s.in_channels + c;
  }

  __device__ void at(int step, Source<T> (&left)[kCopies], Source<T> (&right)[kCopies]) const {
    const Shape& s = conv.shape;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index =
          step * kDepth<T> + static_cast<int>(threadIdx.x) / kColumnChunks + i * (kThreads / kColumnChunks);
      const bool exists = index < depth;
      const Pixel p = exists ? pixel_at(index, conv.out_hw, conv.out_w) : Pixel{0, 0, 0};
      const bool has_left = exists && valid_o > 0;
      left[i] = {has_left ? left_data + p.n * conv.y.n + p.h * conv.y.h + p.w * conv.y.w : conv.y.data,
                 has_left ? valid_o : 0};
      const int row = p.h * s.stride_h + displace_h, column = p.w * s.stride_w + displace_w;
      const bool has_right = exists && valid_c > 0 && inside(row, column, s.in_h, s.in_w);
      right[i] = {has_right ? right_data + p.n * conv.x.n + row * conv.x.h + column * conv.x.w : conv.x.data,
                  has_right ? valid_c : 0};
    }
  }
};

// 8 neighbouring elements, 16-byte aligned.
template <typename T>
__device__ inline void store8(T* target, const float (&v)[8]) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float4*>(target) = make_float4(v[0], v[1], v[2], v[3]);
    *reinterpret_cast<float4*>(target + 4) = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    struct alignas(16) {
      T element[8];
    } packed;
#pragma unroll
    for (int i = 0; i < 8; ++i) store(&packed.element[i], v[i]);
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(&packed);
  }
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

// Implicit GEMM on tensor cores; one block computes one [kTileM, kTileN] tile of one group (and one phase of the input
// gradient, or one split of the weight gradient's pixels).
//   reads   64 bytes of the reduction of its rows and columns at a time, copied asynchronously into a ring of kStages
//           buffers in shared memory, zeros where a tap leaves the image or channels end
//   keeps   the tile's sums in float32 registers: each warp a [kTileM / 2, 32] part
//   writes  the tile once, through shared memory in 16-byte stores where the rows allow it
template <typename T, Pass kPass, int kTileM, int kTileN>
__global__ void __launch_bounds__(TileShape<kTileM, kTileN>::kThreads, kResidentBlocks<T, kPass, kTileM>)
    tensor_core_kernel(const __grid_constant__ Conv<T> conv, const Divisor column_tiles, const Divisor parts) {
  using Tile = TileShape<kTileM, kTileN>;
  using Operands = Sources<T, kPass, kTileM, kTileN>;
  constexpr int kM = Tile::kWarpM / 16, kN = Tile::kWarpN / 8;
  GRADAUG_DYNAMIC_SHARED(shared);

  const int row_tile = column_tiles.divide(blockIdx.x), column_tile = column_tiles.remainder(blockIdx.x, row_tile);
  const int group = parts.divide(blockIdx.z), part = parts.remainder(blockIdx.z, group);
  const int first_row = row_tile * kTileM, first_column = column_tile * kTileN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / Tile::kWarpsN * Tile::kWarpM, warp_column = warp % Tile::kWarpsN * Tile::kWarpN;

  const Operands operands(conv, first_row, first_column, group, part);
  const int all_steps = (operands.depth + kDepth<T> - 1) / kDepth<T>;
  int begin = 0, end = all_steps;
  if constexpr (kPass == Pass::kWeightGrad) {
    const int per_split = (all_steps + conv.splits - 1) / conv.splits;
    begin = part * per_split;
    end = begin + per_split < all_steps ? begin + per_split : all_steps;
  }

  // This thread's chunks of a step lie at fixed offsets; the permutation of chunks repeats from one to the next.
  constexpr int kLeftChunks = Operands::kLeftColumns ? kTileM / kChunk<T> : 4;
  constexpr int kRightChunks = Operands::kRightColumns ? kTileN / kChunk<T> : 4;
  const int left_row = threadIdx.x / kLeftChunks, left_chunk = threadIdx.x % kLeftChunks;
  const int right_row = threadIdx.x / kRightChunks, right_chunk = threadIdx.x % kRightChunks;
  const int left_offset =
      Operands::kLeftColumns ? columns_offset<T, kTileM>(left_row, left_chunk) : rows_offset(left_row, left_chunk);
  const int right_offset = kTileM * 64 + (Operands::kRightColumns ? columns_offset<T, kTileN>(right_row, right_chunk)
                                                                  : rows_offset(right_row, right_chunk));
  constexpr int kOffsetStep = Tile::kThreads * 16;
  const int left_alignment = kPass == Pass::kForward ? conv.x_alignment : conv.y_alignment;
  const int right_alignment = kPass == Pass::kWeightGrad ? conv.x_alignment : conv.w_alignment;
  const bool left_held = sizeof(T) == 2 && left_alignment < 4, right_held = sizeof(T) == 2 && right_alignment < 4;

  Registers held_left[Tile::kCopies], held_right[Tile::kCopies];
  auto start = [&](int step) {
    if (step < end) {
      unsigned char* stage = shared + (step - begin) % kStages * Tile::kStageBytes;
      Source<T> left[Tile::kCopies], right[Tile::kCopies];
      operands.at(step, left, right);
#pragma unroll
      for (int i = 0; i < Tile::kCopies; ++i) {
        fetch(stage + left_offset + i * kOffsetStep, left[i], left_alignment, held_left[i]);
        fetch(stage + right_offset + i * kOffsetStep, right[i], right_alignment, held_right[i]);
      }
    }
    copy_async_commit();
  };
  auto finish = [&](int step) {
    if (step >= end) return;
    unsigned char* stage = shared + (step - begin) % kStages * Tile::kStageBytes;
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      if (left_held) *reinterpret_cast<Registers*>(stage + left_offset + i * kOffsetStep) = held_left[i];
      if (right_held) *reinterpret_cast<Registers*>(stage + right_offset + i * kOffsetStep) = held_right[i];
    }
  };

  float sums[kM][kN][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    start(begin + step);
    finish(begin + step);
  }
  for (int step = begin; step < end; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // all of this step's chunks have arrived, and nobody reads the buffer that is filled next
    start(step + kStages - 1);
    const unsigned char* stage = shared + (step - begin) % kStages * Tile::kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t left[kM][4], right[kN][2];
      load_left<T, Operands::kLeftColumns, kTileM>(left, stage, warp_row, half, lane);
      load_right<T, Operands::kRightColumns, kTileN, kN / 2>(right, stage + kTileM * 64, warp_column, half, lane);
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < kM * 4; ++i) left[i / 4][i % 4] = round_to_tf32(left[i / 4][i % 4]);
#pragma unroll
        for (int i = 0; i < kN * 2; ++i) right[i / 2][i % 2] = round_to_tf32(right[i / 2][i % 2]);
      }
      multiply_accumulate<T>(sums, left, right);
    }
    finish(step + kStages - 1);
  }
  copy_async_wait<0>();
  __syncthreads();  // the ring is free for the results

  // Each warp turns 16 rows of 32 columns at a time from fragments into rows.
  const Target<T, kPass> target(conv, group, part);
  constexpr int kPitch = Tile::kWarpN + 4;
  float* rows = reinterpret_cast<float*>(shared) + warp * 16 * kPitch;  // [16, kPitch]
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int column = 8 * j + lane % 4 * 2;
      *reinterpret_cast<float2*>(rows + lane / 4 * kPitch + column) = make_float2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<float2*>(rows + (lane / 4 + 8) * kPitch + column) = make_float2(sums[i][j][2], sums[i][j][3]);
    }
    __syncwarp();
    const int tile_row = first_row + warp_row + 16 * i, tile_column = first_column + warp_column;
    auto bias = [&](int column) {
      const bool has_bias = kPass == Pass::kForward && conv.bias != nullptr && column < target.columns;
      return has_bias ? load(conv.bias + static_cast<int64_t>(group) * target.columns + column) : 0.0f;
    };
    if (target.vector) {
      const int column = lane % 4 * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = lane / 4 + 8 * half;
        auto* row = target.row(tile_row + r);
        if (row == nullptr || tile_column + column >= target.columns) continue;
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = rows[r * kPitch + column + e] + bias(tile_column + column + e);
        if (tile_column + column + 8 <= target.columns) {
          store8(row + tile_column + column, v);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (tile_column + column + e < target.columns) store(row + tile_column + column + e, v[e]);
          }
        }
      }
    } else {
      const int column = tile_column + lane;
      const float shift = bias(column);
      for (int r = 0; r < 16; ++r) {
        auto* row = target.row(tile_row + r);
        if (row == nullptr || column >= target.columns) continue;
        store(row + column * target.column_stride, rows[r * kPitch + lane] + shift);
      }
    }
    __syncwarp();
  }
}

// ---- Fused multiply-add

constexpr int kFmaTile = 64, kFmaDepth = 16, kFmaThreads = 256;

// Implicit GEMM in plain arithmetic, for float32 without TF32 and for float64; one block computes one [64, 64] tile.
//   reads   [64, 16] elements of both operands at a time, through any strides, zeros where there are none
//   keeps   them in shared memory, and 4 x 4 sums in each thread's registers
//   writes  each sum once
template <typename T, Pass kPass>
__global__ void __launch_bounds__(kFmaThreads)
    fma_kernel(const __grid_constant__ Conv<T> conv, const Divisor column_tiles, const Divisor parts) {
  __shared__ T left[kFmaDepth][kFmaTile + 4];   // [k, rows]
  __shared__ T right[kFmaDepth][kFmaTile + 4];  // [k, columns]

  const Shape& s = conv.shape;
  const int row_tile = column_tiles.divide(blockIdx.x), column_tile = column_tiles.remainder(blockIdx.x, row_tile);
  const int group = parts.divide(blockIdx.z), part = parts.remainder(blockIdx.z, group);
  const int first_row = row_tile * kFmaTile, first_column = column_tile * kFmaTile;
  const T* x = conv.x.data + static_cast<int64_t>(group) * s.in_channels * conv.x.c;
  const T* y = conv.y.data + static_cast<int64_t>(group) * s.out_channels * conv.y.c;
  const T* weight = conv.w.data + static_cast<int64_t>(group) * s.out_channels * conv.w.o;
  const int padded_in = conv.padded_in.value;
  const int columns = kPass == Pass::kForward     ? s.out_channels
                      : kPass == Pass::kInputGrad ? s.in_channels
                                                  : s.kernel_h * s.kernel_w * padded_in;

  AxisTaps taps_h = all_taps(s.kernel_h, s.dilation_h), taps_w = all_taps(s.kernel_w, s.dilation_w);
  int rows = s.out_channels, depth = s.batch * s.out_h * s.out_w;
  if constexpr (kPass == Pass::kForward) {
    rows = depth;
    depth = s.kernel_h * s.kernel_w * s.in_channels;
  } else if constexpr (kPass == Pass::kInputGrad) {
    rows = s.batch * static_cast<int>(conv.phase_hw.value);
    taps_h = phase_taps(part / s.stride_w, conv.tap_step_h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
    taps_w = phase_taps(part % s.stride_w, conv.tap_step_w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
    depth = taps_h.count * taps_w.count * s.out_channels;
  }
  const Divisor reduced_channels(kPass == Pass::kForward ? s.in_channels : s.out_channels);
  const Divisor count_w(taps_w.count > 0 ? taps_w.count : 1);

  // Element (row, k) of the left operand and (k, column) of the right one.
  auto left_at = [&](int row, int k) -> T {
    if (row >= rows || k >= depth) return T(0);
    if constexpr (kPass == Pass::kWeightGrad) {
      const Pixel p = pixel_at(k, conv.out_hw, conv.out_w);
      return y[p.n * conv.y.n + p.h * conv.y.h + p.w * conv.y.w + row * conv.y.c];
    } else {
      const int tap = reduced_channels.divide(k), channel = reduced_channels.remainder(k, tap);
      const int tap_h = count_w.divide(tap), tap_w = count_w.remainder(tap, tap_h);
      const int displace_h = taps_h.base + tap_h * taps_h.delta, displace_w = taps_w.base + tap_w * taps_w.delta;
      if constexpr (kPass == Pass::kForward) {
        const Pixel p = pixel_at(row, conv.out_hw, conv.out_w);
        const int h = p.h * s.stride_h - s.pad_h + displace_h, w = p.w * s.stride_w - s.pad_w + displace_w;
        return inside(h, w, s.in_h, s.in_w) ? x[p.n * conv.x.n + h * conv.x.h + w * conv.x.w + channel * conv.x.c]
                                            : T(0);
      } else {
        const Pixel p = pixel_at(row, conv.phase_hw, conv.phase_w);
        const int h = p.h + displace_h, w = p.w + displace_w;
        return inside(h, w, s.out_h, s.out_w) ? y[p.n * conv.y.n + h * conv.y.h + w * conv.y.w + channel * conv.y.c]
                                              : T(0);
      }
    }
  };
  auto right_at = [&](int k, int column) -> T {
    if (column >= columns || k >= depth) return T(0);
    if constexpr (kPass == Pass::kWeightGrad) {
      const int tap = conv.padded_in.divide(column), c = conv.padded_in.remainder(column, tap);
      const int kh = conv.kernel_w.divide(tap), kw = conv.kernel_w.remainder(tap, kh);
      const Pixel p = pixel_at(k, conv.out_hw, conv.out_w);
      const int h = p.h * s.stride_h - s.pad_h + kh * s.dilation_h, w = p.w * s.stride_w - s.pad_w + kw * s.dilation_w;
      return c < s.in_channels && inside(h, w, s.in_h, s.in_w)
                 ? x[p.n * conv.x.n + h * conv.x.h + w * conv.x.w + c * conv.x.c]
                 : T(0);
    } else {
      const int tap = reduced_channels.divide(k), channel = reduced_channels.remainder(k, tap);
      const int tap_h = count_w.divide(tap), tap_w = count_w.remainder(tap, tap_h);
      const int o = kPass == Pass::kForward ? column : channel, c = kPass == Pass::kForward ? channel : column;
      return weight[o * conv.w.o + (taps_h.first + tap_h * taps_h.step) * conv.w.h +
                    (taps_w.first + tap_w * taps_w.step) * conv.w.w + c * conv.w.c];
    }
  };

  int begin = 0, end = (depth + kFmaDepth - 1) / kFmaDepth;
  if constexpr (kPass == Pass::kWeightGrad) {
    const int per_split = (end + conv.splits - 1) / conv.splits;
    begin = part * per_split;
    end = begin + per_split < end ? begin + per_split : end;
  }
  const int thread = threadIdx.x, thread_row = thread / 16, thread_column = thread % 16;
  T sums[4][4] = {};
  for (int step = begin; step < end; ++step) {
#pragma unroll
    for (int i = thread; i < kFmaTile * kFmaDepth; i += kFmaThreads) {
      // Neighbouring threads read neighbouring channels.
      const int left_k = kPass == Pass::kWeightGrad ? i / kFmaTile : i % kFmaDepth;
      const int row = kPass == Pass::kWeightGrad ? i % kFmaTile : i / kFmaDepth;
      left[left_k][row] = left_at(first_row + row, step * kFmaDepth + left_k);
      const int right_k = kPass == Pass::kForward ? i % kFmaDepth : i / kFmaTile;
      const int column = kPass == Pass::kForward ? i / kFmaDepth : i % kFmaTile;
      right[right_k][column] = right_at(step * kFmaDepth + right_k, first_column + column);
    }
    __syncthreads();
    T step_sums[4][4] = {};  // one long sum would lose more bits than PyTorch's blocked ones
#pragma unroll
    for (int k = 0; k < kFmaDepth; ++k) {
      T a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = left[k][thread_row + 16 * i];
        b[i] = right[k][thread_column + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) step_sums[i][j] += a[i] * b[j];
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] += step_sums[i / 4][i % 4];
    __syncthreads();
  }

  const Target<T, kPass> target(conv, group, part);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    auto* row = target.row(first_row + thread_row + 16 * i);
    if (row == nullptr) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first_column + thread_column + 16 * j;
      if (column >= columns) continue;
      T sum = sums[i][j];
      if (kPass == Pass::kForward && conv.bias != nullptr) sum += conv.bias[group * columns + column];
      row[column * target.column_stride] = sum;
    }
  }
}

// ---- Groups of few channels

constexpr int kDirectChannels = 32, kDirectPixels = 8, kDirectTaps = 9;

// The pixel that tap kh (or kw) joins to pixel `at` along one axis, or -1: input for an output, output for an input.
template <Pass kPass>
__device__ inline int joined(int at, int tap, int stride, int pad, int dilation, int size) {
  const int position = kPass == Pass::kForward ? at * stride - pad + tap * dilation : at + pad - tap * dilation;
  if constexpr (kPass == Pass::kForward) return position >= 0 && position < size ? position : -1;
  if (position < 0 || position % stride != 0) return -1;
  return position / stride < size ? position / stride : -1;
}

// Forward, or input gradient, of small groups; one thread computes one element.
//   reads   the group's channels of every pixel joined to its own, and their weights, both through the caches
//   keeps   one sum; neighbouring threads have neighbouring channels, so that loads and stores are contiguous
//   writes  one element
template <typename T, Pass kPass>
__global__ void __launch_bounds__(kDirectChannels* kDirectPixels, 4)
    direct_kernel(const __grid_constant__ Conv<T> conv) {
  const Shape& s = conv.shape;
  constexpr bool kForward = kPass == Pass::kForward;
  const int out_group = kForward ? s.out_channels : s.in_channels, in_group = kForward ? s.in_channels : s.out_channels;
  const int channel = blockIdx.y * kDirectChannels + threadIdx.x;
  const int pixel = blockIdx.x * kDirectPixels + threadIdx.y;
  const Divisor &per_image = kForward ? conv.out_hw : conv.in_hw, &per_row = kForward ? conv.out_w : conv.in_w;
  if (channel >= s.groups * out_group || pixel >= s.batch * static_cast<int>(per_image.value)) return;
  const int group = channel / out_group, own = channel % out_group;
  const auto [n, h, w] = pixel_at(pixel, per_image, per_row);
  const Image<T>& source = kForward ? conv.x : conv.y;
  const T* image = source.data + n * source.n + static_cast<int64_t>(group) * in_group * source.c;
  const T* weight =
      conv.w.data + static_cast<int64_t>(group) * s.out_channels * conv.w.o + own * (kForward ? conv.w.o : conv.w.c);
  const int64_t weight_step = kForward ? conv.w.c : conv.w.o;

  Sum<T> sum = 0;
  for (int kh = 0; kh < s.kernel_h; ++kh) {
    const int row = joined<kPass>(h, kh, s.stride_h, s.pad_h, s.dilation_h, kForward ? s.in_h : s.out_h);
    if (row < 0) continue;
    for (int kw = 0; kw < s.kernel_w; ++kw) {
      const int column = joined<kPass>(w, kw, s.stride_w, s.pad_w, s.dilation_w, kForward ? s.in_w : s.out_w);
      if (column < 0) continue;
      const T* pixel_channels = image + row * source.h + column * source.w;
      const T* tap = weight + kh * conv.w.h + kw * conv.w.w;
      Sum<T> tap_sum = 0;  // one long sum would lose more bits
      for (int c = 0; c < in_group; ++c) tap_sum += load(pixel_channels + c * source.c) * load(tap + c * weight_step);
      sum += tap_sum;
    }
  }
  if (kForward && conv.bias != nullptr) sum += load(conv.bias + channel);
  const Image<T>& target = kForward ? conv.y : conv.x;
  store(target.data + n * target.n + h * target.h + w * target.w + channel * target.c, sum);
}

// Weight gradient of small groups; one block sums one input channel and up to 9 taps of 32 output channels over its
// split of the pixels.
//   reads   dy and, under each tap, x; neighbouring threads have neighbouring output channels
//   keeps   9 sums in each thread, of every 8th pixel; then the 8 partial sums of a channel in shared memory
//   writes  its sums into partial [splits, groups * O, taps * padded C], in a fixed order
template <typename T>
__global__ void __launch_bounds__(kDirectChannels* kDirectPixels)
    direct_weight_grad_kernel(const __grid_constant__ Conv<T> conv, const Divisor tap_tiles) {
  __shared__ Sum<T> shared[kDirectPixels][kDirectTaps][kDirectChannels];
  const Shape& s = conv.shape;
  const int taps = s.kernel_h * s.kernel_w;
  const int c = tap_tiles.divide(blockIdx.y), first_tap = tap_tiles.remainder(blockIdx.y, c) * kDirectTaps;
  const int channel = blockIdx.x * kDirectChannels + threadIdx.x;  // output channel, all groups counted
  const int channels = s.groups * s.out_channels;
  const int pixels = s.batch * s.out_h * s.out_w, split = blockIdx.z;
  const int per_split = (pixels + conv.splits - 1) / conv.splits;
  const int64_t split_end = (static_cast<int64_t>(split) + 1) * per_split;
  const int end = split_end < pixels ? static_cast<int>(split_end) : pixels;

  Sum<T> sums[kDirectTaps] = {};
  if (channel < channels) {
    const T* x = conv.x.data + (static_cast<int64_t>(channel / s.out_channels) * s.in_channels + c) * conv.x.c;
    int displace_h[kDirectTaps], displace_w[kDirectTaps];
#pragma unroll
    for (int i = 0; i < kDirectTaps; ++i) {
      const int kh = conv.kernel_w.divide(first_tap + i), kw = conv.kernel_w.remainder(first_tap + i, kh);
      displace_h[i] = first_tap + i < taps ? kh * s.dilation_h - s.pad_h : INT32_MIN / 2;
      displace_w[i] = kw * s.dilation_w - s.pad_w;
    }
    for (int64_t index = static_cast<int64_t>(split) * per_split + threadIdx.y; index < end; index += kDirectPixels) {
      const Pixel p = pixel_at(static_cast<int>(index), conv.out_hw, conv.out_w);
      const Sum<T> dy = load(conv.y.data + p.n * conv.y.n + p.h * conv.y.h + p.w * conv.y.w + channel * conv.y.c);
#pragma unroll
      for (int i = 0; i < kDirectTaps; ++i) {
        const int h = p.h * s.stride_h + displace_h[i], w = p.w * s.stride_w + displace_w[i];
        if (inside(h, w, s.in_h, s.in_w)) sums[i] += dy * load(x + p.n * conv.x.n + h * conv.x.h + w * conv.x.w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kDirectTaps; ++i) shared[threadIdx.y][i][threadIdx.x] = sums[i];
  __syncthreads();
  const int padded_in = conv.padded_in.value;
  for (int i = threadIdx.y; i < kDirectTaps; i += kDirectPixels) {
    if (channel >= channels || first_tap + i >= taps) continue;
    Sum<T> sum = 0;
#pragma unroll
    for (int row = 0; row < kDirectPixels; ++row) sum += shared[row][i][threadIdx.x];
    conv.partial[((static_cast<int64_t>(split) * channels + channel) * taps + first_tap + i) * padded_in + c] = sum;
  }
}

constexpr int kDepthwiseThreads = 128;

template <typename T, int kVector>
constexpr int kDepthwiseLanes = kVector > 1 ? 8 : 32;  // threads along channels

// kVector neighbouring elements; aligned to their size.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T element[kVector];
};

// Forward, or input gradient, where every group has one channel in and one out. One thread computes kVector channels
// of one pixel after another; kVector is 16 bytes' worth where the rows are aligned, otherwise 1.
//   reads   the weights of its block's channels once, into shared memory [taps, channels]; then of every joined pixel
//           kVector channels, in one load
//   keeps   kVector sums
//   writes  kVector channels, in one store
template <typename T, Pass kPass, int kVector>
__global__ void __launch_bounds__(kDepthwiseThreads, 8) depthwise_kernel(const __grid_constant__ Conv<T> conv) {
  GRADAUG_DYNAMIC_SHARED(bytes);
  Sum<T>* weights = reinterpret_cast<Sum<T>*>(bytes);  // [taps, kLanes * kVector]
  constexpr bool kForward = kPass == Pass::kForward;
  constexpr int kLanes = kDepthwiseLanes<T, kVector>, kChannels = kLanes * kVector;
  using Block = Vector<T, kVector>;

  const Shape& s = conv.shape;
  const int channels = s.groups, taps = s.kernel_h * s.kernel_w;
  const int first_channel = blockIdx.y * kChannels;
  for (int i = threadIdx.x; i < taps * kChannels; i += kDepthwiseThreads) {
    const int tap = i / kChannels, channel = first_channel + i % kChannels;
    const int kh = conv.kernel_w.divide(tap), kw = conv.kernel_w.remainder(tap, kh);
    weights[i] = channel < channels ? load(conv.w.data + channel * conv.w.o + kh * conv.w.h + kw * conv.w.w) : 0;
  }
  __syncthreads();

  const int local = threadIdx.x % kLanes * kVector, channel = first_channel + local;
  if (channel >= channels) return;
  const Image<T>& source = kForward ? conv.x : conv.y;
  const Image<T>& target = kForward ? conv.y : conv.x;
  const Divisor &per_image = kForward ? conv.out_hw : conv.in_hw, &per_row = kForward ? conv.out_w : conv.in_w;
  const unsigned pixels = s.batch * per_image.value;
  constexpr unsigned kPixels = kDepthwiseThreads / kLanes;
  for (unsigned pixel = blockIdx.x * kPixels + threadIdx.x / kLanes; pixel < pixels; pixel += gridDim.x * kPixels) {
    const auto [n, h, w] = pixel_at(pixel, per_image, per_row);
    const T* image = source.data + n * source.n + channel * source.c;
    Sum<T> sums[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      sums[e] = kForward && conv.bias != nullptr && channel + e < channels ? load(conv.bias + channel + e) : 0;
    }
    for (int kh = 0; kh < s.kernel_h; ++kh) {
      const int row = joined<kPass>(h, kh, s.stride_h, s.pad_h, s.dilation_h, kForward ? s.in_h : s.out_h);
      if (row < 0) continue;
      for (int kw = 0; kw < s.kernel_w; ++kw) {
        const int column = joined<kPass>(w, kw, s.stride_w, s.pad_w, s.dilation_w, kForward ? s.in_w : s.out_w);
        if (column < 0) continue;
        const T* data = image + row * source.h + column * source.w;
        const Sum<T>* weight = weights + (kh * s.kernel_w + kw) * kChannels + local;
        if (channel + kVector <= channels) {
          const Block block = *reinterpret_cast<const Block*>(data);
#pragma unroll
          for (int e = 0; e < kVector; ++e) sums[e] += load(&block.element[e]) * weight[e];
        } else {
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            if (channel + e < channels) sums[e] += load(data + e) * weight[e];
          }
        }
      }
    }
    T* out = target.data + n * target.n + h * target.h + w * target.w + channel * target.c;
    if (channel + kVector <= channels) {
      Block block;
#pragma unroll
      for (int e = 0; e < kVector; ++e) store(&block.element[e], sums[e]);
      *reinterpret_cast<Block*>(out) = block;
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (channel + e < channels) store(out + e, sums[e]);
      }
    }
  }
}

// ---- Second step of the weight gradient

constexpr int kAccumulateThreads = 256;

// One thread adds one element of the slice: the partial sums of all splits, in their order, to the gradient.
//   reads   partial [splits, O, taps * padded C]; writes  dweight[o, kh, kw, c] through its strides, in its own type
template <typename S, typename D>
__global__ void __launch_bounds__(kAccumulateThreads)
    accumulate_kernel(const S* partial, int splits, int elements, int in_channels, const Divisor columns,
                      const Divisor padded_in, const Divisor kernel_w, const Filter<D> dweight) {
  const int index = blockIdx.x * kAccumulateThreads + threadIdx.x;
  if (index >= elements) return;
  const int o = columns.divide(index), column = columns.remainder(index, o);
  const int tap = padded_in.divide(column), c = padded_in.remainder(column, tap);
  if (c >= in_channels) return;
  S sum = 0;
  for (int split = 0; split < splits; ++split) sum += partial[int64_t{split} * elements + index];
  const int kh = kernel_w.divide(tap), kw = kernel_w.remainder(tap, kh);
  D* target = dweight.data + o * dweight.o + kh * dweight.h + kw * dweight.w + c * dweight.c;
  store(target, load(target) + sum);
}

// ---- Launches. The caller sees to the device, the stream's and the buffers' life, and asks for launch errors.

enum class Path { kTensorCores, kFma, kDirect };

// Which kernel serves a shape. Tensor cores want contiguous channels in x, y and w: see needs_nhwc.
template <typename T>
Path choose_path(const Shape& s, bool allow_tf32) {
  if (s.groups > 1 && (s.in_channels < 16 || s.out_channels < 16)) return Path::kDirect;
  if (std::is_same_v<T, double> || (std::is_same_v<T, float> && !allow_tf32)) return Path::kFma;
  return Path::kTensorCores;
}

inline bool needs_nhwc(Path path) { return path == Path::kTensorCores; }

inline int64_t tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

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

// The large tile where it still gives every multiprocessor a block and its columns are not mostly padding.
inline bool use_large_tile(const Extent& e, int splits, int multiprocessors) {
  return e.columns > 64 && e.rows > 64 &&
         tiles(e.rows, 128) * tiles(e.columns, 128) * e.copies * splits >= multiprocessors;
}

template <typename T, Pass kPass, typename Tile, int kTile>
void launch_tensor_core_tile(const Conv<T>& conv, const Extent& e, int parts, cudaStream_t stream) {
  const int64_t row_tiles = tiles(e.rows, kTile), column_tiles = tiles(e.columns, kTile);
  const dim3 grid(static_cast<unsigned>(row_tiles * column_tiles), 1, conv.shape.groups * parts);
  auto* kernel = tensor_core_kernel<T, kPass, kTile, kTile>;
  GRADAUG_LAUNCH(kernel, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, conv,
                 Divisor(static_cast<int>(column_tiles)), Divisor(parts));
}

template <typename T, Pass kPass>
void launch_gemm(const Conv<T>& conv, Path path, int multiprocessors, cudaStream_t stream) {
  const Shape& s = conv.shape;
  const Extent e = extent_of(conv, kPass);
  const int parts = kPass == Pass::kForward ? 1 : kPass == Pass::kInputGrad ? s.stride_h * s.stride_w : conv.splits;
  if (path == Path::kFma) {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      const int64_t row_tiles = tiles(e.rows, kFmaTile), column_tiles = tiles(e.columns, kFmaTile);
      const dim3 grid(static_cast<unsigned>(row_tiles * column_tiles), 1, s.groups * parts);
      auto* kernel = fma_kernel<T, kPass>;
      GRADAUG_LAUNCH(kernel, grid, dim3(kFmaThreads), 0, stream, conv, Divisor(static_cast<int>(column_tiles)),
                     Divisor(parts));
    }
  } else {
    if constexpr (!std::is_same_v<T, double>) {
      if (use_large_tile(e, kPass == Pass::kWeightGrad ? conv.splits : 1, multiprocessors)) {
        launch_tensor_core_tile<T, kPass, LargeTile, 128>(conv, e, parts, stream);
      } else {
        launch_tensor_core_tile<T, kPass, SmallTile, 64>(conv, e, parts, stream);
      }
    }
  }
}

template <typename T, Pass kPass, int kVector>
void launch_depthwise(const Conv<T>& conv, int multiprocessors, cudaStream_t stream) {
  const Shape& s = conv.shape;
  constexpr int kLanes = kDepthwiseLanes<T, kVector>, kChannels = kLanes * kVector;
  const int64_t pixels =
      kPass == Pass::kForward ? int64_t{s.batch} * s.out_h * s.out_w : int64_t{s.batch} * s.in_h * s.in_w;
  const int64_t channel_tiles = tiles(s.groups, kChannels), pixel_tiles = tiles(pixels, kDepthwiseThreads / kLanes);
  // 16 blocks for each multiprocessor: more would only read the weights again.
  const int64_t enough = tiles(16 * multiprocessors, static_cast<int>(channel_tiles));
  const dim3 grid(static_cast<unsigned>(pixel_tiles < enough ? pixel_tiles : enough),
                  static_cast<unsigned>(channel_tiles));
  auto* kernel = depthwise_kernel<T, kPass, kVector>;
  GRADAUG_LAUNCH(kernel, grid, dim3(kDepthwiseThreads), s.kernel_h * s.kernel_w * kChannels * sizeof(Sum<T>), stream,
                 conv);
}

// y = conv(x, w) + bias, or dx from dy and w.
template <typename T, Pass kPass>
void launch_image(const Conv<T>& conv, Path path, int multiprocessors, cudaStream_t stream) {
  static_assert(kPass != Pass::kWeightGrad);
  const Shape& s = conv.shape;
  if (path != Path::kDirect) return launch_gemm<T, kPass>(conv, path, multiprocessors, stream);
  constexpr int kVector = kChunk<T>;
  const int weight_bytes = s.kernel_h * s.kernel_w * 8 * kVector * static_cast<int>(sizeof(Sum<T>));
  if (s.in_channels == 1 && s.out_channels == 1 && weight_bytes <= 48 * 1024) {
    if (conv.x_alignment == 16 && conv.y_alignment == 16 && conv.x.c == 1 && conv.y.c == 1) {
      return launch_depthwise<T, kPass, kVector>(conv, multiprocessors, stream);
    }
    if (weight_bytes <= 24 * 1024) return launch_depthwise<T, kPass, 1>(conv, multiprocessors, stream);
  }
  const bool forward = kPass == Pass::kForward;
  const int64_t pixels = int64_t{s.batch} * (forward ? s.out_h * s.out_w : s.in_h * s.in_w);
  const int channels = s.groups * (forward ? s.out_channels : s.in_channels);
  const dim3 grid(static_cast<unsigned>(tiles(pixels, kDirectPixels)),
                  static_cast<unsigned>(tiles(channels, kDirectChannels)));
  auto* kernel = direct_kernel<T, kPass>;
  GRADAUG_LAUNCH(kernel, grid, dim3(kDirectChannels, kDirectPixels), 0, stream, conv);
}

// Splits of the weight gradient's pixels: about two blocks for each multiprocessor, none with less than 8 steps' work.
// A function of the shape and the device alone, so that repeated runs give equal bits.
template <typename T>
int weight_grad_splits(const Conv<T>& conv, Path path, int multiprocessors) {
  const Shape& s = conv.shape;
  const Extent e = extent_of(conv, Pass::kWeightGrad);
  const int64_t pixels = int64_t{s.batch} * s.out_h * s.out_w;
  int64_t blocks = tiles(e.rows, 64) * tiles(e.columns, 64) * e.copies, least_pixels = 8 * kDepth<T>;
  if (path == Path::kDirect) {
    blocks = tiles(int64_t{s.groups} * s.out_channels, kDirectChannels) * s.in_channels *
             tiles(s.kernel_h * s.kernel_w, kDirectTaps);
  } else if (path == Path::kTensorCores && e.rows > 64 && e.columns > 64) {
    blocks = tiles(e.rows, 128) * tiles(e.columns, 128) * e.copies;
  }
  int64_t splits = 2 * multiprocessors / blocks;
  if (splits > pixels / least_pixels) splits = pixels / least_pixels;
  const int64_t most = 65535 / s.groups < 256 ? 65535 / s.groups : 256;  // the grid's limit along z
  if (splits > most) splits = most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

// Elements of conv.partial.
template <typename T>
int64_t weight_grad_workspace(const Conv<T>& conv) {
  return int64_t{conv.splits} * conv.shape.groups * conv.shape.out_channels * weight_grad_columns(conv);
}

// dweight[:groups * O, :, :, :C] += gradient; conv.splits and conv.partial are set.
template <typename T, typename D>
void launch_weight_grad(const Conv<T>& conv, const Filter<D>& dweight, Path path, int multiprocessors,
                        cudaStream_t stream) {
  const Shape& s = conv.shape;
  const int channels = s.groups * s.out_channels, taps = s.kernel_h * s.kernel_w;
  if (path == Path::kDirect) {
    const int64_t tap_tiles = tiles(taps, kDirectTaps);
    const dim3 grid(static_cast<unsigned>(tiles(channels, kDirectChannels)),
                    static_cast<unsigned>(tap_tiles * s.in_channels), conv.splits);
    auto* kernel = direct_weight_grad_kernel<T>;
    GRADAUG_LAUNCH(kernel, grid, dim3(kDirectChannels, kDirectPixels), 0, stream, conv,
                   Divisor(static_cast<int>(tap_tiles)));
  } else {
    launch_gemm<T, Pass::kWeightGrad>(conv, path, multiprocessors, stream);
  }
  const int columns = weight_grad_columns(conv), elements = channels * columns;
  auto* kernel = accumulate_kernel<Sum<T>, D>;
  GRADAUG_LAUNCH(kernel, dim3(static_cast<unsigned>(tiles(elements, kAccumulateThreads))), dim3(kAccumulateThreads), 0,
                 stream, conv.partial, conv.splits, elements, s.in_channels, Divisor(columns), conv.padded_in,
                 conv.kernel_w, dweight);
}

}  // namespace gradaug::conv

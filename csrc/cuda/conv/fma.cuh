// Implicit GEMM in plain arithmetic: float without TF32, and double; any strides; any group.
#pragma once

#include "cuda/conv/implicit_gemm.cuh"

namespace gradaug::conv {

template <typename T>
constexpr bool kFmaSupports = std::is_same_v<T, float> || std::is_same_v<T, double>;

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

template <typename T, Pass kPass>
void launch_fma(const Conv<T>& conv, const Device&, cudaStream_t stream) {
  if constexpr (kFmaSupports<T>) {
    const Extent e = extent_of(conv, kPass);
    const int parts = parts_of(conv, kPass);
    const int64_t row_tiles = tiles(e.rows, kFmaTile), column_tiles = tiles(e.columns, kFmaTile);
    const dim3 grid(static_cast<unsigned>(row_tiles * column_tiles), 1, conv.shape.groups * parts);
    auto* kernel = fma_kernel<T, kPass>;
    GRADAUG_LAUNCH(kernel, grid, dim3(kFmaThreads), 0, stream, conv, Divisor(static_cast<int>(column_tiles)),
                   Divisor(parts));
  }
}

// Blocks of one split of a weight gradient.
template <typename T>
int64_t fma_weight_grad_blocks(const Conv<T>& conv) {
  const Extent e = extent_of(conv, Pass::kWeightGrad);
  return tiles(e.rows, kFmaTile) * tiles(e.columns, kFmaTile) * e.copies;
}

}  // namespace gradaug::conv

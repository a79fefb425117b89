// The operands of tensor_core_sm80.cuh: how a tile of them lies in shared memory, and where its chunks come from.
#pragma once

#include "cuda/conv/implicit_gemm.cuh"
#include "cuda/conv/mma_sm80.cuh"

namespace gradaug::conv::sm80 {

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

}  // namespace gradaug::conv::sm80

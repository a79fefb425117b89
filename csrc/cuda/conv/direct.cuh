// Convolution without a matrix product, for groups of few channels: all types; any strides; any group.
#pragma once

#include "cuda/conv/problem.cuh"

namespace gradaug::conv {

constexpr int kDirectChannels = 32, kDirectPixels = 8, kDirectTaps = 9;

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

// Forward and input gradient.
template <typename T, Pass kPass>
void launch_direct(const Conv<T>& conv, const Device&, cudaStream_t stream) {
  const Shape& s = conv.shape;
  const bool forward = kPass == Pass::kForward;
  const int64_t pixels = int64_t{s.batch} * (forward ? s.out_h * s.out_w : s.in_h * s.in_w);
  const int channels = s.groups * (forward ? s.out_channels : s.in_channels);
  const dim3 grid(static_cast<unsigned>(tiles(pixels, kDirectPixels)),
                  static_cast<unsigned>(tiles(channels, kDirectChannels)));
  auto* kernel = direct_kernel<T, kPass>;
  GRADAUG_LAUNCH(kernel, grid, dim3(kDirectChannels, kDirectPixels), 0, stream, conv);
}

template <typename T>
void launch_direct_weight_grad(const Conv<T>& conv, const Device&, cudaStream_t stream) {
  const Shape& s = conv.shape;
  const int64_t tap_tiles = tiles(s.kernel_h * s.kernel_w, kDirectTaps);
  const dim3 grid(static_cast<unsigned>(tiles(s.groups * s.out_channels, kDirectChannels)),
                  static_cast<unsigned>(tap_tiles * s.in_channels), conv.splits);
  auto* kernel = direct_weight_grad_kernel<T>;
  GRADAUG_LAUNCH(kernel, grid, dim3(kDirectChannels, kDirectPixels), 0, stream, conv,
                 Divisor(static_cast<int>(tap_tiles)));
}

// Blocks of one split of a weight gradient.
template <typename T>
int64_t direct_weight_grad_blocks(const Conv<T>& conv) {
  const Shape& s = conv.shape;
  return tiles(int64_t{s.groups} * s.out_channels, kDirectChannels) * s.in_channels *
         tiles(s.kernel_h * s.kernel_w, kDirectTaps);
}

}  // namespace gradaug::conv

// Forward and input gradient where each group has one channel in and one out: all types; any strides.
#pragma once

#include "cuda/conv/problem.cuh"

namespace gradaug::conv {

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

template <typename T, Pass kPass, int kVector>
void launch_depthwise_vectors(const Conv<T>& conv, int multiprocessors, cudaStream_t stream) {
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

// Whether threads may load 16 bytes of channels. x and y are set.
template <typename T>
bool has_vector_rows(const Conv<T>& conv) {
  const Image<T>&x = conv.x, &y = conv.y;
  return x.c == 1 && y.c == 1 && alignment(x.data, {x.n, x.h, x.w}) == 16 && alignment(y.data, {y.n, y.h, y.w}) == 16;
}

// Whether the weights of a block's channels fit into shared memory; of single channels a block has more.
template <typename T>
bool depthwise_weights_fit(const Conv<T>& conv) {
  const int bytes = conv.shape.kernel_h * conv.shape.kernel_w * 8 * kChunk<T> * static_cast<int>(sizeof(Sum<T>));
  return bytes <= (has_vector_rows(conv) ? 48 : 24) * 1024;
}

template <typename T, Pass kPass>
void launch_depthwise(const Conv<T>& conv, const Device& device, cudaStream_t stream) {
  if (has_vector_rows(conv)) {
    launch_depthwise_vectors<T, kPass, kChunk<T>>(conv, device.multiprocessors, stream);
  } else {
    launch_depthwise_vectors<T, kPass, 1>(conv, device.multiprocessors, stream);
  }
}

}  // namespace gradaug::conv

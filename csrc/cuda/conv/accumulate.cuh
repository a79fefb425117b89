// A weight gradient takes two steps: a kernel leaves partial sums, each over one split of the pixels, and the one here
// adds them, in order, to the caller's buffer.
#pragma once

#include "cuda/conv/problem.cuh"

namespace gradaug::conv {

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

// Splits of the pixels: about two blocks for each multiprocessor, none with less than 8 steps of 64 bytes. A function
// of the shape and the device alone, so that repeated runs give equal bits. blocks: of the kernel, for one split.
template <typename T>
int weight_grad_splits(const Conv<T>& conv, int64_t blocks, const Device& device) {
  const Shape& s = conv.shape;
  const int64_t pixels = int64_t{s.batch} * s.out_h * s.out_w, least_pixels = 8 * 64 / sizeof(T);
  int64_t splits = 2 * device.multiprocessors / blocks;
  if (splits > pixels / least_pixels) splits = pixels / least_pixels;
  const int64_t most = 65535 / s.groups < 256 ? 65535 / s.groups : 256;  // the grid's limit along z
  if (splits > most) splits = most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

// Elements of conv.partial; conv.splits is set.
template <typename T>
int64_t weight_grad_workspace(const Conv<T>& conv) {
  return int64_t{conv.splits} * conv.shape.groups * conv.shape.out_channels * weight_grad_columns(conv);
}

// dweight[:groups * O, :, :, :C] += the sum of conv.partial.
template <typename T, typename D>
void launch_accumulate(const Conv<T>& conv, const Filter<D>& dweight, cudaStream_t stream) {
  const Shape& s = conv.shape;
  const int columns = weight_grad_columns(conv), elements = s.groups * s.out_channels * columns;
  auto* kernel = accumulate_kernel<Sum<T>, D>;
  GRADAUG_LAUNCH(kernel, dim3(static_cast<unsigned>(tiles(elements, kAccumulateThreads))), dim3(kAccumulateThreads), 0,
                 stream, conv.partial, conv.splits, elements, s.in_channels, Divisor(columns), conv.padded_in,
                 conv.kernel_w, dweight);
}

}  // namespace gradaug::conv

// Depthwise convolution and convolution in small groups: as many output as input channels, `group` of them in a group.
// A depthwise convolution has groups of one channel. Pointers, sizes and strides; no tensors.
#pragma once

#include <vector>

#include "cpu/conv/problem.h"
#include "cpu/microkernels/depthwise_table.h"

namespace gradaug::cpu {

// [groups * group, group, KH, KW] with any strides: output channel, input channel of its group, tap.
struct GroupedWeight {
  const void* data;
  Dtype dtype;
  int64_t out, in, h, w;  // strides
};

// y[n, q, o] = bias[o] + sum over taps and the channels i of o's group of x[n, input(q, tap), i] weight[o, i, tap].
//   x [batch, H, W, channels], y [batch, OH, OW, channels], bias [channels] or null
void depthwise_forward(const DepthwiseKernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w,
                       const Image& x, const GroupedWeight& weight, const float* bias, const Image& y, int64_t channels,
                       int group);

// dx[n, input(q, tap), i] = sum over taps and the channels o of i's group of dy[n, q, o] weight[o, i, tap].
void depthwise_input_grad(const DepthwiseKernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w,
                          const Image& dy, const GroupedWeight& weight, const Image& dx, int64_t channels, int group);

// dweight[o, i, tap] += sum over images and pixels q of dy[n, q, o] x[n, input(q, tap), i].
void depthwise_weight_grad(const DepthwiseKernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w,
                           const Image& dy, const Image& x, int64_t channels, int group, const WeightGrad& dweight);

}  // namespace gradaug::cpu

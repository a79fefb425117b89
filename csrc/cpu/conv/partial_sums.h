// Weight gradients of threads that share the pixels.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

// Sums [parts, KH, KW, out, in], which are added to the gradient in the order of the parts; the gradient itself where
// there is one part and its input channels are adjacent.
class PartialSums {
 public:
  PartialSums(int64_t parts, int64_t kernel_h, int64_t kernel_w, int64_t out, int64_t in, const WeightGrad& dweight)
      : parts_(parts),
        kernel_h_(kernel_h),
        kernel_w_(kernel_w),
        out_(out),
        in_(in),
        dweight_(dweight),
        apart_(parts > 1 || dweight.in != 1),
        memory_(apart_ ? parts * size() : 0) {}

  // Where part p adds its sum: zero so far in these output channels, if it is not the gradient itself.
  WeightGrad of(int64_t p, Range channels) const {
    if (!apart_) return dweight_;
    float* data = memory_.data() + p * size();
    for (int64_t tap = 0; tap < kernel_h_ * kernel_w_; tap++) {
      std::memset(data + (tap * out_ + channels.begin) * in_, 0, channels.size() * in_ * sizeof(float));
    }
    return {data, in_, kernel_w_ * out_ * in_, out_ * in_, 1};
  }

  void add() const {
    if (!apart_) return;
    at::parallel_for(0, out_, std::max<int64_t>(1, 32768 * out_ / size()), [&](int64_t begin, int64_t end) {
      for (int64_t tap = 0; tap < kernel_h_ * kernel_w_; tap++) {
        for (int64_t o = begin; o < end; o++) {
          const float* from = memory_.data() + (tap * out_ + o) * in_;
          float* to = dweight_.data + o * dweight_.out + tap / kernel_w_ * dweight_.h + tap % kernel_w_ * dweight_.w;
          for (int64_t i = 0; i < in_; i++) {
            float total = from[i];
            for (int64_t p = 1; p < parts_; p++) total += from[i + p * size()];
            to[i * dweight_.in] += total;
          }
        }
      }
    });
  }

 private:
  int64_t size() const { return kernel_h_ * kernel_w_ * out_ * in_; }

  const int64_t parts_, kernel_h_, kernel_w_, out_, in_;
  const WeightGrad dweight_;
  const bool apart_;
  const Buffer memory_;
};

}  // namespace gradaug::cpu

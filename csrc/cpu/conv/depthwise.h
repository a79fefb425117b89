// Depthwise convolution and convolution in small groups: as many output as input channels, some of them in a group, one
// where it is depthwise. On the kernels of microkernels/depthwise_table.h:
// 1. the weight is converted once to [vectors of channels, tap, rotation, lanes] float32: it is small;
// 2. a task takes rows of one image and some vectors of channels, and goes down the rows. The input rows under one row
//    of outputs are kept in the nearest caches as padded float32 columns, each copied once;
// 3. forward and input gradient: a row of outputs is summed over its taps in registers and stored once. Taps outside
//    the image are left out above and below, and meet zeros to the left and right;
// 4. weight gradient: a row of dy is multiplied with all taps at once. Sums of up to 64 pixels are added to those of a
//    band of rows, these to a part of the images; parts, whose number does not depend on the threads, are added in
//    their order.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

constexpr int64_t kRingFloats = 16 * 1024;  // 64 KiB of input rows
constexpr int64_t kMaxVectors = 8;          // of channels in a ring: small images then stay in 32 KiB
constexpr int64_t kBandBytes = 128 * 1024;  // of x and y: neighbouring channels find shared cache lines again

// Column c of a row: every step-th one is adjacent, so that adjacent outputs read adjacent columns whatever the stride.
struct Columns {
  int64_t lanes, first, count, step, plane;

  Columns(int64_t lanes, const std::vector<GatherAxis>& phases) : lanes(lanes), step(phases[0].step) {
    int64_t last = -1;
    first = 0;
    for (const GatherAxis& axis : phases) {
      if (axis.outputs == 0 || axis.offset.empty()) continue;
      const int64_t end = (axis.outputs - 1) * axis.step + axis.offset.back();
      first = last < first ? axis.offset.front() : std::min(first, axis.offset.front());
      last = std::max(last, end);
    }
    count = std::max<int64_t>(last - first + 1, 0);
    plane = ceil_div(count, step);
  }
  int64_t vector() const { return step * plane * lanes; }  // floats
  // Whether the inputs under the taps of an output are.
  bool adjacent(const GatherAxis& axis) const {
    return step == 1 && !axis.tap.empty() && axis.offset.back() - axis.offset.front() + 1 == std::ssize(axis.tap);
  }
  int64_t at(int64_t c) const { return ((c - first) % step * plane + (c - first) / step) * lanes; }
};

// The last rows of an image that were loaded, for some vectors of channels: [slots, vectors, columns, lanes].
class Ring {
 public:
  Ring(const DepthwiseKernels& kernels, const Columns& columns, int64_t slots, int64_t vectors)
      : kernels_(kernels),
        columns_(columns),
        slots_(slots),
        row_(vectors * columns.vector()),
        memory_(std::max<int64_t>(slots * row_, 1)) {
    std::memset(memory_.data(), 0, slots * row_ * sizeof(float));  // the padding stays zero
  }

  // Channels [first, first + channels) of image n from row `row` on.
  void start(const Images& x, int64_t width, int64_t n, int64_t first, int64_t channels, int64_t row) {
    x_ = x, width_ = width, n_ = n, channel_ = first, channels_ = channels, next_ = row;
  }

  void load_to(int64_t row) {
    for (; next_ <= row; next_++) load(next_);
  }

  const float* data() const { return memory_.data(); }
  int64_t row(int64_t row) const { return row % slots_ * row_; }  // offset in floats

 private:
  void load(int64_t h) {
    const int64_t left = std::max<int64_t>(columns_.first, 0),
                  right = std::min(columns_.first + columns_.count, width_);
    for (int64_t c = left; c < std::min(right, left + columns_.step); c++) {
      kernels_.load(memory_.data() + row(h) + columns_.at(c), columns_.vector(),
                    x_.at(n_, h, c) + channel_ * size_of(x_.dtype), x_.w * columns_.step, x_.h, x_.dtype,
                    ceil_div(right - c, columns_.step), channels_);
    }
  }

  const DepthwiseKernels& kernels_;
  const Columns columns_;
  const int64_t slots_, row_;
  const Buffer memory_;
  Images x_{};
  int64_t width_ = 0, n_ = 0, channel_ = 0, channels_ = 0, next_ = 0;
};

// How many of `vectors` a ring holds, each in so many floats.
inline int64_t vectors_of_a_ring(int64_t floats, int64_t vectors) {
  return std::clamp<int64_t>(kRingFloats / std::max<int64_t>(floats, 1), 1, std::min(vectors, kMaxVectors));
}

// Rows of x that the taps [tap, tap_end) of one axis meet inside the image for output q.
struct InputRows {
  int64_t tap, tap_end, first, last;

  InputRows(const GatherAxis& axis, int64_t q) : tap(0), tap_end(axis.offset.size()), first(0), last(-1) {
    while (tap < tap_end && q * axis.step + axis.offset[tap] < 0) tap++;
    while (tap < tap_end && q * axis.step + axis.offset[tap_end - 1] >= axis.inputs) tap_end--;
    if (tap == tap_end) return;
    first = q * axis.step + axis.offset[tap];
    last = q * axis.step + axis.offset[tap_end - 1];
  }
  bool empty() const { return tap == tap_end; }
};

}  // namespace gradaug::cpu

// Max pooling that keeps one byte for each maximum, where in its window it is: forward and backward of NHWC images;
// others are copied to that format. Formulas and shapes: gradaug_kernels/ops/slim_norm_max_pool2d.py.
//
// Forward: a task takes rows of outputs, and for each pixel compares the pixels of its window, channels in vectors
// (norm/max_pool.h). Backward gathers: a task takes rows of inputs, and each pixel sums the gradients of
// those windows whose maximum it is.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/norm/table.h"

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kGrain = 16384;  // values that are worth a thread

struct Axis {
  int64_t inputs, outputs, kernel, stride, padding;

  int64_t first(int64_t output) const { return output * stride - padding; }  // input under the first tap
  // Taps that are inside the image.
  int64_t begin(int64_t output) const { return std::max<int64_t>(0, -first(output)); }
  int64_t end(int64_t output) const { return std::min(kernel, inputs - first(output)); }
  // Outputs whose window has an input.
  int64_t first_output(int64_t input) const {
    return input + padding < kernel ? 0 : (input + padding - kernel) / stride + 1;
  }
  int64_t last_output(int64_t input) const { return std::min(outputs - 1, (input + padding) / stride); }
};

Tensor nhwc(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

Axis axis(int i, IntArrayRef inputs, IntArrayRef outputs, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  return {inputs[2 + i], outputs[2 + i], kernel[i], stride[i], padding[i]};
}

std::tuple<Tensor, Tensor> slim_max_pool2d(const Tensor& x, IntArrayRef kernel, IntArrayRef stride,
                                           IntArrayRef padding) {
  gradaug::check_dims("x", x, 4, "[N, C, H, W]");
  gradaug::check_floating("x", x);
  const auto size = gradaug::check_pooling(x.sizes(), kernel, stride, padding);
  const auto options = x.options().memory_format(at::MemoryFormat::ChannelsLast);
  Tensor y = at::empty(size, options), offset = at::empty(size, options.dtype(at::kByte));
  const Tensor input = nhwc(x);
  const Axis h = axis(0, x.sizes(), size, kernel, stride, padding);
  const Axis w = axis(1, x.sizes(), size, kernel, stride, padding);
  const int64_t channels = x.size(1), row = w.outputs * channels;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "slim_max_pool2d", [&] {
    const scalar_t* from = input.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    const auto& kernels = gradaug::batch_norm::norm_kernels<scalar_t>();
    uint8_t* where = offset.mutable_data_ptr<uint8_t>();
    at::parallel_for(0, size[0] * h.outputs, std::max<int64_t>(1, kGrain / std::max<int64_t>(row, 1)),
                     [&](int64_t begin, int64_t end) {
                       std::vector<const scalar_t*> pixels(kernel[0] * kernel[1]);
                       std::vector<uint8_t> tap(pixels.size());
                       for (int64_t i = begin; i < end; i++) {
                         const int64_t n = i / h.outputs, p = i % h.outputs;
                         for (int64_t q = 0; q < w.outputs; q++) {
                           int64_t taps = 0;
                           for (int64_t a = h.begin(p); a < h.end(p); a++) {
                             for (int64_t b = w.begin(q); b < w.end(q); b++, taps++) {
                               const int64_t pixel = (n * h.inputs + h.first(p) + a) * w.inputs + w.first(q) + b;
                               pixels[taps] = from + pixel * channels;
                               tap[taps] = static_cast<uint8_t>(a * w.kernel + b);
                             }
                           }
                           const int64_t output = i * row + q * channels;
                           kernels.largest(pixels.data(), tap.data(), taps, channels, to + output, where + output);
                         }
                       }
                     });
  });
  const auto format = x.suggest_memory_format();
  return {y.contiguous(format), offset.contiguous(format)};
}

Tensor slim_max_pool2d_backward(const Tensor& dy, const std::optional<Tensor>& y, const Tensor& offset,
                                IntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  gradaug::check_pooling_backward(dy, y, offset, input_size, kernel, stride, padding);
  Tensor dx = at::empty(input_size, dy.options().memory_format(at::MemoryFormat::ChannelsLast));
  const Tensor gradient = nhwc(dy), maximum = y ? nhwc(*y) : Tensor(), position = nhwc(offset);
  const Axis h = axis(0, input_size, dy.sizes(), kernel, stride, padding);
  const Axis w = axis(1, input_size, dy.sizes(), kernel, stride, padding);
  const int64_t channels = input_size[1], row = w.inputs * channels;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dy.scalar_type(), "slim_max_pool2d_backward", [&] {
    const scalar_t* from = gradient.const_data_ptr<scalar_t>();
    const scalar_t* value = y ? maximum.const_data_ptr<scalar_t>() : nullptr;
    const uint8_t* where = position.const_data_ptr<uint8_t>();
    scalar_t* to = dx.mutable_data_ptr<scalar_t>();
    const auto& kernels = gradaug::batch_norm::norm_kernels<scalar_t>();
    at::parallel_for(0, input_size[0] * h.inputs, std::max<int64_t>(1, kGrain / std::max<int64_t>(row, 1)),
                     [&](int64_t begin, int64_t end) {
                       std::vector<const scalar_t*> gradients(kernel[0] * kernel[1]), values(gradients.size());
                       std::vector<const uint8_t*> offsets(gradients.size());
                       std::vector<uint8_t> tap(gradients.size());
                       for (int64_t i = begin; i < end; i++) {
                         const int64_t n = i / h.inputs, r = i % h.inputs;
                         for (int64_t s = 0; s < w.inputs; s++) {
                           int64_t windows = 0;
                           for (int64_t p = h.first_output(r); p <= h.last_output(r); p++) {
                             for (int64_t q = w.first_output(s); q <= w.last_output(s); q++, windows++) {
                               const int64_t output = ((n * h.outputs + p) * w.outputs + q) * channels;
                               gradients[windows] = from + output, offsets[windows] = where + output;
                               values[windows] = value ? value + output : nullptr;
                               tap[windows] = static_cast<uint8_t>((r - h.first(p)) * w.kernel + s - w.first(q));
                             }
                           }
                           kernels.sum_of_windows(gradients.data(), values.data(), offsets.data(), tap.data(), windows,
                                                  channels, to + i * row + s * channels);
                         }
                       }
                     });
  });
  return dx.contiguous(offset.suggest_memory_format());
}

}  // namespace

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_max_pool2d", slim_max_pool2d);
  m.impl("slim_max_pool2d_backward", slim_max_pool2d_backward);
}

// Convolutions of fewer pixels than their weight has elements, as in the last layers of a network: one matrix product
// [pixels, taps * depth] x [taps * depth, columns].
// 1. What each pixel reads is copied side by side, unless it is in memory like that;
// 2. a task packs a panel of 32 columns of the weight, which nobody else needs and which stays in the second-level
//    cache, and multiplies all pixels with it, which come from the third level;
// 3. results whose pixels are not evenly spaced are copied there at the end.
// implicit_gemm, which packs the weight for all tasks and has each read all of it, takes up to 1.6 times as long.
#include <algorithm>
#include <cstring>

#include "cpu/conv/packed_panels.h"
#include "cpu/conv/paths.h"
#include "cpu/conv/strided_rows.h"

namespace gradaug::cpu {
namespace {

class Product {
 public:
  Product(const GatherProblem& problem, const Phase& phase)
      : problem_(problem),
        phase_(phase),
        kernels_(*problem.kernels),
        panels_{static_cast<int64_t>(phase.h.tap.size() * phase.w.tap.size()), ceil_div(problem.depth(), kernels_.pair),
                problem.channels(), kernels_.panel, kernels_.lanes},
        pixels_(problem.batch * phase.h.outputs * phase.w.outputs),
        units_(panels_.taps * panels_.units),
        bias_(padded_bias(problem.bias, panels_)) {}

  void compute() const {
    auto inputs = inputs_in_place();
    // Rows of a tile that are multiples of 4 KiB apart would share one set of the first-level cache.
    const int64_t pitch = units_ % 256 == 0 ? units_ + 16 : units_;
    const Buffer input_memory(inputs.data ? 0 : pixels_ * pitch);
    if (!inputs.data) {
      copy_inputs(input_memory.data(), pitch);
      inputs = {reinterpret_cast<const char*>(input_memory.data()), pitch};
    }
    auto outputs = outputs_in_place(problem_.y, problem_.batch, phase_.h, phase_.w);
    const bool apart = !outputs.data;
    const int64_t bytes = pixels_ * panels_.columns * size_of(problem_.y.dtype);
    const Buffer output_memory(apart ? ceil_div(bytes, sizeof(float)) : 0);
    if (apart) outputs = {reinterpret_cast<char*>(output_memory.data()), panels_.columns};
    multiply(inputs, outputs);
    if (apart) copy_outputs(outputs.data);
  }

 private:
  // [pixels, units]; no data where they have to be copied.
  Rows<const char> inputs_in_place() const {
    if (!reads_in_place(problem_, phase_)) return {};
    const auto rows = gradaug::cpu::inputs_in_place(problem_.x, problem_.batch, phase_.h, phase_.w);
    return {rows.data, rows.pitch / kernels_.pair};
  }

  template <class F>
  void for_each_pixel(int64_t grain, const F& f) const {
    const int64_t height = phase_.h.outputs, width = phase_.w.outputs;
    at::parallel_for(0, pixels_, std::max<int64_t>(1, 16384 / grain), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i, i / (height * width), i / width % height, i % width);
    });
  }

  void copy_inputs(float* memory, int64_t pitch) const {
    const GatherAxis &h = phase_.h, &w = phase_.w;
    const Images& x = problem_.x;
    const int64_t taps_w = w.tap.size();
    for_each_pixel(units_, [&](int64_t i, int64_t n, int64_t q, int64_t p) {
      float* to = memory + i * pitch;
      for (int64_t t = 0; t < panels_.taps; t++, to += panels_.units) {
        const int64_t row = h.step * q + h.offset[t / taps_w], column = w.step * p + w.offset[t % taps_w];
        if (row >= 0 && row < h.inputs && column >= 0 && column < w.inputs) {
          kernels_.load_pixels(to, panels_.units, x.at(n, row, column), x.w, x.dtype, 1, problem_.depth());
        } else {
          std::memset(to, 0, panels_.units * sizeof(float));
        }
      }
    });
  }

  void multiply(const Rows<const char>& inputs, const Rows<char>& outputs) const {
    const MutableImages& y = problem_.y;
    const WeightMatrices weight = problem_.matrices();
    at::parallel_for(0, panels_.count(), 1, [&](int64_t begin, int64_t end) {
      const Buffer panel(units_ * panels_.panel);
      const int64_t no_tap = 0;
      for (int64_t p = begin; p < end; p++) {
        for (int64_t t = 0; t < panels_.taps; t++) {
          pack_tap(kernels_, panel.data(), panels_, p, t, phase_, weight, problem_.depth());
        }
        GemmTile tile{};
        tile.a = reinterpret_cast<const float*>(inputs.data);
        tile.a_row = inputs.pitch;
        tile.tap_offset = &no_tap;
        tile.taps = 1;
        tile.b = panel.data();
        tile.depth = units_;
        tile.bias = bias_.empty() ? nullptr : bias_.data() + p * panels_.panel;
        tile.c = outputs.data + p * panels_.panel * size_of(y.dtype);
        tile.c_row = outputs.pitch;
        tile.rows = pixels_;
        tile.columns = panels_.valid(p);
        kernels_.gemm(tile, y.dtype);
      }
    });
  }

  void copy_outputs(const char* from) const {
    const GatherAxis &h = phase_.h, &w = phase_.w;
    const MutableImages& y = problem_.y;
    const int64_t bytes = panels_.columns * size_of(y.dtype);
    for_each_pixel(panels_.columns, [&](int64_t i, int64_t n, int64_t q, int64_t p) {
      std::memcpy(y.at(n, h.first + q * h.spacing, w.first + p * w.spacing), from + i * bytes, bytes);
    });
  }

  const GatherProblem& problem_;
  const Phase& phase_;
  const Kernels& kernels_;
  const Panels panels_;
  const int64_t pixels_, units_;
  const std::vector<float> bias_;
};

}  // namespace

void small_image_gemm(const GatherProblem& problem, const Phase& phase) { Product(problem, phase).compute(); }

}  // namespace gradaug::cpu

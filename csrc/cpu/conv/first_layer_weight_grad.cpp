// Weight gradient of a convolution of few input channels, such as a network's first, which would fill little of a
// panel: the panels are those of dy, and the rows of a tile are the channels of the kernel's whole row, which are
// adjacent in a padded copy of x. Threads share the images and rows; their sums are added in the order of the threads.
#include <algorithm>
#include <array>
#include <vector>

#include "cpu/conv/input_band.h"
#include "cpu/conv/load_row.h"
#include "cpu/conv/paths.h"

namespace gradaug::cpu {
namespace {

class FirstLayer {
 public:
  explicit FirstLayer(const WeightGradProblem& problem)
      : kernels_(*problem.kernels),
        p_(problem),
        row_(p_.w.kernel * p_.in),
        panel_(stored_panel(kernels_, p_.out)),
        panels_(ceil_div(p_.out, panel_)),
        height_(std::min<int64_t>(p_.h.outputs, ceil_div(256, p_.w.outputs))),
        down_(ceil_div(p_.h.outputs, height_)),
        blocks_(ceil_div(p_.batch, kernels_.pair) * down_),
        parts_(std::min<int64_t>(at::get_num_threads(), blocks_)),
        in_units_(kernels_.pair == 1 && p_.dy.dtype == Dtype::f32),
        whole_vectors_(p_.out % kernels_.lanes == 0),
        band_{0,
              1,
              (height_ - 1) * p_.h.stride + (p_.h.kernel - 1) * p_.h.dilation + 1,
              -p_.w.padding,
              1,
              p_.w.inputs + 2 * p_.w.padding,
              p_.in},
        sums_(parts_ * size()) {}

  void add() {
    at::parallel_for(0, parts_, 1, [&](int64_t begin, int64_t end) {
      const Buffer x(band_.units()), dy(in_units_ && whole_vectors_ ? 0 : panels_ * dy_panel());
      for (int64_t part = begin; part < end; part++) {
        const Range mine = Range{0, blocks_}.part(part, parts_);
        for (int64_t b = mine.begin; b < mine.end; b++) {
          add_block(b, b + 1 < mine.end ? fetching(b + 1) : Fetching{}, x.data(), dy.data(),
                    sums_.data() + part * size());
        }
      }
    });
    add_sums();
  }

 private:
  using Fetching = std::array<Prefetch, 4>;  // rows of dy and x, of one image or two

  int64_t size() const { return p_.h.kernel * row_ * p_.out; }
  int64_t dy_row() const { return p_.w.outputs * panel_; }
  int64_t dy_panel() const { return height_ * dy_row(); }

  // What block b adds to that of the block before it.
  Fetching fetching(int64_t b) const {
    const int64_t n = b / down_ * kernels_.pair, first = b % down_ * height_;
    const int64_t rows = std::min(height_, p_.h.outputs - first);
    const auto of_image = [](const Images& images, int64_t n, int64_t first, int64_t count, int64_t width) {
      const int64_t size = size_of(images.dtype);
      return Prefetch(images.at(n, first, 0), count, images.h * size, width * images.w * size);
    };
    const int64_t x_first = std::min(first * p_.h.stride, p_.h.inputs - 1);
    const int64_t x_rows = std::min(rows * p_.h.stride, p_.h.inputs - x_first);
    Fetching found;
    for (int64_t i = 0; i < kernels_.pair && n + i < p_.batch; i++) {
      found[2 * i] = of_image(p_.dy, n + i, first, rows, p_.w.outputs);
      found[2 * i + 1] = of_image(p_.x, n + i, x_first, x_rows, p_.w.inputs);
    }
    return found;
  }

  void add_block(int64_t b, const Fetching& next, float* x, float* dy, float* sum) const {
    const int64_t n = b / down_, first = b % down_ * height_, rows = std::min(height_, p_.h.outputs - first);
    // The last vector of a block may end beyond its last pixel, but not beyond the image.
    const int64_t after = (p_.h.outputs - first - rows) * p_.dy.h;
    const bool copied = !in_units_ || (!whole_vectors_ && after < kernels_.lanes);
    load_inputs(x, n, first);
    for (int64_t r = 0; copied && r < rows; r++) {
      load_row(kernels_, p_.batch, dy + r * dy_row(), panel_, panel_, dy_panel(), p_.dy, n, first + r, 0, 1,
               p_.w.outputs, 0, p_.out);
    }
    Fetching rest = next;
    for (int64_t kh = 0; kh < p_.h.kernel; kh++) {
      OuterTile tile{};
      tile.a = x + kh * p_.h.dilation * band_.row();
      tile.images = 1, tile.rows = rows, tile.pixels = p_.w.outputs;
      tile.a_row = band_.row() * p_.h.stride, tile.a_pixel = p_.w.stride * p_.in;
      tile.b_row = copied ? dy_row() : p_.dy.h, tile.b_pixel = copied ? panel_ : p_.dy.w;
      tile.c_row = p_.out;
      tile.channels = row_;
      for (int64_t p = 0; p < panels_; p++) {
        tile.b = copied ? dy + p * dy_panel() : reinterpret_cast<const float*>(p_.dy.at(n, first, 0)) + p * panel_;
        tile.c = sum + kh * row_ * p_.out + p * panel_;
        tile.columns = std::min(panel_, p_.out - p * panel_);
        for (size_t i = 0; i < next.size(); i++) rest[i].fetch(ceil_div(next[i].lines(), p_.h.kernel * panels_));
        kernels_.outer(tile);
      }
    }
  }

  void load_inputs(float* to, int64_t n, int64_t first) const {
    Band band = band_;
    band.first_row = first * p_.h.stride - p_.h.padding;
    fill_band(to, band, p_.h.inputs, p_.w.inputs, [&](float* to, int64_t r, int64_t c, int64_t count) {
      const bool one_run = p_.x.w == p_.in;
      const int64_t pixels = one_run ? 1 : count, channels = one_run ? count * p_.in : p_.in;
      load_row(kernels_, p_.batch, to, channels, channels, 0, p_.x, n, r, c, 1, pixels, 0, channels);
    });
  }

  void add_sums() const {
    const WeightGrad& dweight = p_.dweight;
    for (int64_t o = 0; o < p_.out; o++) {
      for (int64_t kh = 0; kh < p_.h.kernel; kh++) {
        for (int64_t kw = 0; kw < p_.w.kernel; kw++) {
          float* to = dweight.data + o * dweight.out + kh * dweight.h + kw * dweight.w;
          for (int64_t i = 0; i < p_.in; i++) {
            const float* from = sums_.data() + (kh * row_ + kw * p_.in + i) * p_.out + o;
            float total = from[0];
            for (int64_t part = 1; part < parts_; part++) total += from[part * size()];
            to[i * dweight.in] += total;
          }
        }
      }
    }
  }

  const Kernels& kernels_;
  const WeightGradProblem& p_;
  const int64_t row_, panel_, panels_;            // channels of a row of the kernel; of a panel of dy
  const int64_t height_, down_, blocks_, parts_;  // rows of outputs in a block; blocks of an image, and of all
  const bool in_units_, whole_vectors_;
  const Band band_;
  std::vector<float> sums_;  // [parts, KH, row, out]
};

}  // namespace

void first_layer_weight_grad(const WeightGradProblem& problem) { FirstLayer(problem).add(); }

}  // namespace gradaug::cpu

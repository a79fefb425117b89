// Weight gradient of a convolution, a matrix product that sums over pixels:
// 1. threads share the output channels of a large weight, and the pixels of a small one (each then has its own sum);
// 2. a thread takes blocks of a few hundred pixels and copies them to adjacent memory, x in panels of 32 channels,
// where
//    they are not in that form already; the next block is fetched from memory meanwhile.
//    Pairs of bfloat16 pixels are zipped into units: dy once, x once for each column of the kernel;
// 3. for each panel and tap, tiles of up to 14 output channels sum the block in registers, over those pixels that the
// tap
//    finds inside the image, and are added to the gradient;
// 4. where threads shared the pixels, their sums are added in the order of the threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "band.h"
#include "partial_sums.h"

namespace gradaug::cpu {
namespace {

// Those outputs of `range` whose input at `tap` is inside the image.
Range inside(const ConvAxis& axis, int64_t tap, Range range) {
  const int64_t shift = axis.padding - tap * axis.dilation;  // input = stride * output - shift
  const int64_t first = shift > 0 ? ceil_div(shift, axis.stride) : 0;
  const int64_t last = axis.inputs - 1 + shift;  // stride * output <= last
  return {std::max(range.begin, first), std::min(range.end, last < 0 ? 0 : last / axis.stride + 1)};
}

// Images, rows and columns of outputs that a thread sums over before it touches the gradient.
struct Block {
  Range images, rows, columns;
};

struct Blocks {
  int64_t batch, height, width;
  int64_t images, rows, columns;  // of a block

  Blocks(int64_t batch, int64_t height, int64_t width, int64_t pixels) : batch(batch), height(height), width(width) {
    columns = std::min(width, pixels);
    columns = ceil_div(width, ceil_div(width, columns));
    columns += columns < width ? columns % 2 : 0;  // a pair of pixels is not divided
    rows = std::clamp<int64_t>(pixels / columns, 1, height);
    rows = ceil_div(height, ceil_div(height, rows));
    images = rows == height ? std::clamp<int64_t>(pixels / (columns * rows), 1, batch) : 1;
  }
  int64_t count() const { return ceil_div(batch, images) * ceil_div(height, rows) * ceil_div(width, columns); }
  Block operator[](int64_t i) const {
    const int64_t across = ceil_div(width, columns), down = ceil_div(height, rows);
    const int64_t n = i / across / down * images, h = i / across % down * rows, w = i % across * columns;
    return {{n, std::min(batch, n + images)}, {h, std::min(height, h + rows)}, {w, std::min(width, w + columns)}};
  }
};

// [panel of channels, image, row, pixel, channel] in units
struct Units {
  const float* data;
  int64_t panel, n, h, w;  // strides
};

// Memory of a thread that grows to what is asked for.
class Scratch {
 public:
  float* at_least(int64_t floats) {
    if (floats > size_) buffer_ = Buffer(size_ = floats);
    return data();
  }
  float* data() const { return buffer_.data(); }

 private:
  int64_t size_ = 0;
  Buffer buffer_{0};
};

// The sum of one thread: output channels `out`, pixels of `blocks`, added to dweight.
class Sum {
 public:
  Sum(const Kernels& kernels, const ConvAxis& h, const ConvAxis& w, const Image& dy, const Image& x, int64_t in,
      Range out, const WeightGrad& dweight)
      : kernels_(kernels), h_(h), w_(w), dy_(dy), x_(x), in_(in), out_(out), dweight_(dweight) {}

  // next: the block after this one, whose memory is fetched meanwhile.
  void add(const Block& block, const Block& next) {
    const Units dy = outputs(block);
    next_dy_ = fetching(dy_, next.images, next.rows, next.columns, h_.outputs, out_.size());
    next_x_ = fetching(x_, next.images, input_range(h_, next.rows), input_range(w_, next.columns), h_.inputs, in_);
    const int64_t calls = ceil_div(in_, kernels_.panel) * w_.kernel * h_.kernel;
    dy_lines_ = ceil_div(next_dy_.lines(), calls), x_lines_ = ceil_div(next_x_.lines(), calls);
    if (kernels_.pair == 1) {
      const Units x = input_pixels(block);
      for (int64_t i = 0; i < in_; i += kernels_.panel) {
        for (int64_t kw = 0; kw < w_.kernel; kw++) add_taps(block, dy, x, kw, i);
      }
    } else {
      for (int64_t kw = 0; kw < w_.kernel; kw++) {
        const Units x = input_pairs(block, kw);
        for (int64_t i = 0; i < in_; i += kernels_.panel) add_taps(block, dy, x, kw, i);
      }
    }
  }

 private:
  // The inputs that some outputs need, whatever the tap.
  static Range input_range(const ConvAxis& axis, Range outputs) {
    const int64_t first = std::max<int64_t>(0, outputs.begin * axis.stride - axis.padding);
    const int64_t last = (outputs.end - 1) * axis.stride - axis.padding + (axis.kernel - 1) * axis.dilation;
    return {first, std::max(first, std::min(axis.inputs, last + 1))};
  }

  // A kernel of one column reads only every stride-th column of x.
  int64_t column_step() const { return w_.kernel == 1 ? w_.stride : 1; }

  // dy of the block: [images, rows, columns, out], or pairs of columns; where it is, if that is in units.
  Units outputs(const Block& block) {
    if (kernels_.pair == 1 && dy_.dtype == Dtype::f32) {
      const char* first = dy_.at(block.images.begin, block.rows.begin, block.columns.begin);
      return {reinterpret_cast<const float*>(first) + out_.begin, 0, dy_.n, dy_.h, dy_.w};
    }
    const int64_t channels = out_.size(), width = ceil_div(block.columns.size(), kernels_.pair);
    const int64_t row = width * channels, image = row * block.rows.size();
    float* to = dy_memory_.at_least(image * block.images.size());
    const Units units{to, 0, image, row, channels};
    for (int64_t n = block.images.begin; n < block.images.end; n++) {
      for (int64_t h = block.rows.begin; h < block.rows.end; h++, to += row) {
        const char* from = dy_.at(n, h, block.columns.begin) + out_.begin * size_of(dy_.dtype);
        if (kernels_.pair == 1) {
          kernels_.load_pixels(to, channels, from, dy_.w, dy_.dtype, width, channels);
        } else {
          kernels_.zip_panels(to, channels, channels, 0, reinterpret_cast<const uint16_t*>(from), dy_.w, 0,
                              block.columns.size(), width, channels);
        }
      }
    }
    return units;
  }

  // x of the block: [panels, images, input rows, input columns, panel], every step-th column; where it is, if that is
  // in units, one panel suffices, and a vector that begins in a pixel ends in the image.
  Units input_pixels(const Block& block) {
    const Range rows = input_range(h_, block.rows), columns = input_range(w_, block.columns);
    if (x_.dtype == Dtype::f32 && in_ <= kernels_.panel && w_.kernel == 1 && h_.kernel == 1) {
      const int64_t after = (w_.inputs - columns.end) * x_.w;  // floats of the same row
      if (after >= kernels_.panel || in_ % kernels_.lanes == 0) {
        const char* first = x_.at(block.images.begin, rows.begin, columns.begin);
        return {reinterpret_cast<const float*>(first), 0, x_.n, x_.h, x_.w * column_step()};
      }
    }
    const int64_t width = ceil_div(columns.size(), column_step());
    Units units = input_memory(block, width);
    float* to = x_memory_.data();
    for (int64_t n = block.images.begin; n < block.images.end; n++) {
      for (int64_t h = rows.begin; h < rows.end; h++, to += units.h) {
        kernels_.load_panels(to, units.panel, x_.at(n, h, columns.begin), x_.w * column_step(), x_.dtype, width, in_);
      }
    }
    return units;
  }

  // The x that column kw of the kernel meets: [panels, images, input rows, pairs of output columns, panel]
  Units input_pairs(const Block& block, int64_t kw) {
    const Range rows = input_range(h_, block.rows), valid = inside(w_, kw, block.columns);
    const int64_t width = ceil_div(block.columns.size(), 2);
    const int64_t first = block.columns.begin * w_.stride - w_.padding + kw * w_.dilation;
    Units units = input_memory(block, width);
    float* to = x_memory_.data();
    for (int64_t n = block.images.begin; n < block.images.end; n++) {
      for (int64_t h = rows.begin; h < rows.end; h++, to += units.h) {
        kernels_.zip_panels(to, kernels_.panel, kernels_.panel, units.panel,
                            reinterpret_cast<const uint16_t*>(x_.at(n, h, first)), x_.w * w_.stride,
                            valid.begin - block.columns.begin, valid.end - block.columns.begin, width, in_);
      }
    }
    return units;
  }

  // The rows of some images, those of several only where they are evenly spaced.
  static Prefetch fetching(const Image& image, Range images, Range rows, Range columns, int64_t height,
                           int64_t channels) {
    if (images.size() > 1 && image.n != height * image.h) return {};
    return {image.at(images.begin, rows.begin, columns.begin), (images.size() - 1) * height + rows.size(),
            image.h * size_of(image.dtype), ((columns.size() - 1) * image.w + channels) * size_of(image.dtype)};
  }

  Units input_memory(const Block& block, int64_t width) {
    const int64_t row = width * kernels_.panel, image = row * input_range(h_, block.rows).size();
    const int64_t panel = image * block.images.size();
    return {x_memory_.at_least(panel * ceil_div(in_, kernels_.panel)), panel, image, row, kernels_.panel};
  }

  // All rows of column kw of the kernel, panel i.
  void add_taps(const Block& block, const Units& dy, const Units& x, int64_t kw, int64_t i) {
    // Columns of outputs (or pairs of them), and the column of x that the first of them meets.
    Range columns{0, ceil_div(block.columns.size(), 2)};
    int64_t x_column = 0, x_step = x.w;
    if (kernels_.pair == 1) {
      const Range valid = inside(w_, kw, block.columns);
      columns = {valid.begin - block.columns.begin, valid.end - block.columns.begin};
      x_column = (valid.begin * w_.stride - w_.padding + kw * w_.dilation - input_range(w_, block.columns).begin) /
                 column_step();
      x_step = x.w * w_.stride / column_step();
    }
    if (columns.size() <= 0) return;
    for (int64_t kh = 0; kh < h_.kernel; kh++) {
      const Range valid = inside(h_, kh, block.rows);
      if (valid.size() <= 0) continue;
      const int64_t x_row = valid.begin * h_.stride - h_.padding + kh * h_.dilation - input_range(h_, block.rows).begin;
      const float* a = dy.data + (valid.begin - block.rows.begin) * dy.h + columns.begin * dy.w;
      float* c = dweight_.data + kh * dweight_.h + kw * dweight_.w + i + out_.begin * dweight_.out;
      OuterTile tile{};
      tile.b = x.data + i / kernels_.panel * x.panel + x_row * x.h + x_column * x.w;
      tile.images = block.images.size(), tile.rows = valid.size(), tile.pixels = columns.size();
      tile.a_image = dy.n, tile.a_row = dy.h, tile.a_pixel = dy.w;
      tile.b_image = x.n, tile.b_row = x.h * h_.stride, tile.b_pixel = x_step;
      tile.c_row = dweight_.out;
      tile.columns = std::min<int64_t>(kernels_.panel, in_ - i);
      tile.a = a;
      tile.c = c;
      tile.channels = out_.size();
      next_dy_.fetch(dy_lines_);
      next_x_.fetch(x_lines_);
      kernels_.outer(tile);
    }
  }

  const Kernels& kernels_;
  const ConvAxis h_, w_;
  const Image dy_, x_;
  const int64_t in_;
  const Range out_;
  const WeightGrad dweight_;
  Scratch dy_memory_, x_memory_;
  Prefetch next_dy_, next_x_;
  int64_t dy_lines_ = 0, x_lines_ = 0;  // of a call
};

// Few input channels would fill little of a panel: here the panels are those of dy, and the rows of a tile are the
// channels of the kernel's whole row, which are adjacent in a padded copy of x.
void few_channels(const Kernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w, const Image& dy,
                  int64_t out, const Image& x, int64_t in, const WeightGrad& dweight) {
  const int64_t units = ceil_div(in, kernels.pair), channels = units * kernels.pair;  // of a pixel of the copy
  const int64_t row = w.kernel * channels, pixels = ceil_div(w.outputs, kernels.pair), panel = kernels.panel;
  const int64_t panels = ceil_div(out, panel), size = h.kernel * row * out;
  const int64_t height = std::min<int64_t>(h.outputs, ceil_div(256, w.outputs));  // of a block of outputs
  const int64_t down = ceil_div(h.outputs, height), blocks = batch * down;
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), blocks);
  std::vector<float> sums(parts * size);  // [parts, KH, row, out]
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Band band{0,          1, (height - 1) * h.stride + (h.kernel - 1) * h.dilation + 1,
              -w.padding, 1, w.inputs + 2 * w.padding,
              units};
    const int64_t dy_panel = height * pixels * panel;
    const bool zipped = kernels.pair == 2;
    const Buffer band_memory(band.units()), zipped_memory(zipped ? band.rows * pixels * row : 0);
    const Buffer dy_memory(panels * dy_panel);
    for (int64_t part = begin; part < end; part++) {
      const Range mine = Range{0, blocks}.part(part, parts);
      for (int64_t b = mine.begin; b < mine.end; b++) {
        const int64_t n = b / down, first = b % down * height, rows = std::min(height, h.outputs - first);
        band.first_row = first * h.stride - h.padding;
        load_band(kernels, band_memory.data(), band, x, n, h.inputs, w.inputs, in);
        for (int64_t r = 0; r < rows; r++) {
          float* to = dy_memory.data() + r * pixels * panel;
          const char* from = dy.at(n, first + r, 0);
          if (zipped) {
            kernels.zip_panels(to, panel, panel, dy_panel, reinterpret_cast<const uint16_t*>(from), dy.w, 0, w.outputs,
                               pixels, out);
          } else {
            kernels.load_panels(to, dy_panel, from, dy.w, dy.dtype, pixels, out);
          }
        }
        for (int64_t r = 0; zipped && r < band.rows; r++) {
          kernels.zip_panels(zipped_memory.data() + r * pixels * row, row, row, 0,
                             reinterpret_cast<const uint16_t*>(band_memory.data() + r * band.row()),
                             w.stride * channels, 0, w.outputs, pixels, row);
        }
        const int64_t a_row = zipped ? pixels * row : band.row();
        for (int64_t kh = 0; kh < h.kernel; kh++) {
          OuterTile tile{};
          tile.a = (zipped ? zipped_memory.data() : band_memory.data()) + kh * h.dilation * a_row;
          tile.images = 1, tile.rows = rows, tile.pixels = pixels;
          tile.a_row = a_row * h.stride, tile.a_pixel = zipped ? row : w.stride * units;
          tile.b_row = pixels * panel, tile.b_pixel = panel;
          tile.c_row = out;
          tile.channels = row;
          for (int64_t p = 0; p < panels; p++) {
            tile.b = dy_memory.data() + p * dy_panel;
            tile.c = sums.data() + part * size + kh * row * out + p * panel;
            tile.columns = std::min(panel, out - p * panel);
            kernels.outer(tile);
          }
        }
      }
    }
  });
  for (int64_t o = 0; o < out; o++) {
    for (int64_t kh = 0; kh < h.kernel; kh++) {
      for (int64_t kw = 0; kw < w.kernel; kw++) {
        float* to = dweight.data + o * dweight.out + kh * dweight.h + kw * dweight.w;
        for (int64_t i = 0; i < in; i++) {
          const float* from = sums.data() + (kh * row + kw * channels + i) * out + o;
          float total = from[0];
          for (int64_t p = 1; p < parts; p++) total += from[p * size];
          to[i * dweight.in] += total;
        }
      }
    }
  }
}

// One row of all pixels, for 1x1 kernels on images whose pixels are evenly spaced in memory.
void flatten(int64_t& batch, ConvAxis& h, ConvAxis& w, const Image& dy, const Image& x) {
  for (const ConvAxis* axis : {&h, &w}) {
    if (axis->kernel != 1 || axis->stride != 1 || axis->padding != 0) return;
  }
  for (const Image* image : {&dy, &x}) {
    if ((h.outputs > 1 && image->h != w.outputs * image->w) ||
        (batch > 1 && image->n != h.outputs * w.outputs * image->w)) {
      return;
    }
  }
  w.inputs = w.outputs = batch * h.outputs * w.outputs;
  h.inputs = h.outputs = batch = 1;
}

}  // namespace

void conv_weight_grad(const Kernels& kernels, int64_t batch, const ConvAxis& h_axis, const ConvAxis& w_axis,
                      const Image& dy, int64_t out, const Image& x, int64_t in, const WeightGrad& dweight) {
  if (w_axis.kernel > 1 && w_axis.dilation == 1 && in <= 4) {
    return few_channels(kernels, batch, h_axis, w_axis, dy, out, x, in, dweight);
  }
  if (winograd_weight_grad(kernels, batch, h_axis, w_axis, dy, out, x, in, dweight)) return;
  ConvAxis h = h_axis, w = w_axis;
  flatten(batch, h, w, dy, x);
  const int64_t size = out * h.kernel * w.kernel * in, threads = at::get_num_threads();
  const int64_t out_parts = size <= 64 * 1024 ? 1 : std::min(threads, ceil_div(out, 2 * kernels.max_rows));
  const Blocks blocks(batch, h.outputs, w.outputs, std::clamp<int64_t>(64 * 1024 * out_parts / out, 192, 512));
  const int64_t pixel_parts = std::min(threads / out_parts, blocks.count());

  const PartialSums sums(pixel_parts, h.kernel, w.kernel, out, in, dweight);
  at::parallel_for(0, out_parts * pixel_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      const int64_t p = part % pixel_parts;
      const Range channels = Range{0, out}.part(part / pixel_parts, out_parts, kernels.max_rows);
      Sum sum(kernels, h, w, dy, x, in, channels, sums.of(p, channels));
      const Range mine = Range{0, blocks.count()}.part(p, pixel_parts);
      for (int64_t b = mine.begin; b < mine.end; b++) sum.add(blocks[b], blocks[std::min(b + 1, mine.end - 1)]);
    }
  });
  sums.add();
}

}  // namespace gradaug::cpu

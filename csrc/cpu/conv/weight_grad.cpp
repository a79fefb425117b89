// Weight gradient of a convolution, a matrix product that sums over pixels:
// 1. threads share the output channels of a large weight, and the pixels of a small one (each then has its own sum);
// 2. a thread takes blocks of a few hundred pixels, of which it copies what it cannot read in place to adjacent memory,
//    x in panels of up to 32 channels; the next block is fetched from memory meanwhile.
//    bfloat16 units are pairs of the same pixel of two images, so that a tap shifts pairs as it shifts pixels;
// 3. for each panel and tap, tiles of up to 14 output channels sum the block in registers, over those pixels that the
//    tap finds inside the image, and are added to the gradient;
// 4. where threads shared the pixels, their sums are added in the order of the threads.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "cpu/conv/input_band.h"
#include "cpu/conv/partial_sums.h"
#include "cpu/conv/strided_rows.h"

namespace gradaug::cpu {
namespace {

// What stays in the second-level cache while a block is summed: of pairs dy, which every panel of x meets; of floats,
// which are twice as many bytes, also x, and the next block of both. Fitted to Zen 5.
constexpr int64_t kPairUnits = 64 * 1024, kFloatUnits = 80 * 1024;
constexpr int64_t kMinPixels = 400, kMaxPixels = 800;  // of a block: each reads and writes the whole gradient

// Those outputs of `range` whose input at `tap` is inside the image.
Range inside(const ConvAxis& axis, int64_t tap, Range range) {
  const int64_t shift = axis.padding - tap * axis.dilation;  // input = stride * output - shift
  const int64_t first = shift > 0 ? ceil_div(shift, axis.stride) : 0;
  const int64_t last = axis.inputs - 1 + shift;  // stride * output <= last
  return {std::max(range.begin, first), std::min(range.end, last < 0 ? 0 : last / axis.stride + 1)};
}

// Images (or pairs of them), rows and columns of outputs that a thread sums over before it touches the gradient.
struct Block {
  Range images, rows, columns;
};

struct Blocks {
  int64_t batch, height, width;
  int64_t images, rows, columns;  // of a block

  Blocks(int64_t batch, int64_t height, int64_t width, int64_t pixels) : batch(batch), height(height), width(width) {
    columns = std::min(width, pixels);
    columns = ceil_div(width, ceil_div(width, columns));
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

// The width of the panels that few channels are copied into.
int64_t stored_panel(const Kernels& kernels, int64_t channels) {
  return channels <= kernels.lanes ? kernels.lanes : kernels.panel;
}

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

// `pixels` of a row of image n, or of images 2n and 2n + 1 where units are pairs of them, from channel `begin` on, in
// panels of `width` channels.
void load_row(const Kernels& kernels, int64_t batch, float* to, int64_t to_pixel, int64_t width, int64_t to_panel,
              const Image& image, int64_t n, int64_t h, int64_t w, int64_t step, int64_t pixels, int64_t begin,
              int64_t channels) {
  const auto at = [&](int64_t i) { return image.at(i, h, w) + begin * size_of(image.dtype); };
  if (kernels.pair == 2) {
    const char* second = 2 * n + 1 < batch ? at(2 * n + 1) : nullptr;
    kernels.zip_panels(to, to_pixel, width, to_panel, reinterpret_cast<const uint16_t*>(at(2 * n)),
                       reinterpret_cast<const uint16_t*>(second), image.w * step, pixels, channels);
  } else if (width == kernels.panel) {
    kernels.load_panels(to, to_panel, at(n), image.w * step, image.dtype, pixels, channels);
  } else {
    kernels.load_pixels(to, to_pixel, at(n), image.w * step, image.dtype, pixels, channels);
  }
}

// The sum of one thread: output channels `out`, pixels of `blocks`, added to dweight.
class Sum {
 public:
  Sum(const Kernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w, const Image& dy, const Image& x,
      int64_t in, Range out, const WeightGrad& dweight)
      : kernels_(kernels), batch_(batch), h_(h), w_(w), dy_(dy), x_(x), in_(in), out_(out), dweight_(dweight) {}

  // next: the block after this one, whose memory is fetched meanwhile.
  void add(const Block& block, const Block& next) {
    const Units dy = outputs(block), x = inputs(block);
    next_dy_ = fetching(dy_, next.images, next.rows, next.columns, h_.outputs, out_.size());
    next_x_ = fetching(x_, next.images, input_range(h_, next.rows, 1), input_range(w_, next.columns, column_step()),
                       h_.inputs, in_);
    const int64_t products = ceil_div(in_, kernels_.panel) * w_.kernel * h_.kernel;
    // A single product would have everything fetched at once, before anything is computed.
    row_parts_ = products == 1 ? ceil_div(out_.size(), kernels_.max_rows) : 1;
    const int64_t calls = products * row_parts_;
    dy_lines_ = ceil_div(next_dy_.lines(), calls), x_lines_ = ceil_div(next_x_.lines(), calls);
    for (int64_t i = 0; i < in_; i += kernels_.panel) {
      for (int64_t kw = 0; kw < w_.kernel; kw++) add_taps(block, dy, x, kw, i);
    }
  }

 private:
  // The inputs that some outputs need, whatever the tap; only every step-th of them is read, from the first on.
  static Range input_range(const ConvAxis& axis, Range outputs, int64_t step) {
    const int64_t begin = outputs.begin * axis.stride - axis.padding;
    const int64_t first = begin < 0 ? begin + ceil_div(-begin, step) * step : begin;
    const int64_t last = (outputs.end - 1) * axis.stride - axis.padding + (axis.kernel - 1) * axis.dilation;
    return {first, std::max(first, std::min(axis.inputs, last + 1))};
  }

  // A kernel of one column reads only every stride-th column of x.
  int64_t column_step() const { return w_.kernel == 1 ? w_.stride : 1; }

  // dy of the block: [images, rows, columns, out]; where it is, if that is in units.
  Units outputs(const Block& block) {
    if (kernels_.pair == 1 && dy_.dtype == Dtype::f32) {
      const char* first = dy_.at(block.images.begin, block.rows.begin, block.columns.begin);
      return {reinterpret_cast<const float*>(first) + out_.begin, 0, dy_.n, dy_.h, dy_.w};
    }
    const int64_t channels = out_.size(), width = block.columns.size();
    const int64_t row = width * channels, image = row * block.rows.size();
    float* to = dy_memory_.at_least(image * block.images.size());
    const Units units{to, 0, image, row, channels};
    for (int64_t n = block.images.begin; n < block.images.end; n++) {
      for (int64_t h = block.rows.begin; h < block.rows.end; h++, to += row) {
        load_row(kernels_, batch_, to, channels, channels, 0, dy_, n, h, block.columns.begin, 1, width, out_.begin,
                 channels);
      }
    }
    return units;
  }

  // x of the block: [panels, images, input rows, input columns, panel], every step-th column; where it is, if that is
  // in units, one tap reads it, and a vector that begins in a pixel ends in the image.
  Units inputs(const Block& block) {
    const Range rows = input_range(h_, block.rows, 1), columns = input_range(w_, block.columns, column_step());
    if (kernels_.pair == 1 && x_.dtype == Dtype::f32 && w_.kernel == 1 && h_.kernel == 1) {
      const int64_t after = (w_.inputs - columns.end) * x_.w;  // floats of the same row
      if (after >= kernels_.panel || in_ % kernels_.lanes == 0) {
        const char* first = x_.at(block.images.begin, rows.begin, columns.begin);
        return {reinterpret_cast<const float*>(first), kernels_.panel, x_.n, x_.h, x_.w * column_step()};
      }
    }
    const int64_t width = ceil_div(columns.size(), column_step()), panel = stored_panel(kernels_, in_);
    const int64_t row = width * panel, image = row * rows.size(), size = image * block.images.size();
    float* to = x_memory_.at_least(size * ceil_div(in_, panel));
    const Units units{to, size, image, row, panel};
    for (int64_t n = block.images.begin; n < block.images.end; n++) {
      for (int64_t h = rows.begin; h < rows.end; h++, to += row) {
        load_row(kernels_, batch_, to, panel, panel, size, x_, n, h, columns.begin, column_step(), width, 0, in_);
      }
    }
    return units;
  }

  // The rows of some images, those of several only where they are evenly spaced.
  Prefetch fetching(const Image& image, Range images, Range rows, Range columns, int64_t height,
                    int64_t channels) const {
    images = {images.begin * kernels_.pair, std::min(images.end * kernels_.pair, batch_)};
    const int64_t bytes = ((columns.size() - 1) * image.w + channels) * size_of(image.dtype);
    if (images.size() == 1 || image.n == height * image.h) {
      const int64_t count = (images.size() - 1) * height + rows.size();
      return {image.at(images.begin, rows.begin, columns.begin), count, image.h * size_of(image.dtype), bytes};
    }
    if (rows.size() > 1) return {};
    return {image.at(images.begin, rows.begin, columns.begin), images.size(), image.n * size_of(image.dtype), bytes};
  }

  // All rows of column kw of the kernel, panel i.
  void add_taps(const Block& block, const Units& dy, const Units& x, int64_t kw, int64_t i) {
    const Range columns = inside(w_, kw, block.columns);
    if (columns.size() <= 0) return;
    const int64_t x_column = (columns.begin * w_.stride - w_.padding + kw * w_.dilation -
                              input_range(w_, block.columns, column_step()).begin) /
                             column_step();
    for (int64_t kh = 0; kh < h_.kernel; kh++) {
      const Range rows = inside(h_, kh, block.rows);
      if (rows.size() <= 0) continue;
      const int64_t x_row =
          rows.begin * h_.stride - h_.padding + kh * h_.dilation - input_range(h_, block.rows, 1).begin;
      OuterTile tile{};
      tile.a = dy.data + (rows.begin - block.rows.begin) * dy.h + (columns.begin - block.columns.begin) * dy.w;
      tile.b = x.data + i / kernels_.panel * x.panel + x_row * x.h + x_column * x.w;
      tile.images = block.images.size(), tile.rows = rows.size(), tile.pixels = columns.size();
      tile.a_image = dy.n, tile.a_row = dy.h, tile.a_pixel = dy.w;
      tile.b_image = x.n, tile.b_row = x.h * h_.stride, tile.b_pixel = x.w * w_.stride / column_step();
      tile.c = dweight_.data + kh * dweight_.h + kw * dweight_.w + i + out_.begin * dweight_.out;
      tile.c_row = dweight_.out;
      tile.columns = std::min<int64_t>(kernels_.panel, in_ - i);
      for (int64_t part = 0; part < row_parts_; part++) {
        tile.channels = Range{0, out_.size()}.part(part, row_parts_).size();
        next_dy_.fetch(dy_lines_);
        next_x_.fetch(x_lines_);
        kernels_.outer(tile);
        tile.a += tile.channels;
        tile.c += tile.channels * tile.c_row;
      }
    }
  }

  const Kernels& kernels_;
  const int64_t batch_;
  const ConvAxis h_, w_;
  const Image dy_, x_;
  const int64_t in_;
  const Range out_;
  const WeightGrad dweight_;
  Scratch dy_memory_, x_memory_;
  Prefetch next_dy_, next_x_;
  int64_t row_parts_ = 1, dy_lines_ = 0, x_lines_ = 0;  // of a call of the kernel
};

// Few input channels would fill little of a panel: here the panels are those of dy, and the rows of a tile are the
// channels of the kernel's whole row, which are adjacent in a padded copy of x.
void few_channels(const Kernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w, const Image& dy,
                  int64_t out, const Image& x, int64_t in, const WeightGrad& dweight) {
  const int64_t row = w.kernel * in, panel = stored_panel(kernels, out), panels = ceil_div(out, panel);
  const bool in_units = kernels.pair == 1 && dy.dtype == Dtype::f32, whole_vectors = out % kernels.lanes == 0;
  const int64_t height = std::min<int64_t>(h.outputs, ceil_div(256, w.outputs));  // of a block of outputs
  const int64_t down = ceil_div(h.outputs, height), blocks = ceil_div(batch, kernels.pair) * down;
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), blocks), size = h.kernel * row * out;
  std::vector<float> sums(parts * size);  // [parts, KH, row, out]
  // The rows of dy and x, of one image or two, that a block adds to those of the block before it.
  const auto rows_of_block = [&](int64_t b) {
    const int64_t n = b / down * kernels.pair, first = b % down * height, rows = std::min(height, h.outputs - first);
    const auto of_image = [](const Image& image, int64_t n, int64_t first, int64_t count, int64_t width) {
      const int64_t size = size_of(image.dtype);
      return Prefetch(image.at(n, first, 0), count, image.h * size, width * image.w * size);
    };
    const int64_t x_first = std::min(first * h.stride, h.inputs - 1);
    const int64_t x_rows = std::min(rows * h.stride, h.inputs - x_first);
    std::array<Prefetch, 4> found;
    for (int64_t i = 0; i < kernels.pair && n + i < batch; i++) {
      found[2 * i] = of_image(dy, n + i, first, rows, w.outputs);
      found[2 * i + 1] = of_image(x, n + i, x_first, x_rows, w.inputs);
    }
    return found;
  };
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Band band{0, 1, (height - 1) * h.stride + (h.kernel - 1) * h.dilation + 1, -w.padding, 1, w.inputs + 2 * w.padding,
              in};
    const int64_t dy_row = w.outputs * panel, dy_panel = height * dy_row;
    const Buffer band_memory(band.units()), dy_memory(in_units && whole_vectors ? 0 : panels * dy_panel);
    for (int64_t part = begin; part < end; part++) {
      const Range mine = Range{0, blocks}.part(part, parts);
      for (int64_t b = mine.begin; b < mine.end; b++) {
        const int64_t n = b / down, first = b % down * height, rows = std::min(height, h.outputs - first);
        // The last vector of a block may end beyond its last pixel, but not beyond the image.
        const int64_t after = (h.outputs - first - rows) * dy.h;
        const bool copied = !in_units || (!whole_vectors && after < kernels.lanes);
        const auto next = b + 1 < mine.end ? rows_of_block(b + 1) : std::array<Prefetch, 4>{};
        auto fetching = next;
        band.first_row = first * h.stride - h.padding;
        fill_band(band_memory.data(), band, h.inputs, w.inputs, [&](float* to, int64_t r, int64_t c, int64_t count) {
          const bool one_run = x.w == in;
          const int64_t pixels = one_run ? 1 : count, channels = one_run ? count * in : in;
          load_row(kernels, batch, to, channels, channels, 0, x, n, r, c, 1, pixels, 0, channels);
        });
        for (int64_t r = 0; copied && r < rows; r++) {
          load_row(kernels, batch, dy_memory.data() + r * dy_row, panel, panel, dy_panel, dy, n, first + r, 0, 1,
                   w.outputs, 0, out);
        }
        for (int64_t kh = 0; kh < h.kernel; kh++) {
          OuterTile tile{};
          tile.a = band_memory.data() + kh * h.dilation * band.row();
          tile.images = 1, tile.rows = rows, tile.pixels = w.outputs;
          tile.a_row = band.row() * h.stride, tile.a_pixel = w.stride * in;
          tile.b_row = copied ? dy_row : dy.h, tile.b_pixel = copied ? panel : dy.w;
          tile.c_row = out;
          tile.channels = row;
          for (int64_t p = 0; p < panels; p++) {
            tile.b = copied ? dy_memory.data() + p * dy_panel
                            : reinterpret_cast<const float*>(dy.at(n, first, 0)) + p * panel;
            tile.c = sums.data() + part * size + kh * row * out + p * panel;
            tile.columns = std::min(panel, out - p * panel);
            for (size_t i = 0; i < next.size(); i++) fetching[i].fetch(ceil_div(next[i].lines(), h.kernel * panels));
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
          const float* from = sums.data() + (kh * row + kw * in + i) * out + o;
          float total = from[0];
          for (int64_t p = 1; p < parts; p++) total += from[p * size];
          to[i * dweight.in] += total;
        }
      }
    }
  }
}

// Whether the kernel is 1x1 and reads every pixel: dy and x then play the same part.
bool reads_pixels_once(const ConvAxis& h, const ConvAxis& w) {
  const auto once = [](const ConvAxis& axis) { return axis.kernel == 1 && axis.stride == 1 && axis.padding == 0; };
  return once(h) && once(w);
}

// Whether a product has fewer empty lanes with `out` in its columns and `in` in its rows, and is small enough for its
// sums to be transposed.
bool fills_panels_better(const Kernels& kernels, int64_t out, int64_t in) {
  const auto padded = [&](int64_t columns) { return ceil_div(columns, kernels.lanes) * kernels.lanes; };
  return 32 * padded(out) * in < 31 * padded(in) * out && out * in <= 64 * 1024;
}

// For 1x1 kernels on images whose pixels are evenly spaced in memory: one row of all pixels, or, where pixels of two
// images are paired, one row of either half of them.
void flatten(int64_t pair, int64_t& batch, ConvAxis& h, ConvAxis& w, Image& dy, Image& x) {
  if (!reads_pixels_once(h, w)) return;
  const auto rows = [&](const Image& image) { return evenly_spaced(image, batch, 0, 1, h.outputs, 0, 1, w.outputs); };
  const Rows of_dy = rows(dy), of_x = rows(x);
  if (!of_dy.data || !of_x.data) return;
  const int64_t pixels = batch * h.outputs * w.outputs;
  if (pixels % pair == 0) batch = pair;
  w.inputs = w.outputs = pixels / batch;
  h.inputs = h.outputs = 1;
  const auto image = [&](const Rows& rows, Dtype dtype) {
    return Image{rows.data, dtype, w.outputs * rows.pitch, w.outputs * rows.pitch, rows.pitch};
  };
  dy = image(of_dy, dy.dtype), x = image(of_x, x.dtype);
}

// The pixels that a strided 1x1 kernel reads, in memory of their own: [batch, OH, OW, in].
Image read_pixels(Buffer& memory, int64_t batch, const ConvAxis& h, const ConvAxis& w, const Image& x, int64_t in) {
  const int64_t row = w.outputs * in, size = size_of(x.dtype);
  memory = Buffer(ceil_div(batch * h.outputs * row * size, sizeof(float)));
  Image pixels{memory.data(), x.dtype, h.outputs * row, row, in};
  at::parallel_for(0, batch * h.outputs, ceil_div(32768, row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / h.outputs, q = i % h.outputs;
      for (int64_t p = 0; p < w.outputs; p++) {
        std::memcpy(pixels.at(n, q, p), x.at(n, q * h.stride, p * w.stride), in * size);
      }
    }
  });
  return pixels;
}

}  // namespace

void conv_weight_grad(const Kernels& kernels, int64_t batch, const ConvAxis& h_axis, const ConvAxis& w_axis,
                      const Image& dy_image, int64_t out, const Image& x_image, int64_t in, const WeightGrad& dweight) {
  if (reads_pixels_once(h_axis, w_axis) && fills_panels_better(kernels, out, in)) {
    const WeightGrad transposed{dweight.data, dweight.in, dweight.h, dweight.w, dweight.out};
    return conv_weight_grad(kernels, batch, h_axis, w_axis, x_image, in, dy_image, out, transposed);
  }
  if (w_axis.kernel > 1 && w_axis.dilation == 1 && in <= 4) {
    return few_channels(kernels, batch, h_axis, w_axis, dy_image, out, x_image, in, dweight);
  }
  if (winograd_weight_grad(kernels, batch, h_axis, w_axis, dy_image, out, x_image, in, dweight)) return;
  ConvAxis h = h_axis, w = w_axis;
  Image dy = dy_image, x = x_image;
  Buffer pixels(0);
  if (h.kernel * w.kernel == 1 && h.stride * w.stride > 1 && h.padding + w.padding == 0) {
    x = read_pixels(pixels, batch, h, w, x_image, in);
    h.inputs = h.outputs, w.inputs = w.outputs;
    h.stride = w.stride = 1;
  }
  flatten(kernels.pair, batch, h, w, dy, x);
  const int64_t size = out * h.kernel * w.kernel * in, threads = at::get_num_threads();
  const int64_t out_parts = size <= 64 * 1024 ? 1 : std::min(threads, ceil_div(out, 2 * kernels.max_rows));
  const int64_t outs = ceil_div(out, out_parts);
  const int64_t fits = kernels.pair == 2 ? kPairUnits / outs : kFloatUnits / (in + outs);
  const Blocks blocks(ceil_div(batch, kernels.pair), h.outputs, w.outputs,
                      std::clamp<int64_t>(fits, kMinPixels, kMaxPixels) / kernels.pair);
  const int64_t pixel_parts = std::min(threads / out_parts, blocks.count());

  const PartialSums sums(pixel_parts, h.kernel, w.kernel, out, in, dweight);
  at::parallel_for(0, out_parts * pixel_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      const int64_t p = part % pixel_parts;
      const Range channels = Range{0, out}.part(part / pixel_parts, out_parts, kernels.max_rows);
      Sum sum(kernels, batch, h, w, dy, x, in, channels, sums.of(p, channels));
      const Range mine = Range{0, blocks.count()}.part(p, pixel_parts);
      for (int64_t b = mine.begin; b < mine.end; b++) sum.add(blocks[b], blocks[std::min(b + 1, mine.end - 1)]);
    }
  });
  sums.add();
}

}  // namespace gradaug::cpu

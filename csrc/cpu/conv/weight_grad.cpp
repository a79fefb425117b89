// Weight gradient of a convolution, a matrix product that sums over pixels:
// 1. threads share the output channels of a large weight, and the pixels of a small one (each then has its own sum);
// 2. a thread takes blocks of a few hundred pixels, of which it copies what it cannot read in place to adjacent memory,
//    x in panels of up to 32 channels; the next block is fetched from memory meanwhile.
//    bfloat16 units are pairs of the same pixel of two images, so that a tap shifts pairs as it shifts pixels;
// 3. for each panel and tap, tiles of up to 14 output channels sum the block in registers, over those pixels that the
//    tap finds inside the image, and are added to the gradient;
// 4. where threads shared the pixels, their sums are added in the order of the threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/conv/load_row.h"
#include "cpu/conv/partial_sums.h"
#include "cpu/conv/paths.h"
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
  Sum(const WeightGradProblem& problem, Range out, const WeightGrad& dweight)
      : kernels_(*problem.kernels),
        batch_(problem.batch),
        h_(problem.h),
        w_(problem.w),
        dy_(problem.dy),
        x_(problem.x),
        in_(problem.in),
        out_(out),
        dweight_(dweight) {}

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
  Prefetch fetching(const Images& image, Range images, Range rows, Range columns, int64_t height,
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
  const Images dy_, x_;
  const int64_t in_;
  const Range out_;
  const WeightGrad dweight_;
  Scratch dy_memory_, x_memory_;
  Prefetch next_dy_, next_x_;
  int64_t row_parts_ = 1, dy_lines_ = 0, x_lines_ = 0;  // of a call of the kernel
};

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

// The same with x and dy in each other's place.
WeightGradProblem transposed(const WeightGradProblem& problem) {
  WeightGradProblem other = problem;
  std::swap(other.in, other.out);
  std::swap(other.x, other.dy);
  std::swap(other.dweight.in, other.dweight.out);
  return other;
}

// For 1x1 kernels on images whose pixels are evenly spaced in memory: one row of all pixels, or, where pixels of two
// images are paired, one row of either half of them.
void flatten(WeightGradProblem& p) {
  if (!reads_pixels_once(p.h, p.w)) return;
  const auto rows = [&](const Images& images) {
    return evenly_spaced(images, p.batch, 0, 1, p.h.outputs, 0, 1, p.w.outputs);
  };
  const Rows of_dy = rows(p.dy), of_x = rows(p.x);
  if (!of_dy.data || !of_x.data) return;
  const int64_t pixels = p.batch * p.h.outputs * p.w.outputs;
  if (pixels % p.kernels->pair == 0) p.batch = p.kernels->pair;
  p.w.inputs = p.w.outputs = pixels / p.batch;
  p.h.inputs = p.h.outputs = 1;
  const auto images = [&](const Rows<const char>& rows, Dtype dtype) {
    return Images{rows.data, dtype, p.w.outputs * rows.pitch, p.w.outputs * rows.pitch, rows.pitch};
  };
  p.dy = images(of_dy, p.dy.dtype), p.x = images(of_x, p.x.dtype);
}

// A strided 1x1 kernel without padding as one that reads every pixel, of those in memory of their own:
// [batch, OH, OW, in].
void read_pixels(WeightGradProblem& p, Buffer& memory) {
  ConvAxis &h = p.h, &w = p.w;
  if (h.kernel * w.kernel != 1 || h.stride * w.stride == 1 || h.padding + w.padding != 0) return;
  const int64_t row = w.outputs * p.in, size = size_of(p.x.dtype);
  memory = Buffer(ceil_div(p.batch * h.outputs * row * size, sizeof(float)));
  const MutableImages pixels{reinterpret_cast<char*>(memory.data()), p.x.dtype, h.outputs * row, row, p.in};
  at::parallel_for(0, p.batch * h.outputs, ceil_div(32768, row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / h.outputs, q = i % h.outputs;
      for (int64_t c = 0; c < w.outputs; c++) {
        std::memcpy(pixels.at(n, q, c), p.x.at(n, q * h.stride, c * w.stride), p.in * size);
      }
    }
  });
  p.x = pixels;
  h.inputs = h.outputs, w.inputs = w.outputs;
  h.stride = w.stride = 1;
}

}  // namespace

void weight_grad(const WeightGradProblem& problem) {
  WeightGradProblem p = problem;
  const Kernels& kernels = *p.kernels;
  if (reads_pixels_once(p.h, p.w) && fills_panels_better(kernels, p.out, p.in)) p = transposed(problem);
  Buffer pixels(0);
  read_pixels(p, pixels);
  flatten(p);
  const int64_t size = p.out * p.h.kernel * p.w.kernel * p.in, threads = at::get_num_threads();
  const int64_t out_parts = size <= 64 * 1024 ? 1 : std::min(threads, ceil_div(p.out, 2 * kernels.max_rows));
  const int64_t outs = ceil_div(p.out, out_parts);
  const int64_t fits = kernels.pair == 2 ? kPairUnits / outs : kFloatUnits / (p.in + outs);
  const Blocks blocks(ceil_div(p.batch, kernels.pair), p.h.outputs, p.w.outputs,
                      std::clamp<int64_t>(fits, kMinPixels, kMaxPixels) / kernels.pair);
  const int64_t pixel_parts = std::min(threads / out_parts, blocks.count());

  const PartialSums sums(pixel_parts, p.h.kernel, p.w.kernel, p.out, p.in, p.dweight);
  at::parallel_for(0, out_parts * pixel_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      const int64_t pixel_part = part % pixel_parts;
      const Range channels = Range{0, p.out}.part(part / pixel_parts, out_parts, kernels.max_rows);
      Sum sum(p, channels, sums.of(pixel_part, channels));
      const Range mine = Range{0, blocks.count()}.part(pixel_part, pixel_parts);
      for (int64_t b = mine.begin; b < mine.end; b++) sum.add(blocks[b], blocks[std::min(b + 1, mine.end - 1)]);
    }
  });
  sums.add();
}

}  // namespace gradaug::cpu

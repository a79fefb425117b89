// Depthwise convolution and convolution in small groups, on the kernels of microkernels/depthwise_table.h:
// 1. the weight is converted once to [vectors of channels, tap, rotation, lanes] float32: it is small;
// 2. a task takes rows of one image and some vectors of channels, and goes down the rows. The input rows under one row
//    of outputs are kept in the nearest caches as padded float32 columns, each copied once;
// 3. forward and input gradient: a row of outputs is summed over its taps in registers and stored once. Taps outside
//    the image are left out above and below, and meet zeros to the left and right;
// 4. weight gradient: a row of dy is multiplied with all taps at once. Sums of up to 64 pixels are added to those of a
//    band of rows, these to a part of the images; parts, whose number does not depend on the threads, are added in
//    their order.
#include "cpu/conv/depthwise.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <iterator>

namespace gradaug::cpu {
namespace {

constexpr int64_t kRingFloats = 16 * 1024;  // 64 KiB of input rows
constexpr int64_t kMaxVectors = 8;          // of channels in a ring: small images then stay in 32 KiB
constexpr int64_t kBandBytes = 128 * 1024;  // of x and y: neighbouring channels find shared cache lines again
constexpr int64_t kChunkPixels = 64;        // summed in one float32 at a time
constexpr int64_t kMaxParts = 32;           // of a weight gradient

// ---- rows of an image as columns

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
  void start(const Image& x, int64_t width, int64_t n, int64_t first, int64_t channels, int64_t row) {
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
  Image x_{};
  int64_t width_ = 0, n_ = 0, channel_ = 0, channels_ = 0, next_ = 0;
};

// How many of `vectors` a ring holds, each in so many floats.
int64_t vectors_of_a_ring(int64_t floats, int64_t vectors) {
  return std::clamp<int64_t>(kRingFloats / std::max<int64_t>(floats, 1), 1, std::min(vectors, kMaxVectors));
}

// ---- weights

// to [tap, j, lanes]: the weights that the input channels of a vector, from channel `first` on, meet on their way to
// the output channel j places before them in the group. For the input gradient, dy is the input and dx the output.
template <typename T>
void pack(float* to, const GroupedWeight& weight, int64_t first, int64_t channels, int64_t taps_h, int64_t taps_w,
          int64_t group, int64_t lanes, bool input_grad) {
  std::memset(to, 0, taps_h * taps_w * group * lanes * sizeof(float));
  for (int64_t c = first, lane = 0; c < std::min(channels, first + lanes); c++, lane++) {
    const int64_t in = c % group;
    for (int64_t j = 0; j < group; j++) {
      const int64_t out = (in - j + group) % group;
      const T* from = static_cast<const T*>(weight.data) +
                      (input_grad ? c * weight.out + out * weight.in : (c - in + out) * weight.out + in * weight.in);
      for (int64_t h = 0; h < taps_h; h++) {
        for (int64_t w = 0; w < taps_w; w++) {
          to[((h * taps_w + w) * group + j) * lanes + lane] = from[h * weight.h + w * weight.w];
        }
      }
    }
  }
}

// [vectors, tap, j, lanes]
Buffer packed(const GroupedWeight& weight, int64_t channels, int64_t taps_h, int64_t taps_w, int64_t group,
              int64_t lanes, bool input_grad) {
  const auto pack_as = weight.dtype == Dtype::f32    ? pack<float>
                       : weight.dtype == Dtype::bf16 ? pack<c10::BFloat16>
                                                     : pack<c10::Half>;
  const int64_t vectors = ceil_div(channels, lanes), size = taps_h * taps_w * group * lanes;
  Buffer buffer(vectors * size);
  at::parallel_for(0, vectors, std::max<int64_t>(1, 16384 / size), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v++) {
      pack_as(buffer.data() + v * size, weight, v * lanes, channels, taps_h, taps_w, group, lanes, input_grad);
    }
  });
  return buffer;
}

// ---- forward and input gradient

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

// A row of outputs: the phase that it belongs to, and the inputs it meets.
struct OutputRow {
  const GatherAxis* axis;
  int64_t q;
  InputRows inputs;
};

std::vector<OutputRow> output_rows(const std::vector<GatherAxis>& phases, int64_t height) {
  std::vector<OutputRow> rows;
  for (int64_t row = 0; row < height; row++) {
    const auto axis = std::find_if(phases.begin(), phases.end(),
                                   [&](const GatherAxis& phase) { return row % phase.spacing == phase.first; });
    const int64_t q = row / axis->spacing;
    rows.push_back({&*axis, q, InputRows(*axis, q)});
  }
  return rows;
}

// How many rows a task takes of images whose channels are shared by `tasks` of them; x_row and y_row in bytes.
int64_t band_rows(int64_t batch, int64_t height, int64_t x_row, int64_t y_row, int64_t slots, int64_t tasks) {
  int64_t rows = std::max(kBandBytes / std::max<int64_t>(x_row + y_row, 1), 4 * slots);
  // Fewer where threads would be idle, but not so few that most rows are loaded by two tasks.
  rows = std::min(rows, std::max(ceil_div(batch * tasks * height, 2 * at::get_num_threads()), 2 * slots));
  rows = std::clamp<int64_t>(rows, 1, height);
  return ceil_div(height, ceil_div(height, rows));
}

// y[first + spacing * q] = bias + sum over taps of x[step * q + offset[tap]] weight[tap]; the phases cover all of y.
void gather(const DepthwiseKernels& kernels, int64_t batch, const std::vector<GatherAxis>& h,
            const std::vector<GatherAxis>& w, const Image& x, const Buffer& weight, int64_t taps_h, int64_t taps_w,
            const float* bias, const Image& y, int64_t height, int64_t channels, int group) {
  const int64_t lanes = kernels.lanes, vectors = ceil_div(channels, lanes), tap_floats = group * lanes;
  const Columns columns(lanes, w);
  const std::vector<OutputRow> outputs = output_rows(h, height);
  int64_t slots = 1, loaded = -1;
  for (const OutputRow& output : outputs) {
    if (output.inputs.empty()) continue;
    loaded = std::max(loaded, output.inputs.last);
    slots = std::max(slots, loaded - output.inputs.first + 1);
  }
  std::vector<std::vector<int64_t>> column_offset;  // [phases][taps]
  std::vector<int64_t> run;                         // [phases], taps of a row where all are adjacent, otherwise 1
  for (const GatherAxis& axis : w) {
    std::vector<int64_t> offsets;
    for (const int64_t offset : axis.offset) offsets.push_back(columns.at(offset));
    run.push_back(columns.adjacent(axis) ? axis.tap.size() : 1);
    column_offset.push_back(offsets);
  }
  const int64_t vector_block = vectors_of_a_ring(slots * columns.vector(), vectors);
  const int64_t blocks = ceil_div(vectors, vector_block), block_channels = vector_block * lanes;
  const int64_t rows = band_rows(batch, height, columns.count * block_channels * size_of(x.dtype),
                                 columns.count * block_channels * size_of(y.dtype), slots, blocks);
  const int64_t bands = ceil_div(height, rows);

  at::parallel_for(0, batch * bands * blocks, 1, [&](int64_t begin, int64_t end) {
    Ring ring(kernels, columns, slots, vector_block);
    std::vector<int64_t> x_offset(taps_h * taps_w), weight_offset(taps_h * taps_w);
    for (int64_t task = begin; task < end; task++) {
      const int64_t n = task / blocks / bands, first_row = task / blocks % bands * rows, block = task % blocks;
      const int64_t last_row = std::min(height, first_row + rows), first = block * block_channels;
      const int64_t count = std::min(block_channels, channels - first);
      int64_t first_input = h[0].inputs;
      for (int64_t row = first_row; row < last_row; row++) {
        const InputRows& inputs = outputs[row].inputs;
        if (!inputs.empty()) first_input = std::min(first_input, inputs.first);
      }
      ring.start(x, w[0].inputs, n, first, count, first_input);

      for (int64_t row = first_row; row < last_row; row++) {
        const auto& [row_axis, q, inputs] = outputs[row];
        ring.load_to(inputs.last);
        for (size_t i = 0; i < w.size(); i++) {
          const GatherAxis& axis = w[i];
          if (axis.outputs == 0) continue;
          DepthwiseRow tile{};
          for (int64_t th = inputs.tap; th < inputs.tap_end; th++) {
            const int64_t from = ring.row(q * row_axis->step + row_axis->offset[th]);
            for (size_t tw = 0; tw < axis.tap.size(); tw++, tile.taps++) {
              x_offset[tile.taps] = from + column_offset[i][tw];
              weight_offset[tile.taps] = (row_axis->tap[th] * taps_w + axis.tap[tw]) * tap_floats;
            }
          }
          tile.x = ring.data();
          tile.x_vector = columns.vector();
          tile.x_offset = x_offset.data();
          tile.run = run[i];
          tile.weight_vector = taps_h * taps_w * tap_floats;
          tile.weight = weight.data() + block * vector_block * tile.weight_vector;
          tile.weight_offset = weight_offset.data();
          tile.bias = bias ? bias + first : nullptr;
          tile.y = const_cast<char*>(y.at(n, row, axis.first)) + first * size_of(y.dtype);
          tile.y_pixel = y.w * axis.spacing;
          tile.pixels = axis.outputs;
          tile.channels = count;
          kernels.row(tile, group, y.dtype);
        }
      }
    }
  });
}

}  // namespace

void depthwise_forward(const DepthwiseKernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w,
                       const Image& x, const GroupedWeight& weight, const float* bias, const Image& y, int64_t channels,
                       int group) {
  std::vector<float> whole_bias(bias ? ceil_div(channels, kernels.lanes) * kernels.lanes : 0);
  if (bias) std::copy(bias, bias + channels, whole_bias.begin());
  const Buffer factors = packed(weight, channels, h.kernel, w.kernel, group, kernels.lanes, /*input_grad=*/false);
  gather(kernels, batch, {forward_gather(h)}, {forward_gather(w)}, x, factors, h.kernel, w.kernel,
         bias ? whole_bias.data() : nullptr, y, h.outputs, channels, group);
}

void depthwise_input_grad(const DepthwiseKernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w,
                          const Image& dy, const GroupedWeight& weight, const Image& dx, int64_t channels, int group) {
  const Buffer factors = packed(weight, channels, h.kernel, w.kernel, group, kernels.lanes, /*input_grad=*/true);
  gather(kernels, batch, input_grad_gathers(h), input_grad_gathers(w), dy, factors, h.kernel, w.kernel, nullptr, dx,
         h.inputs, channels, group);
}

// ---- weight gradient

namespace {

// Adds the sums of images and rows to a partial gradient [vectors, KH, KW, group, lanes].
class WeightSum {
 public:
  WeightSum(const DepthwiseKernels& kernels, const ConvAxis& h, const ConvAxis& w, const Image& dy, const Image& x,
            int64_t channels, int group)
      : kernels_(kernels),
        dy_(dy),
        x_(x),
        w_(w),
        rows_(forward_gather(h)),
        across_(forward_gather(w)),
        channels_(channels),
        group_(group),
        columns_(kernels.lanes, {across_}),
        slots_(std::min((h.kernel - 1) * h.dilation + 1, h.inputs)),
        tap_(group * kernels.lanes),
        vector_(h.kernel * w.kernel * tap_) {
    const int64_t vectors = ceil_div(channels, kernels.lanes);
    block_ = vectors_of_a_ring(slots_ * columns_.vector(), vectors);
    for (const int64_t offset : across_.offset) column_offset_.push_back(columns_.at(offset));
  }

  int64_t block() const { return block_; }    // vectors that are summed at once
  int64_t vector() const { return vector_; }  // floats of a vector's sums
  int64_t slots() const { return slots_; }
  const Columns& columns() const { return columns_; }

  // Memory of a thread.
  struct Scratch {
    explicit Scratch(const WeightSum& sum)
        : ring(sum.kernels_, sum.columns_, sum.slots_, sum.block_),
          dy(sum.block_ * sum.group_ * sum.w_.outputs * sum.kernels_.lanes),
          sums(sum.block_ * sum.vector_) {}
    Ring ring;
    Buffer dy, sums;
  };

  // partial [block, KH, KW, group, lanes] += rows [first, last) of image n, channels from vector `v` on.
  void add(Scratch& scratch, int64_t n, int64_t first, int64_t last, int64_t v, float* partial) const {
    const int64_t lanes = kernels_.lanes, channel = v * lanes;
    const int64_t channels = std::min(block_ * lanes, channels_ - channel), vectors = ceil_div(channels, lanes);
    const bool in_place = dy_.dtype == Dtype::f32 && group_ == 1 && channels % lanes == 0;
    std::vector<int64_t> row_offset(rows_.tap.size());
    DepthwiseOuterRow tile{};
    tile.x_vector = columns_.vector();
    tile.row_offset = row_offset.data();
    tile.column_offset = column_offset_.data();
    tile.columns = w_.kernel;
    tile.adjacent = columns_.adjacent(across_);
    tile.dy_rotation = w_.outputs * lanes;
    tile.dy_vector = in_place ? lanes : group_ * tile.dy_rotation;
    tile.dy_pixel = in_place ? dy_.w : lanes;
    tile.vectors = vectors;
    tile.sum_vector = vector_;
    std::memset(scratch.sums.data(), 0, vectors * vector_ * sizeof(float));
    // With dilation a later row of outputs may meet an earlier row of inputs.
    int64_t first_input = rows_.inputs;
    for (int64_t q = first; q < last; q++) {
      const InputRows inputs(rows_, q);
      if (!inputs.empty()) first_input = std::min(first_input, inputs.first);
    }
    scratch.ring.start(x_, w_.inputs, n, channel, channels, first_input);
    for (int64_t q = first; q < last; q++) {
      const InputRows inputs(rows_, q);
      if (inputs.empty()) continue;
      scratch.ring.load_to(inputs.last);
      tile.rows = inputs.tap_end - inputs.tap;
      for (int64_t r = 0; r < tile.rows; r++) {
        row_offset[r] = scratch.ring.row(q * rows_.step + rows_.offset[inputs.tap + r]);
      }
      const char* dy = dy_.at(n, q, 0) + channel * size_of(dy_.dtype);
      if (!in_place) {
        kernels_.load(scratch.dy.data(), tile.dy_vector, dy, dy_.w, dy_.h, dy_.dtype, w_.outputs, channels);
        for (int64_t i = 0; i < vectors; i++) {
          kernels_.rotate(scratch.dy.data() + i * tile.dy_vector, tile.dy_rotation, w_.outputs, group_);
        }
        dy = reinterpret_cast<const char*>(scratch.dy.data());
      }
      tile.sum = scratch.sums.data() + inputs.tap * w_.kernel * tap_;
      const int64_t chunks = ceil_div(w_.outputs, kChunkPixels);
      for (int64_t i = 0; i < chunks; i++) {
        const int64_t p = w_.outputs * i / chunks;
        tile.pixels = w_.outputs * (i + 1) / chunks - p;
        tile.x = scratch.ring.data() + p * lanes;
        tile.dy = reinterpret_cast<const float*>(dy) + p * tile.dy_pixel;
        kernels_.outer(tile, group_);
      }
    }
    for (int64_t i = 0; i < vectors * vector_; i++) partial[i] += scratch.sums.data()[i];
  }

 private:
  const DepthwiseKernels& kernels_;
  const Image dy_, x_;
  const ConvAxis w_;
  const GatherAxis rows_, across_;
  const int64_t channels_;
  const int group_;
  const Columns columns_;
  const int64_t slots_, tap_, vector_;
  int64_t block_;
  std::vector<int64_t> column_offset_;
};

}  // namespace

void depthwise_weight_grad(const DepthwiseKernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w,
                           const Image& dy, const Image& x, int64_t channels, int group, const WeightGrad& dweight) {
  const WeightSum sum(kernels, h, w, dy, x, channels, group);
  const int64_t lanes = kernels.lanes, vectors = ceil_div(channels, lanes), size = vectors * sum.vector();
  const int64_t column_bytes = sum.block() * lanes * (size_of(x.dtype) * h.stride + size_of(dy.dtype));
  int64_t rows = std::max(kBandBytes / (sum.columns().count * column_bytes), 4 * sum.slots());
  rows = ceil_div(h.outputs, ceil_div(h.outputs, std::min(rows, h.outputs)));
  const int64_t bands = ceil_div(h.outputs, rows), parts = std::min(batch * bands, kMaxParts);
  // Channels are shared out where there are too few parts.
  const int64_t blocks = ceil_div(vectors, sum.block());
  const int64_t shares = std::min(blocks, ceil_div(2 * at::get_num_threads(), parts));

  const Buffer partial(parts * size);  // [parts, vectors, KH, KW, group, lanes]
  at::parallel_for(0, parts * shares, 1, [&](int64_t begin, int64_t end) {
    WeightSum::Scratch scratch(sum);
    for (int64_t task = begin; task < end; task++) {
      const int64_t part = task / shares, share = task % shares;
      const int64_t first = blocks * share / shares * sum.block();
      const int64_t last = std::min(blocks * (share + 1) / shares * sum.block(), vectors);
      float* own = partial.data() + part * size;
      std::memset(own + first * sum.vector(), 0, (last - first) * sum.vector() * sizeof(float));
      for (int64_t i = batch * bands * part / parts; i < batch * bands * (part + 1) / parts; i++) {
        const int64_t n = i / bands, row = i % bands * rows;
        for (int64_t v = first; v < last; v += sum.block()) {
          sum.add(scratch, n, row, std::min(h.outputs, row + rows), v, own + v * sum.vector());
        }
      }
    }
  });
  at::parallel_for(0, vectors, std::max<int64_t>(1, 32768 / (parts * sum.vector())), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v++) {
      float* total = partial.data() + v * sum.vector();
      for (int64_t part = 1; part < parts; part++) {
        const float* from = total + part * size;
        for (int64_t i = 0; i < sum.vector(); i++) total[i] += from[i];
      }
      for (int64_t c = v * lanes; c < std::min(channels, (v + 1) * lanes); c++, total++) {
        const int64_t in = c % group;
        for (int64_t j = 0; j < group; j++) {
          // dy was rotated: input channel c met the output channel j places after it.
          float* to = dweight.data + (c - in + (in + j) % group) * dweight.out + in * dweight.in;
          for (int64_t kh = 0; kh < h.kernel; kh++) {
            for (int64_t kw = 0; kw < w.kernel; kw++) {
              to[kh * dweight.h + kw * dweight.w] += total[((kh * w.kernel + kw) * group + j) * lanes];
            }
          }
        }
      }
    }
  });
}

}  // namespace gradaug::cpu

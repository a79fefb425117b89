// Weight gradient of depthwise convolutions and of those in small groups (depthwise.h).
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/conv/depthwise.h"
#include "cpu/conv/paths.h"

namespace gradaug::cpu {
namespace {

constexpr int64_t kChunkPixels = 64;  // summed in one float32 at a time
constexpr int64_t kMaxParts = 32;     // of the images

// Adds the sums of images and rows to a partial gradient [vectors, KH, KW, group, lanes].
class WeightSum {
 public:
  explicit WeightSum(const WeightGradProblem& problem)
      : kernels_(*problem.depthwise_kernels),
        dy_(problem.dy),
        x_(problem.x),
        w_(problem.w),
        rows_(forward_gather(problem.h)),
        across_(forward_gather(problem.w)),
        channels_(problem.in),
        group_(static_cast<int>(problem.in / problem.groups)),
        columns_(kernels_.lanes, {across_}),
        slots_(std::min((problem.h.kernel - 1) * problem.h.dilation + 1, problem.h.inputs)),
        tap_(group_ * kernels_.lanes),
        vector_(problem.h.kernel * problem.w.kernel * tap_),
        block_(vectors_of_a_ring(slots_ * columns_.vector(), ceil_div(channels_, kernels_.lanes))) {
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

  // partial [block, KH, KW, group, lanes] += rows of image n, channels from vector `v` on.
  void add(Scratch& scratch, int64_t n, Range rows, int64_t v, float* partial) const {
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
    scratch.ring.start(x_, w_.inputs, n, channel, channels, first_input(rows));
    for (int64_t q = rows.begin; q < rows.end; q++) {
      const InputRows inputs(rows_, q);
      if (inputs.empty()) continue;
      scratch.ring.load_to(inputs.last);
      tile.rows = inputs.tap_end - inputs.tap;
      for (int64_t r = 0; r < tile.rows; r++) {
        row_offset[r] = scratch.ring.row(q * rows_.step + rows_.offset[inputs.tap + r]);
      }
      tile.sum = scratch.sums.data() + inputs.tap * w_.kernel * tap_;
      add_row(scratch, tile, in_place ? floats_of(n, q, channel) : rotated(scratch, tile, n, q, channel, channels));
    }
    for (int64_t i = 0; i < vectors * vector_; i++) partial[i] += scratch.sums.data()[i];
  }

 private:
  // With dilation a later row of outputs may meet an earlier row of inputs.
  int64_t first_input(Range rows) const {
    int64_t first = rows_.inputs;
    for (int64_t q = rows.begin; q < rows.end; q++) {
      const InputRows inputs(rows_, q);
      if (!inputs.empty()) first = std::min(first, inputs.first);
    }
    return first;
  }

  const float* floats_of(int64_t n, int64_t q, int64_t channel) const {
    return reinterpret_cast<const float*>(dy_.at(n, q, 0)) + channel;
  }

  // Row q of dy as floats, with its rotations.
  const float* rotated(const Scratch& scratch, const DepthwiseOuterRow& tile, int64_t n, int64_t q, int64_t channel,
                       int64_t channels) const {
    float* to = scratch.dy.data();
    kernels_.load(to, tile.dy_vector, dy_.at(n, q, 0) + channel * size_of(dy_.dtype), dy_.w, dy_.h, dy_.dtype,
                  w_.outputs, channels);
    for (int64_t i = 0; i < tile.vectors; i++) {
      kernels_.rotate(to + i * tile.dy_vector, tile.dy_rotation, w_.outputs, group_);
    }
    return to;
  }

  void add_row(const Scratch& scratch, DepthwiseOuterRow tile, const float* dy) const {
    const int64_t chunks = ceil_div(w_.outputs, kChunkPixels);
    for (int64_t i = 0; i < chunks; i++) {
      const int64_t p = w_.outputs * i / chunks;
      tile.pixels = w_.outputs * (i + 1) / chunks - p;
      tile.x = scratch.ring.data() + p * kernels_.lanes;
      tile.dy = dy + p * tile.dy_pixel;
      kernels_.outer(tile, group_);
    }
  }

  const DepthwiseKernels& kernels_;
  const Images dy_, x_;
  const ConvAxis w_;
  const GatherAxis rows_, across_;
  const int64_t channels_;
  const int group_;
  const Columns columns_;
  const int64_t slots_, tap_, vector_, block_;
  std::vector<int64_t> column_offset_;
};

// Adds the parts in their order, and the total to the gradient.
void add_parts(const WeightGradProblem& p, const WeightSum& sum, float* partial, int64_t parts) {
  const int64_t lanes = p.depthwise_kernels->lanes, group = p.in / p.groups;
  const int64_t vectors = ceil_div(p.in, lanes), size = vectors * sum.vector();
  const WeightGrad& dweight = p.dweight;
  at::parallel_for(0, vectors, std::max<int64_t>(1, 32768 / (parts * sum.vector())), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v++) {
      float* total = partial + v * sum.vector();
      for (int64_t part = 1; part < parts; part++) {
        const float* from = total + part * size;
        for (int64_t i = 0; i < sum.vector(); i++) total[i] += from[i];
      }
      for (int64_t c = v * lanes; c < std::min(p.in, (v + 1) * lanes); c++, total++) {
        const int64_t in = c % group;
        for (int64_t j = 0; j < group; j++) {
          // dy was rotated: input channel c met the output channel j places after it.
          float* to = dweight.data + (c - in + (in + j) % group) * dweight.out + in * dweight.in;
          for (int64_t kh = 0; kh < p.h.kernel; kh++) {
            for (int64_t kw = 0; kw < p.w.kernel; kw++) {
              to[kh * dweight.h + kw * dweight.w] += total[((kh * p.w.kernel + kw) * group + j) * lanes];
            }
          }
        }
      }
    }
  });
}

}  // namespace

void depthwise_weight_grad(const WeightGradProblem& p) {
  const WeightSum sum(p);
  const int64_t lanes = p.depthwise_kernels->lanes, vectors = ceil_div(p.in, lanes), size = vectors * sum.vector();
  const int64_t column_bytes = sum.block() * lanes * (size_of(p.x.dtype) * p.h.stride + size_of(p.dy.dtype));
  int64_t rows = std::max(kBandBytes / (sum.columns().count * column_bytes), 4 * sum.slots());
  rows = ceil_div(p.h.outputs, ceil_div(p.h.outputs, std::min(rows, p.h.outputs)));
  const int64_t bands = ceil_div(p.h.outputs, rows), parts = std::min(p.batch * bands, kMaxParts);
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
      for (int64_t i = p.batch * bands * part / parts; i < p.batch * bands * (part + 1) / parts; i++) {
        const int64_t n = i / bands, row = i % bands * rows;
        for (int64_t v = first; v < last; v += sum.block()) {
          sum.add(scratch, n, {row, std::min(p.h.outputs, row + rows)}, v, own + v * sum.vector());
        }
      }
    }
  });
  add_parts(p, sum, partial.data(), parts);
}

}  // namespace gradaug::cpu

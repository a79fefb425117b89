// Forward and input gradient of depthwise convolutions and of those in small groups (depthwise.h).
#include "cpu/conv/depthwise.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>

#include "cpu/conv/paths.h"

namespace gradaug::cpu {
namespace {

// to [tap, j, lanes]: the weights that the input channels of a vector, from channel `first` on, meet on their way to
// the output channel j places before them in the group. For the input gradient, dy is the input and dx the output.
template <typename T>
void pack(float* to, const Weight& weight, int64_t first, int64_t channels, int64_t taps_h, int64_t taps_w,
          int64_t group, int64_t lanes, bool input_grad) {
  std::memset(to, 0, taps_h * taps_w * group * lanes * sizeof(float));
  for (int64_t c = first, lane = 0; c < std::min(channels, first + lanes); c++, lane++) {
    const int64_t in = c % group;
    for (int64_t j = 0; j < group; j++) {
      const int64_t out = (in - j + group) % group;
      const T* from = reinterpret_cast<const T*>(weight.data) +
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
Buffer packed(const Weight& weight, int64_t channels, int64_t taps_h, int64_t taps_w, int64_t group, int64_t lanes,
              bool input_grad) {
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

// All phases of a problem, which cover y.
class Gather {
 public:
  explicit Gather(const GatherProblem& problem)
      : problem_(problem),
        kernels_(*problem.depthwise_kernels),
        group_(static_cast<int>(problem.out / problem.groups)),
        channels_(problem.channels()),
        taps_h_(problem.h.kernel),
        taps_w_(problem.w.kernel),
        height_(problem.input_grad ? problem.h.inputs : problem.h.outputs),
        columns_(kernels_.lanes, problem.w_phases),
        rows_(output_rows(problem.h_phases, height_)),
        weight_(packed(problem.weight, channels_, taps_h_, taps_w_, group_, kernels_.lanes, problem.input_grad)),
        bias_(problem.bias ? round_up(channels_, kernels_.lanes) : 0) {
    if (problem.bias) std::copy(problem.bias, problem.bias + channels_, bias_.begin());
    int64_t loaded = -1;
    for (const OutputRow& row : rows_) {
      if (row.inputs.empty()) continue;
      loaded = std::max(loaded, row.inputs.last);
      slots_ = std::max(slots_, loaded - row.inputs.first + 1);
    }
    for (const GatherAxis& axis : problem.w_phases) {
      std::vector<int64_t> offsets;
      for (const int64_t offset : axis.offset) offsets.push_back(columns_.at(offset));
      run_.push_back(columns_.adjacent(axis) ? axis.tap.size() : 1);
      column_offset_.push_back(offsets);
    }
  }

  void compute() const {
    const int64_t vectors = ceil_div(channels_, kernels_.lanes);
    const int64_t block_vectors = vectors_of_a_ring(slots_ * columns_.vector(), vectors);
    const int64_t blocks = ceil_div(vectors, block_vectors), block_channels = block_vectors * kernels_.lanes;
    const int64_t band = band_rows(problem_.batch, height_, columns_.count * block_channels * size_of(problem_.x.dtype),
                                   columns_.count * block_channels * size_of(problem_.y.dtype), slots_, blocks);
    const int64_t bands = ceil_div(height_, band);
    at::parallel_for(0, problem_.batch * bands * blocks, 1, [&](int64_t begin, int64_t end) {
      Ring ring(kernels_, columns_, slots_, block_vectors);
      Offsets offsets{std::vector<int64_t>(taps_h_ * taps_w_), std::vector<int64_t>(taps_h_ * taps_w_)};
      for (int64_t task = begin; task < end; task++) {
        const int64_t n = task / blocks / bands, first = task % blocks * block_channels;
        const int64_t row = task / blocks % bands * band;
        compute_band(ring, offsets, n, {row, std::min(height_, row + band)},
                     {first, std::min(channels_, first + block_channels)});
      }
    });
  }

 private:
  struct Offsets {
    std::vector<int64_t> x, weight;  // [taps]
  };

  void compute_band(Ring& ring, Offsets& offsets, int64_t n, Range rows, Range channels) const {
    int64_t first_input = problem_.h_phases[0].inputs;
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const InputRows& inputs = rows_[row].inputs;
      if (!inputs.empty()) first_input = std::min(first_input, inputs.first);
    }
    ring.start(problem_.x, problem_.w_phases[0].inputs, n, channels.begin, channels.size(), first_input);
    for (int64_t row = rows.begin; row < rows.end; row++) {
      ring.load_to(rows_[row].inputs.last);
      for (size_t phase = 0; phase < problem_.w_phases.size(); phase++) {
        if (problem_.w_phases[phase].outputs > 0) compute_row(ring, offsets, n, row, phase, channels);
      }
    }
  }

  void compute_row(const Ring& ring, Offsets& offsets, int64_t n, int64_t row, size_t phase, Range channels) const {
    const auto& [row_axis, q, inputs] = rows_[row];
    const GatherAxis& axis = problem_.w_phases[phase];
    const MutableImages& y = problem_.y;
    const int64_t tap_floats = group_ * kernels_.lanes;
    DepthwiseRow tile{};
    for (int64_t th = inputs.tap; th < inputs.tap_end; th++) {
      const int64_t from = ring.row(q * row_axis->step + row_axis->offset[th]);
      for (size_t tw = 0; tw < axis.tap.size(); tw++, tile.taps++) {
        offsets.x[tile.taps] = from + column_offset_[phase][tw];
        offsets.weight[tile.taps] = (row_axis->tap[th] * taps_w_ + axis.tap[tw]) * tap_floats;
      }
    }
    tile.x = ring.data();
    tile.x_vector = columns_.vector();
    tile.x_offset = offsets.x.data();
    tile.run = run_[phase];
    tile.weight_vector = taps_h_ * taps_w_ * tap_floats;
    tile.weight = weight_.data() + channels.begin / kernels_.lanes * tile.weight_vector;
    tile.weight_offset = offsets.weight.data();
    tile.bias = bias_.empty() ? nullptr : bias_.data() + channels.begin;
    tile.y = y.at(n, row, axis.first) + channels.begin * size_of(y.dtype);
    tile.y_pixel = y.w * axis.spacing;
    tile.pixels = axis.outputs;
    tile.channels = channels.size();
    kernels_.row(tile, group_, y.dtype);
  }

  const GatherProblem& problem_;
  const DepthwiseKernels& kernels_;
  const int group_;
  const int64_t channels_, taps_h_, taps_w_, height_;
  const Columns columns_;
  const std::vector<OutputRow> rows_;
  const Buffer weight_;
  std::vector<float> bias_;
  int64_t slots_ = 1;                                // rows of a ring
  std::vector<std::vector<int64_t>> column_offset_;  // [phases][taps]
  std::vector<int64_t> run_;                         // [phases], taps of a row where all are adjacent, otherwise 1
};

}  // namespace

void depthwise_forward(const GatherProblem& problem, const Phase&) { Gather(problem).compute(); }

}  // namespace gradaug::cpu

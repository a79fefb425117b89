#include "cpu/conv/paths.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <mutex>
#include <utility>

#include "cpu/conv/strided_rows.h"

// The constants were fitted: `python -m benchmarks.fit` lists them, and fits any one again.

namespace gradaug::cpu {
namespace {

using Reason = const char*;  // one sentence; null: none

// ---- conditions of several paths

constexpr Reason kFloat64 = "the images are float64";
constexpr Reason kNchw = "the result is NCHW";
constexpr Reason kNoKernels = "this processor lacks AVX2, or PyTorch's own kernels use more of it for the dtype";

// The paths that multiply matrices.
Reason dense_cannot(const ConvProblem& p) {
  if (p.groups != 1) return "the convolution is in groups";
  if (!p.dtype) return kFloat64;
  if (!p.nhwc) return kNchw;
  return p.kernels ? nullptr : kNoKernels;
}

Reason depthwise_cannot(const ConvProblem& p) {
  if (p.groups == 1) return "the convolution is not in groups";
  if (!p.dtype) return kFloat64;
  if (!p.nhwc) return kNchw;
  if (p.in != p.out) return "it has not as many output as input channels";
  if (!p.depthwise_kernels) return kNoKernels;
  const int64_t group = p.in / p.groups;
  const bool fits = std::has_single_bit(static_cast<uint64_t>(group)) && group <= p.depthwise_kernels->max_group;
  return fits ? nullptr : "its groups have not 1, 2, 4, .. channels, or too many of them";
}

constexpr int64_t kMaxStridedKernel = 3;  // of 5x5 the gradients of PyTorch's own take four times as long

// Strided depthwise convolutions of float32 PyTorch's own (oneDNN) computes from the images in place, and so faster
// than the kernels that copy them: forward, and the gradients of small kernels. Nothing but a small weight is sliced.
Reason depthwise_loses(const ConvProblem& p, bool forward) {
  const bool strided = p.dtype == Dtype::f32 && p.groups == p.in && p.w.stride > 1;
  if (!strided || (!forward && p.w.kernel > kMaxStridedKernel)) return nullptr;
  return "PyTorch computes a strided depthwise convolution of float32 from the images in place";
}

// ---- conditions of Winograd's algorithm: products and transforms, in float32 multiplications of matrix products

constexpr double kWeightPlace = 30;    // of transforming one place of a weight
constexpr double kInputPlace = 4;      // one place of a tile of one channel of the inputs,
constexpr double kOutputPlace = 20;    // of the outputs,
constexpr double kGradientPlace = 18;  // or of either for the weight gradient
constexpr double kWin = 0.95;          // of the time of the definition
// bfloat16 products of the definition in the time of one:
constexpr double kPairs = 2.3;  // 2.2 on Zen 4, 2.5 on Zen 5
constexpr double kGradientPairs = 2;
constexpr int64_t kMinDepth = 58;  // channels for tiles of 4x4 in float32: up to 1.9 times PyTorch's error

constexpr Reason kNotWinograd = "the kernel is not 3x3 with stride 1 and dilation 1";
constexpr Reason kFewChannels = "it has fewer channels than a vector";
constexpr Reason kWinogradLoses = "tiles of another size, or the definition, take less time by estimate";

const WinogradKernels& tile(const ConvProblem& p, int outputs) { return *p.float_kernels->winograd[outputs / 2 - 1]; }

// transforms: what those of a tile take beside its products, which take 1.
double winograd_time(const WinogradKernels& tile, int64_t batch, int64_t height, int64_t width, double transforms) {
  const int64_t tiles = batch * ceil_div(height, tile.outputs) * ceil_div(width, tile.outputs);
  return tile.inputs * tile.inputs * (tiles * (1 + transforms) + kWeightPlace);
}

// Whether tiles of `outputs` take the least time, beside the other ones if those are allowed, and the definition, which
// multiplies `pairs` products in the time of one.
bool winograd_pays(const ConvProblem& p, int outputs, bool large_tiles, int64_t height, int64_t width,
                   double transforms, double pairs) {
  const auto time = [&](int m) { return winograd_time(tile(p, m), p.batch, height, width, transforms); };
  const double definition = kWin * 9 * p.batch * height * width / pairs;
  if (outputs == 2) return time(2) < definition && !(large_tiles && time(4) < time(2));
  return time(4) < definition && time(4) < time(2);
}

// Whether three taps read three neighbours, for adjacent outputs.
bool is_dense(const GatherAxis& axis) {
  return axis.tap.size() == 3 && axis.step == 1 && axis.first == 0 && axis.spacing == 1 &&
         axis.offset[1] == axis.offset[0] + 1 && axis.offset[2] == axis.offset[0] + 2;
}

// ---- forward and input gradient, phase by phase

constexpr int64_t kMaxUnits = 1024 * 1024;      // inputs of all pixels, 4 MiB: they stay in the third-level cache
constexpr int64_t kMaxPanelUnits = 160 * 1024;  // and a panel of the weight in the second
// Pixels for each column, where the images are read in place and where they are copied. Fitted to Zen 5.
constexpr double kMaxPixels = 4, kMaxCopied = 1, kMaxCopiedTaps = 0.5;
constexpr double kMaxIdle = 1.12;  // time of all tasks to that of as many columns in full panels
constexpr int64_t kMaxProductRows = 16;

// Input gradients of few rows of bfloat16: PyTorch's own product (oneDNN) reads the weight in place, and takes a tenth
// less than packing it.
Reason product_loses(const GatherProblem& p) {
  const bool few_rows = p.linear && p.input_grad && p.kernels->pair == 2 && p.batch <= kMaxProductRows;
  return few_rows && p.weight.dtype == *p.dtype ? "PyTorch multiplies few rows of bfloat16 with the weight in place"
                                                : nullptr;
}

Reason zeros_cannot(const GatherProblem& p, const Phase& phase) {
  return phase.empty() ? dense_cannot(p) : "its pixels meet taps";
}

void write_zeros(const GatherProblem& p, const Phase& phase) {
  const GatherAxis &h = phase.h, &w = phase.w;
  const int64_t bytes = p.channels() * size_of(p.y.dtype);
  at::parallel_for(0, p.batch * h.outputs, ceil_div(32768, w.outputs * bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      for (int64_t c = 0; c < w.outputs; c++) {
        std::memset(p.y.at(i / h.outputs, h.first + i % h.outputs * h.spacing, w.first + c * w.spacing), 0, bytes);
      }
    }
  });
}

Reason gather_cannot(const GatherProblem& p, const Phase& phase) {
  if (Reason reason = dense_cannot(p)) return reason;
  return phase.empty() ? "its pixels meet no tap" : nullptr;
}

bool allows_large_tiles(const GatherProblem& p) { return p.dtype != Dtype::f32 || p.depth() >= kMinDepth; }

template <int m>
Reason winograd_cannot(const GatherProblem& p, const Phase& phase) {
  if (Reason reason = gather_cannot(p, phase)) return reason;
  if (!is_dense(phase.h) || !is_dense(phase.w)) return kNotWinograd;
  if (std::min(p.in, p.out) < p.float_kernels->lanes) return kFewChannels;
  // The large tiles lose two bits, which shorter sums win back where there is enough to sum.
  return m == 2 || allows_large_tiles(p) ? nullptr : "sums of so few channels in float32 would lose two bits";
}

template <int m>
Reason winograd_loses(const GatherProblem& p, const Phase& phase) {
  const double transforms = kInputPlace / p.channels() + kOutputPlace / p.depth();
  const double pairs = p.kernels->pair == 1 ? 1 : kPairs;
  const bool pays = winograd_pays(p, m, allows_large_tiles(p), phase.h.outputs, phase.w.outputs, transforms, pairs);
  return pays ? nullptr : kWinogradLoses;
}

template <int m>
void winograd(const GatherProblem& p, const Phase& phase) {
  winograd_forward(p, phase, tile(p, m));
}

Reason small_image_loses(const GatherProblem& p, const Phase& phase) {
  if (Reason reason = product_loses(p)) return reason;
  const int64_t pixels = p.batch * phase.h.outputs * phase.w.outputs, taps = phase.h.tap.size() * phase.w.tap.size();
  const int64_t units = taps * ceil_div(p.depth(), p.kernels->pair), columns = p.channels();
  const int64_t panel = p.kernels->panel, threads = at::get_num_threads();
  const int64_t rounds = ceil_div(ceil_div(columns, panel), threads);
  if (pixels * units > kMaxUnits || panel * units > kMaxPanelUnits) {
    return "what its pixels read, or a panel of the weight, does not stay in the caches";
  }
  if (rounds * threads * panel > kMaxIdle * columns) return "threads would be idle: they share its output channels";
  const double most = reads_in_place(p, phase) ? kMaxPixels : taps == 1 ? kMaxCopied : kMaxCopiedTaps;
  return pixels > most * columns ? "it has too many pixels for its output channels" : nullptr;
}

// ---- weight gradient

constexpr int64_t kMaxFirstLayer = 4;  // input channels: few of a panel's lanes

bool allows_large_tiles(const WeightGradProblem& p) { return p.dtype != Dtype::f32; }

Reason first_layer_cannot(const WeightGradProblem& p) {
  if (Reason reason = dense_cannot(p)) return reason;
  return p.w.dilation == 1 ? nullptr : "the taps of a row of the kernel are not neighbours";
}

Reason first_layer_loses(const WeightGradProblem& p) {
  if (p.in > kMaxFirstLayer) return "it has more than 4 input channels";
  return p.w.kernel > 1 ? nullptr : "its kernel has one column";
}

template <int m>
Reason winograd_cannot(const WeightGradProblem& p) {
  if (Reason reason = dense_cannot(p)) return reason;
  for (const ConvAxis* axis : {&p.h, &p.w}) {
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) return kNotWinograd;
  }
  if (p.dweight.in != 1) return "the gradient's input channels are not adjacent";
  if (std::min(p.in, p.out) < p.float_kernels->lanes) return kFewChannels;
  return m == 2 || allows_large_tiles(p) ? nullptr : "sums in float32 would lose two bits";
}

template <int m>
Reason winograd_loses(const WeightGradProblem& p) {
  const double transforms = kGradientPlace / p.in + kGradientPlace / p.out;
  const double pairs = p.kernels->pair == 1 ? 1 : kGradientPairs;
  const bool pays = winograd_pays(p, m, allows_large_tiles(p), p.h.outputs, p.w.outputs, transforms, pairs);
  return pays ? nullptr : kWinogradLoses;
}

template <int m>
void winograd(const WeightGradProblem& p) {
  winograd_weight_grad(p, tile(p, m));
}

Reason gemm_loses(const WeightGradProblem& p) {
  if (!p.linear) return nullptr;
  if (p.is_new) return "PyTorch's product writes a whole new gradient without zeros first";
  return p.dweight_dtype == p.dtype && p.dtype != Dtype::f32
             ? "the kernels sum in float32: a 16-bit buffer would need another of twice its size"
             : nullptr;
}

// ---- the lists

template <class... P>
Reason never(const P&...) {
  return nullptr;
}

template <class... P>
struct Path {
  const char* name;
  Reason (*cannot)(const P&...);
  Reason (*loses)(const P&...);
  void (*run)(const P&...);  // null: PyTorch's own, which is the operator's to call
  bool of_all_phases = false;
};
using GatherPath = Path<GatherProblem, Phase>;
using WeightGradPath = Path<WeightGradProblem>;

const GatherPath kGatherPaths[] = {
    {"depthwise", [](const GatherProblem& p, const Phase&) { return depthwise_cannot(p); },
     [](const GatherProblem& p, const Phase&) { return depthwise_loses(p, !p.input_grad); }, depthwise_forward, true},
    {"zeros", zeros_cannot, never, write_zeros},
    {"winograd_4x4", winograd_cannot<4>, winograd_loses<4>, winograd<4>},
    {"winograd_2x2", winograd_cannot<2>, winograd_loses<2>, winograd<2>},
    {"small_image_gemm", gather_cannot, small_image_loses, small_image_gemm},
    {"implicit_gemm", gather_cannot, [](const GatherProblem& p, const Phase&) { return product_loses(p); },
     implicit_gemm},
    {"torch", never, never, nullptr, true},
};

const WeightGradPath kWeightGradPaths[] = {
    {"depthwise", [](const WeightGradProblem& p) { return depthwise_cannot(p); },
     [](const WeightGradProblem& p) { return depthwise_loses(p, false); }, depthwise_weight_grad},
    {"first_layer", first_layer_cannot, first_layer_loses, first_layer_weight_grad},
    {"winograd_4x4", winograd_cannot<4>, winograd_loses<4>, winograd<4>},
    {"winograd_2x2", winograd_cannot<2>, winograd_loses<2>, winograd<2>},
    {"gemm", [](const WeightGradProblem& p) { return dense_cannot(p); }, gemm_loses, weight_grad},
    {"torch", never, never, nullptr},
};

// ---- the choice

struct Watch {
  std::mutex mutex;
  std::string forced;
  std::vector<std::string> taken;
};
Watch the_watch;
std::atomic<bool> watching = false;

void find_kernels(ConvProblem& p) {
  if (!p.dtype) return;
  if (p.groups == 1) {
    p.kernels = select_kernels(*p.dtype);
    p.float_kernels = select_kernels(Dtype::f32);
  } else {
    p.depthwise_kernels = select_depthwise_kernels(*p.dtype);
  }
}

template <class List, class... P>
const auto& first_that_applies(const List& paths, const P&... problem) {
  const auto* path = paths;
  while (path->cannot(problem...) || path->loses(problem...)) path++;  // the last of each list always applies
  return *path;
}

bool has_no_taps(const GatherProblem&, const Phase& phase) { return phase.empty(); }
bool has_no_taps(const WeightGradProblem&) { return false; }

template <class List, class... P>
const auto& forced_path(const List& paths, const std::string& name, const P&... problem) {
  const auto found =
      std::find_if(std::begin(paths), std::end(paths), [&](const auto& path) { return path.name == name; });
  std::string names;
  for (const auto& path : paths) names += (names.empty() ? "" : ", ") + std::string(path.name);
  TORCH_CHECK_VALUE(found != std::end(paths), "path must be one of ", names, ", got ", name);
  if (has_no_taps(problem...) && !found->of_all_phases) return first_that_applies(paths, problem...);
  const Reason reason = found->cannot(problem...);
  TORCH_CHECK_VALUE(!reason, "path ", name, " must be able to compute the convolution, but ", reason);
  return *found;
}

template <class List, class... P>
const auto& watched(const List& paths, const P&... problem) {
  const std::lock_guard<std::mutex> lock(the_watch.mutex);
  const auto& path = the_watch.forced.empty() ? first_that_applies(paths, problem...)
                                              : forced_path(paths, the_watch.forced, problem...);
  the_watch.taken.push_back(path.name);
  return path;
}

template <class List, class... P>
const auto& choose(const List& paths, const P&... problem) {
  return watching.load(std::memory_order_relaxed) ? watched(paths, problem...) : first_that_applies(paths, problem...);
}

// "rows 0 of 2, columns 1 of 2"; empty where the pixels are all.
std::string pixels_of(const Phase& phase) {
  if (phase.h.spacing * phase.w.spacing == 1) return "";
  const auto axis = [](const GatherAxis& a) { return std::to_string(a.first) + " of " + std::to_string(a.spacing); };
  return "rows " + axis(phase.h) + ", columns " + axis(phase.w);
}

template <class List, class... P>
void add_verdicts(std::vector<Verdict>& verdicts, const std::string& pixels, const List& paths, const P&... problem) {
  for (const auto& path : paths) {
    const Reason cannot = path.cannot(problem...);
    verdicts.push_back({pixels, path.name, cannot, cannot ? nullptr : path.loses(problem...)});
  }
}

}  // namespace

void run(GatherProblem& problem, c10::function_ref<void()> operands, c10::function_ref<void()> torch) {
  find_kernels(problem);
  bool started = false;
  for (const GatherAxis& h : problem.h_phases) {
    for (const GatherAxis& w : problem.w_phases) {
      const Phase phase{h, w};
      const GatherPath& path = choose(kGatherPaths, problem, phase);
      if (!path.run) return torch();
      if (!started) operands(), started = true;
      path.run(problem, phase);
      if (path.of_all_phases) return;
    }
  }
}

void run(WeightGradProblem& problem, c10::function_ref<void()> operands, c10::function_ref<void()> torch) {
  find_kernels(problem);
  const WeightGradPath& path = choose(kWeightGradPaths, problem);
  if (!path.run) return torch();
  operands();
  path.run(problem);
}

std::vector<Verdict> explain(GatherProblem& problem) {
  find_kernels(problem);
  std::vector<Verdict> verdicts;
  for (const GatherAxis& h : problem.h_phases) {
    for (const GatherAxis& w : problem.w_phases) {
      const Phase phase{h, w};
      const bool all = first_that_applies(kGatherPaths, problem, phase).of_all_phases;
      add_verdicts(verdicts, all ? "" : pixels_of(phase), kGatherPaths, problem, phase);
      if (all) return verdicts;
    }
  }
  return verdicts;
}

std::vector<Verdict> explain(WeightGradProblem& problem) {
  find_kernels(problem);
  std::vector<Verdict> verdicts;
  add_verdicts(verdicts, "", kWeightGradPaths, problem);
  return verdicts;
}

void watch(const std::string& forced) {
  const std::lock_guard<std::mutex> lock(the_watch.mutex);
  the_watch.forced = forced;
  the_watch.taken.clear();
  watching = true;
}

std::vector<std::string> unwatch() {
  const std::lock_guard<std::mutex> lock(the_watch.mutex);
  watching = false;
  return std::exchange(the_watch.taken, {});
}

}  // namespace gradaug::cpu

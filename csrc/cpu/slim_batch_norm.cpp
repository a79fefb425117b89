// Batch norm on the CPU. Two walks over an activation, chosen by its memory format (slim_batch_norm_binding.h):
//
//   rows    x is [rows, cols]: channels_last, one row per pixel. Few channels are folded: [M, C] is read as
//           [M / fold, fold * C], so that a row fills vectors.
//   planes  x is [N, C, S]: contiguous, S = H * W.
//
// Both: one pass for the moments (or the gradient's sums), one that applies the per-channel coefficients. A thread
// takes the same part of the activation in both, and in the second begins with what it read last in the first: that is
// still in its cache. Sums are cut by the sizes alone and added in order, so that results do not depend on the number
// of threads. The loops themselves are in norm/rows.h.
#include "slim_batch_norm.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/norm/table.h"
#include "slim_batch_norm_binding.h"

namespace gradaug::batch_norm {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread
constexpr int64_t kMinRows = 64;   // of a part
constexpr int64_t kMaxParts = 16;
constexpr int64_t kMaxFold = 16;

// Memory for n values, not initialised.
template <typename T>
std::unique_ptr<T[]> buffer(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

int64_t power_of_two_below(int64_t n) { return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n))); }

// The sizes of one call. rows: [n * s, c] folded into [rows, cols]; planes: [n, c, s].
struct Sizes {
  int64_t n, c, s, m;  // m = n * s
  int64_t fold, rows, cols;
  int64_t room;  // cols, but at least the kernels' width

  Sizes(const Tensor& x, int64_t width, std::initializer_list<const Tensor*> read_in_place)
      : n(x.size(0)), c(x.size(1)), s(x.size(2) * x.size(3)), m(n * s) {
    bool dense = true;
    for (const Tensor* t : read_in_place) dense = dense && (!t->defined() || row_pitch(*t) == c);
    fold = dense ? best_fold(width) : 1;
    rows = m / fold;
    cols = c * fold;
    room = std::max(cols, width);
  }

  // The least number of rows side by side that fills vectors best; it divides m.
  int64_t best_fold(int64_t width) const {
    int64_t best = 1;
    const auto waste = [&](int64_t f) { return static_cast<double>((f * c + width - 1) / width * width) / (f * c); };
    for (int64_t f = 2; f <= kMaxFold && f * c <= kMaxFold * width; f++) {
      if (m % f == 0 && waste(f) < 0.97 * waste(best)) best = f;
    }
    return best;
  }

  template <typename T>
  Rows<const T> rows_of(const Tensor& t) const {
    if (!t.defined()) return {nullptr, 0};
    return {t.const_data_ptr<T>(), fold == 1 ? row_pitch(t) : cols};
  }
  template <typename T>
  Rows<T> mutable_rows_of(const Tensor& t) const {
    if (!t.defined()) return {nullptr, 0};
    return {t.mutable_data_ptr<T>(), fold == 1 ? row_pitch(t) : cols};
  }
  template <typename T>
  Planes<const T> planes_of(const Tensor& t) const {
    if (!t.defined()) return {nullptr, 0, 0};
    return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
  }
  template <typename T>
  Planes<T> mutable_planes_of(const Tensor& t) const {
    if (!t.defined()) return {nullptr, 0, 0};
    return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1)};
  }
};

// How the rows are cut into tasks: parts of the rows, whose sums are added in order, and, where those are fewer than
// the threads, ranges of columns, which change no sum.
struct RowTasks {
  int64_t rows, cols, parts, ranges, columns;  // columns of a range

  RowTasks(const Sizes& size, int64_t width) : rows(size.rows), cols(size.cols), ranges(1), columns(size.cols) {
    const int64_t worthwhile = std::max<int64_t>(1, rows * cols / kGrain);
    parts = power_of_two_below(std::clamp<int64_t>(std::min(worthwhile, rows / kMinRows), 1, kMaxParts));
    const int64_t wanted = std::min<int64_t>(at::get_num_threads(), worthwhile) / parts;
    if (wanted > 1 && cols >= 4 * width) {
      columns = std::max(2 * width, (cols / wanted + 2 * width - 1) / (2 * width) * (2 * width));
      ranges = (cols + columns - 1) / columns;
      if (cols - (ranges - 1) * columns < width) ranges--;
    }
  }

  // f(part, row, end of rows, col, number of cols, scratch); every thread its tasks in order, or in the opposite one.
  template <typename A, typename F>
  void run(bool reverse, int64_t width, const F& f) const {
    at::parallel_for(0, parts * ranges, 1, [&](int64_t first, int64_t last) {
      const auto scratch = buffer<A>(scratch_size(cols, width));
      for (int64_t done = 0; done < last - first; ++done) {
        const int64_t task = reverse ? last - 1 - done : first + done;
        const int64_t part = task / ranges, range = task % ranges;
        const int64_t col = range * columns, end = range + 1 == ranges ? cols : col + columns;
        f(part, rows * part / parts, rows * (part + 1) / parts, col, end - col, scratch.get());
      }
    });
  }
};

// Planes: the images of every channel are cut into parts, so that few channels still occupy many threads.
int64_t plane_parts(const Sizes& size) {
  const int64_t worthwhile = std::max<int64_t>(1, size.m * size.c / kGrain);
  return std::min(size.n, (std::min(worthwhile, kMaxParts) + size.c - 1) / size.c);
}

// f(part, n, end of n, c, end of c): channels in ranges, one part after the other.
template <typename F>
void for_channels(const Sizes& size, int64_t parts, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain * parts / size.m);
  at::parallel_for(0, size.c * parts, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first, end; i < last; i = end) {  // i is part * C + c
      const int64_t part = i / size.c;
      end = std::min(last, (part + 1) * size.c);
      f(part, size.n * part / parts, size.n * (part + 1) / parts, i - part * size.c, end - part * size.c);
    }
  });
}

// The first `channels` elements of a parameter, `fill` where there is none.
std::vector<double> parameter_values(const std::optional<Tensor>& p, int64_t channels, double fill) {
  std::vector<double> values(channels, fill);
  if (p) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, p->scalar_type(), "slim_batch_norm", [&] {
      const scalar_t* data = p->const_data_ptr<scalar_t>();
      for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<double>(data[c * p->stride(0)]);
    });
  }
  return values;
}

std::vector<double> statistic_values(const Tensor& t) { return parameter_values(t, t.size(0), 0); }

Tensor statistic_tensor(const std::vector<double>& values, const Tensor& x) {
  Tensor t = at::empty({static_cast<int64_t>(values.size())}, x.options().dtype(stats_dtype(x)));
  AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "slim_batch_norm", [&] {
    std::transform(values.begin(), values.end(), t.mutable_data_ptr<scalar_t>(),
                   [](double v) { return static_cast<scalar_t>(v); });
  });
  return t;
}

// The gradient of a full-width parameter: that of its first channels, then zeros. Empty where there is no parameter.
Tensor parameter_gradient(const std::optional<Tensor>& p, const std::vector<double>& grad, const Tensor& mean) {
  if (!p) return at::empty({0}, mean.options());
  Tensor full = at::empty({p->size(0)}, p->options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, p->scalar_type(), "slim_batch_norm_backward", [&] {
    scalar_t* data = full.mutable_data_ptr<scalar_t>();
    for (size_t c = 0; c < grad.size(); ++c) data[c] = static_cast<scalar_t>(static_cast<Acc<scalar_t>>(grad[c]));
    std::fill(data + grad.size(), data + full.size(0), static_cast<scalar_t>(0));
  });
  return full;
}

// Two sums of every column, [parts, 2, cols], and their totals for every channel.
struct PartialSums {
  const Sizes& size;
  int64_t parts;
  std::unique_ptr<double[]> values;

  PartialSums(const Sizes& size, int64_t parts)
      : size(size), parts(parts), values(buffer<double>(parts * 2 * size.room)) {}

  double* of(int64_t part, int which) { return values.get() + (2 * part + which) * size.room; }

  void clear(int64_t part, int64_t col, int64_t cols) {
    for (const int which : {0, 1}) std::fill_n(of(part, which) + col, cols == size.cols ? size.room : cols, 0.0);
  }

  // [C]; part after part, column after column.
  const double* total(int which) {
    double* total = of(0, which);
    for (int64_t part = 1; part < parts; ++part) {
      const double* more = of(part, which);
      for (int64_t col = 0; col < size.cols; ++col) total[col] += more[col];
    }
    for (int64_t i = 1; i < size.fold; ++i) {
      const double* more = total + i * size.c;
      for (int64_t c = 0; c < size.c; ++c) total[c] += more[c];
    }
    return total;
  }
};

// [C] repeated for all columns, zeros up to the size of a vector.
template <typename A>
struct Coefficients {
  const Sizes& size;
  std::unique_ptr<A[]> values;

  Coefficients(const Sizes& size, int count) : size(size), values(buffer<A>(count * size.room)) {}

  A* operator[](int i) { return values.get() + i * size.room; }

  void repeat(int count) {
    for (int i = 0; i < count; ++i) {
      A* of = (*this)[i];
      for (int64_t f = 1; f < size.fold; ++f) std::copy_n(of, size.c, of + f * size.c);
      std::fill(of + size.cols, of + size.room, A(0));
    }
  }
};

// Moments of every channel: mean and biased variance.
template <typename T>
void moments_of(const Tensor& x, const Layout& layout, const Sizes& size, std::vector<double>& mean,
                std::vector<double>& var) {
  const NormKernels<T>& kernel = norm_kernels<T>();
  if (layout.rows) {
    const RowTasks tasks(size, kernel.width);
    const Rows<const T> rows = size.rows_of<T>(x);
    Coefficients<Acc<T>> center(size, 1);
    kernel.row_centers({rows.data, rows.pitch / size.fold}, size.m, size.c, center[0]);
    center.repeat(1);
    PartialSums sums(size, tasks.parts);
    const auto add = [&](int64_t part, int64_t row, int64_t end, int64_t col, int64_t cols, Acc<T>* scratch) {
      sums.clear(part, col, cols);
      kernel.row_moments({rows.at(row, col), rows.pitch}, end - row, cols, center[0] + col, sums.of(part, 0) + col,
                         sums.of(part, 1) + col, scratch);
    };
    tasks.run<Acc<T>>(false, kernel.width, add);
    const double *sum = sums.total(0), *sum_of_squares = sums.total(1);
    for (int64_t c = 0; c < size.c; ++c) {
      const Moments<double> set = push_sums<double>({0, center[0][c], 0}, size.m, sum[c], sum_of_squares[c]);
      mean[c] = set.mean, var[c] = variance(set);
    }
  } else {
    const int64_t parts = plane_parts(size);
    std::vector<PlaneMoments> partial(parts * size.c);  // [parts, C]
    for_channels(size, parts, [&](int64_t part, int64_t n, int64_t n_end, int64_t c, int64_t c_end) {
      kernel.plane_moments(size.planes_of<T>(x), n, n_end, c, c_end, size.s, &partial[part * size.c + c]);
    });
    for (int64_t c = 0; c < size.c; ++c) {
      Moments<double> total{0, 0, 0};
      for (int64_t part = 0; part < parts; ++part) {
        const PlaneMoments& sums = partial[part * size.c + c];
        const int64_t images = size.n * (part + 1) / parts - size.n * part / parts;
        total = merge(total, push_sums<double>({0, sums.center, 0}, static_cast<double>(images * size.s), sums.sum,
                                               sums.sum_of_squares));
      }
      mean[c] = total.mean, var[c] = variance(total);
    }
  }
}

template <typename T>
void normalise_all(const Tensor& x, const Tensor& residual, const Tensor& y, bool relu, const Layout& layout,
                   const Sizes& size, Coefficients<Acc<T>>& coefficients) {
  const NormKernels<T>& kernel = norm_kernels<T>();
  if (layout.rows) {
    coefficients.repeat(3);
    const RowsForward<T> rows{size.rows_of<T>(x), size.rows_of<T>(residual), size.mutable_rows_of<T>(y),
                              coefficients[0],    coefficients[1],           coefficients[2]};
    const auto apply = [&](int64_t, int64_t row, int64_t end, int64_t col, int64_t cols, Acc<T>* scratch) {
      kernel.row_apply(rows.from_column(col), row, end, cols, relu, scratch);
    };
    RowTasks(size, kernel.width).run<Acc<T>>(true, kernel.width, apply);
  } else {
    const PlanesForward<T> planes{size.planes_of<T>(x),
                                  size.planes_of<T>(residual),
                                  size.mutable_planes_of<T>(y),
                                  coefficients[0],
                                  coefficients[1],
                                  coefficients[2]};
    for_channels(size, plane_parts(size), [&](int64_t, int64_t n, int64_t n_end, int64_t c, int64_t c_end) {
      kernel.plane_apply(planes, n, n_end, c, c_end, size.s, relu);
    });
  }
}

// Sums of every channel: sum(dz), sum(dz * (x - center)).
template <typename T>
void gradient_sums(const RowsBackward<T>& rows, const Sizes& size, std::vector<double>& dz, std::vector<double>& dz_x) {
  const NormKernels<T>& kernel = norm_kernels<T>();
  const RowTasks tasks(size, kernel.width);
  PartialSums sums(size, tasks.parts);
  const auto add = [&](int64_t part, int64_t row, int64_t end, int64_t col, int64_t cols, Acc<T>* scratch) {
    sums.clear(part, col, cols);
    kernel.row_gradient_sums(rows.from_column(col), row, end, cols, sums.of(part, 0) + col, sums.of(part, 1) + col,
                             scratch);
  };
  tasks.run<Acc<T>>(false, kernel.width, add);
  std::copy_n(sums.total(0), size.c, dz.begin());
  std::copy_n(sums.total(1), size.c, dz_x.begin());
}

template <typename T>
void gradient_sums(const PlanesBackward<T>& planes, const Sizes& size, std::vector<double>& dz,
                   std::vector<double>& dz_x) {
  const int64_t parts = plane_parts(size);
  std::vector<GradientSums> partial(parts * size.c);  // [parts, C]
  for_channels(size, parts, [&](int64_t part, int64_t n, int64_t n_end, int64_t c, int64_t c_end) {
    norm_kernels<T>().plane_gradient_sums(planes, n, n_end, c, c_end, size.s, &partial[part * size.c + c]);
  });
  for (int64_t i = 0; i < parts * size.c; ++i) {
    dz[i % size.c] += partial[i].dz;
    dz_x[i % size.c] += partial[i].dz_x;
  }
}

template <typename T>
void input_gradients(const RowsBackward<T>& rows, const Sizes& size) {
  const NormKernels<T>& kernel = norm_kernels<T>();
  const auto apply = [&](int64_t, int64_t row, int64_t end, int64_t col, int64_t cols, Acc<T>* scratch) {
    kernel.row_input_gradients(rows.from_column(col), row, end, cols, scratch);
  };
  RowTasks(size, kernel.width).run<Acc<T>>(true, kernel.width, apply);
}

template <typename T>
void input_gradients(const PlanesBackward<T>& planes, const Sizes& size) {
  for_channels(size, plane_parts(size), [&](int64_t, int64_t n, int64_t n_end, int64_t c, int64_t c_end) {
    norm_kernels<T>().plane_input_gradients(planes, n, n_end, c, c_end, size.s);
  });
}

// ---- operators

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& given_mean,
                                           const std::optional<Tensor>& given_var,
                                           const std::optional<Tensor>& residual, bool relu, double eps) {
  check_forward(x, weight, bias, given_mean, given_var, residual, eps);
  const Layout layout(x);
  const int64_t channels = x.size(1);
  Tensor y = layout.empty(x);                                   // [N, C, H, W]
  std::vector<double> mean(channels, 0.0), var(channels, 0.0);  // [C]
  if (given_mean) mean = statistic_values(*given_mean), var = statistic_values(*given_var);
  if (x.numel() > 0) {
    const Tensor x_read = layout.readable(x), residual_read = residual ? layout.readable(*residual) : Tensor();
    const std::vector<double> weights = parameter_values(weight, channels, 1),
                              biases = parameter_values(bias, channels, 0);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "slim_batch_norm", [&] {
      using A = Acc<scalar_t>;
      const Sizes size(x, norm_kernels<scalar_t>().width, {&x_read, &residual_read});
      if (!given_mean) moments_of<scalar_t>(x_read, layout, size, mean, var);
      Coefficients<A> coefficients(size, 3);
      for (int64_t c = 0; c < channels; ++c) {
        const Forward<A> f = forward_coefficients<A>(mean[c], var[c], weights[c], biases[c], eps);
        coefficients[0][c] = f.center, coefficients[1][c] = f.scale, coefficients[2][c] = f.offset;
      }
      normalise_all<scalar_t>(x_read, residual_read, y, relu, layout, size, coefficients);
    });
  }
  return {y, statistic_tensor(mean, x), statistic_tensor(var, x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, const Tensor& mean_tensor,
                                                    const Tensor& var_tensor, bool batch_stats, bool needs_dz,
                                                    double eps) {
  check_backward(dy, x, y, weight, bias, mean_tensor, var_tensor, eps);
  const Layout layout(x);
  const int64_t channels = x.size(1);
  Tensor dx = layout.empty(x);                                           // [N, C, H, W]
  Tensor dz = needs_dz ? layout.empty(x) : at::empty({0}, x.options());  // [N, C, H, W]
  std::vector<double> dweight(channels, 0.0), dbias(channels, 0.0);      // [C]
  if (x.numel() > 0) {
    const Tensor dy_read = layout.readable(dy), x_read = layout.readable(x);
    const Tensor y_read = y ? layout.readable(*y) : Tensor(), dz_written = needs_dz ? dz : Tensor();
    const std::vector<double> mean = statistic_values(mean_tensor), var = statistic_values(var_tensor);
    const std::vector<double> weights = parameter_values(weight, channels, 1);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "slim_batch_norm_backward", [&] {
      using A = Acc<scalar_t>;
      const Sizes size(x, norm_kernels<scalar_t>().width, {&dy_read, &x_read, &y_read});
      Coefficients<A> coefficients(size, 4);
      const auto run = [&](auto activation, auto dz_again) {  // RowsBackward or PlanesBackward
        activation.center = coefficients[0], activation.scale = coefficients[1];
        activation.slope = coefficients[2], activation.offset = coefficients[3];
        std::vector<double> sum_dz_x(channels, 0.0);
        std::transform(mean.begin(), mean.end(), coefficients[0], [](double m) { return static_cast<A>(m); });
        coefficients.repeat(1);
        gradient_sums(activation, size, dbias, sum_dz_x);
        const double inv_m = batch_stats ? 1.0 / static_cast<double>(size.m) : 0.0;
        for (int64_t c = 0; c < channels; ++c) {
          const Backward<A> b =
              backward_coefficients<A>(mean[c], var[c], weights[c], eps, dbias[c], sum_dz_x[c], inv_m);
          coefficients[1][c] = b.scale, coefficients[2][c] = b.slope, coefficients[3][c] = b.offset;
          dweight[c] = weight_gradient(sum_dz_x[c], var[c], eps);
        }
        coefficients.repeat(4);
        if (needs_dz) {  // one stream less to read than dy and y
          activation.dy = dz_again;
          activation.y.data = nullptr;
        }
        input_gradients(activation, size);
      };
      if (layout.rows) {
        run(RowsBackward<scalar_t>{size.rows_of<scalar_t>(dy_read), size.rows_of<scalar_t>(x_read),
                                   size.rows_of<scalar_t>(y_read), size.mutable_rows_of<scalar_t>(dz_written),
                                   size.mutable_rows_of<scalar_t>(dx)},
            size.rows_of<scalar_t>(dz_written));
      } else {
        run(PlanesBackward<scalar_t>{size.planes_of<scalar_t>(dy_read), size.planes_of<scalar_t>(x_read),
                                     size.planes_of<scalar_t>(y_read), size.mutable_planes_of<scalar_t>(dz_written),
                                     size.mutable_planes_of<scalar_t>(dx)},
            size.planes_of<scalar_t>(dz_written));
      }
    });
  }
  return {dx, dz, parameter_gradient(weight, dweight, mean_tensor), parameter_gradient(bias, dbias, mean_tensor)};
}

void record_(Tensor& running_mean, Tensor& running_var, Tensor& num_batches, const Tensor& mean, const Tensor& var,
             int64_t values, std::optional<double> momentum) {
  check_records(running_mean, running_var, num_batches, mean, var, values);
  const int64_t count = ++*num_batches.mutable_data_ptr<int64_t>();
  const double factor = momentum.value_or(1.0 / static_cast<double>(count));
  const double unbiased = static_cast<double>(values) / static_cast<double>(values - 1);
  const auto move = [&](Tensor& running, const Tensor& batch, double scale) {
    const std::vector<double> towards = statistic_values(batch);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, running.scalar_type(), "slim_batch_norm_record_", [&] {
      scalar_t* to = running.mutable_data_ptr<scalar_t>();
      for (const double value : towards) {
        const double from = static_cast<double>(*to);
        *to = static_cast<scalar_t>(from + factor * (scale * value - from));
        to += running.stride(0);
      }
    });
  };
  move(running_mean, mean, 1);
  move(running_var, var, unbiased);
}

}  // namespace
}  // namespace gradaug::batch_norm

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_batch_norm", &gradaug::batch_norm::forward);
  m.impl("slim_batch_norm_backward", &gradaug::batch_norm::backward);
  m.impl("slim_batch_norm_record_", &gradaug::batch_norm::record_);
}

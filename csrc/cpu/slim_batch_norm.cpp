// Batch norm on the CPU. Two walks over an activation, chosen by its memory format (slim_batch_norm_binding.h):
//
//   rows    x is [rows, cols]: channels_last, one row per pixel. A thread takes a range of rows and all their channels.
//           Few channels are folded: [M, C] is read as [M / fold, fold * C], so that a row fills vectors.
//   planes  x is [N, C, S]: contiguous, S = H * W. A task takes one channel and a range of N.
//
// Both: one pass for the moments (or the gradient's sums), one that applies the per-channel coefficients. Arithmetic is
// in A (float; double for double). Rows are summed in A, block by block, and blocks in double; planes in double. The
// order depends only on the sizes and on the number of threads. What is inlined into a Kernel::run is vectorised by the
// compiler, see multiversion.h.
#include "slim_batch_norm.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/multiversion.h"
#include "slim_batch_norm_binding.h"

namespace gradaug::batch_norm {
namespace {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kFirstRows = 8;    // rows whose mean is the first center
constexpr int64_t kGrowth = 4;       // the next block is so many times the rows before it: its center is that good
constexpr int64_t kBlockRows = 128;  // but no more than these rows are summed in A
constexpr int kLane = 32;            // channels of one unrolled step: 64 bytes of bfloat16
constexpr int kUnroll = 4;           // rows of one step, so that accumulators and coefficients are loaded less often
constexpr int64_t kGrain = 32768;    // elements that are worth a thread

// ---- elements in registers; bit arithmetic, because the compiler vectorises it and not c10's conversions

GRADAUG_INLINE float load(const float* p) { return *p; }
GRADAUG_INLINE double load(const double* p) { return *p; }
GRADAUG_INLINE float load(const at::BFloat16* p) { return std::bit_cast<float>(static_cast<uint32_t>(p->x) << 16); }
GRADAUG_INLINE float load(const at::Half* p) { return static_cast<float>(*p); }

GRADAUG_INLINE void store(float* p, float v) { *p = v; }
GRADAUG_INLINE void store(double* p, double v) { *p = v; }
GRADAUG_INLINE void store(at::BFloat16* p, float v) {  // to nearest even
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->x = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}
GRADAUG_INLINE void store(at::Half* p, float v) { *p = at::Half(v); }

// To T and back. The difference of two values of T is exact in A, or nearly so.
template <typename T>
GRADAUG_INLINE Acc<T> rounded(Acc<T> v) {
  T t;
  store(&t, v);
  return load(&t);
}

// ---- rows

template <typename T>
struct Rows {
  T* data;
  int64_t pitch;  // elements from one row to the next

  GRADAUG_INLINE T* at(int64_t row, int64_t col) const { return data + row * pitch + col; }
};

// A row is cut into pieces of L columns; the last one ends at the last column and may overlap the one before it.
// Results are then written twice, and sums have a slot of their own: slots are padded to a multiple of L.
template <int L>
GRADAUG_INLINE int64_t slots(int64_t cols) {
  return (cols + L - 1) / L * L;
}
template <int L>
GRADAUG_INLINE int64_t piece_start(int64_t slot, int64_t cols) {
  return slot + L <= cols ? slot : cols - L;
}
// The slot in which the sums of column c are complete.
template <int L>
GRADAUG_INLINE int64_t slot_of(int64_t c, int64_t cols) {
  return c < cols / L * L ? c : c + slots<L>(cols) - cols;
}

template <typename T>
struct RowMoments {
  using A = Acc<T>;

  // Moments of every column of `rows` > 0 rows. Reads x once; keeps for every column a center near the mean and the
  // sums about it of one block of rows; writes mean, m2 [cols].
  // center [cols]; sum, sum_of_squares [cols + kLane]: scratch.
  static GRADAUG_INLINE void run(Rows<const T> x, int64_t rows, int64_t cols, A* center, A* sum, A* sum_of_squares,
                                 double* mean, double* m2) {
    if (cols >= kLane) {
      moments<kLane>(x, rows, cols, center, sum, sum_of_squares, mean, m2);
    } else {
      moments<1>(x, rows, cols, center, sum, sum_of_squares, mean, m2);
    }
  }

  template <int L>
  static GRADAUG_INLINE void moments(Rows<const T> x, int64_t rows, int64_t cols, A* center, A* sum, A* sum_of_squares,
                                     double* mean, double* m2) {
    const int64_t first = std::min(rows, kFirstRows);
    first_rows(x, first, cols, center, mean, m2);
    for (int64_t begin = first, end; begin < rows; begin = end) {
      end = std::min(rows, begin + std::min(kBlockRows, kGrowth * begin));
      std::fill(sum, sum + slots<L>(cols), A(0));
      std::fill(sum_of_squares, sum_of_squares + slots<L>(cols), A(0));
      int64_t row = begin;
      for (; row + kUnroll <= end; row += kUnroll) add<L, kUnroll>(x, row, cols, center, sum, sum_of_squares);
      for (; row < end; ++row) add<L, 1>(x, row, cols, center, sum, sum_of_squares);
      const int64_t whole = cols / L * L;
      merge_block(0, whole, 0, begin, end, center, sum, sum_of_squares, mean, m2);
      merge_block(whole, cols, slots<L>(cols) - cols, begin, end, center, sum, sum_of_squares, mean, m2);
    }
  }

  // The first center, in double: sums about a single value would lose what it differs from the mean.
  static GRADAUG_INLINE void first_rows(Rows<const T> x, int64_t rows, int64_t cols, A* center, double* mean,
                                        double* m2) {
    const double inverse = 1.0 / static_cast<double>(rows);
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      double sum = 0, sum_of_squares = 0;
      for (int64_t r = 0; r < rows; ++r) sum += load(x.at(r, c));
      sum *= inverse;
      for (int64_t r = 0; r < rows; ++r) {
        const double d = load(x.at(r, c)) - sum;
        sum_of_squares += d * d;
      }
      center[c] = rounded<T>(static_cast<A>(sum));
      mean[c] = sum;
      m2[c] = sum_of_squares;
    }
  }

  template <int L, int R>
  static GRADAUG_INLINE void add(Rows<const T> x, int64_t row, int64_t cols, const A* center, A* sum,
                                 A* sum_of_squares) {
    for (int64_t slot = 0; slot < cols; slot += L) {
      const int64_t c = piece_start<L>(slot, cols);
#pragma omp simd
      for (int i = 0; i < L; ++i) {
        A s = 0, q = 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const A d = load(x.at(row + r, c + i)) - center[c + i];
          s += d;
          q += d * d;
        }
        sum[slot + i] += s;
        sum_of_squares[slot + i] += q;
      }
    }
  }

  // The sums are about center, which is the mean of the rows before this block, rounded.
  static GRADAUG_INLINE void merge_block(int64_t first, int64_t last, int64_t slot_offset, int64_t before,
                                         int64_t after, A* center, const A* sum, const A* sum_of_squares, double* mean,
                                         double* m2) {
    const double count = static_cast<double>(after - before);
#pragma omp simd
    for (int64_t c = first; c < last; ++c) {
      const double shift = static_cast<double>(center[c]) - mean[c];
      const double s = sum[c + slot_offset], q = sum_of_squares[c + slot_offset];
      const Moments<double> set = push_sums<double>({static_cast<double>(before), mean[c], m2[c]}, count,
                                                    s + count * shift, q + shift * (2 * s + count * shift));
      mean[c] = set.mean;
      m2[c] = set.m2;
      center[c] = rounded<T>(static_cast<A>(set.mean));
    }
  }
};

template <typename T, bool kResidual, bool kRelu>
struct RowApply {
  using A = Acc<T>;

  // y = relu?((x - center) * scale + offset + residual?). Reads x (and residual) once, writes y once.
  // center, scale, offset [cols].
  static GRADAUG_INLINE void run(Rows<const T> x, Rows<const T> residual, Rows<T> y, int64_t rows, int64_t cols,
                                 const A* center, const A* scale, const A* offset) {
    if (cols >= kLane) {
      apply<kLane>(x, residual, y, rows, cols, center, scale, offset);
    } else {
      apply<1>(x, residual, y, rows, cols, center, scale, offset);
    }
  }

  template <int L>
  static GRADAUG_INLINE void apply(Rows<const T> x, Rows<const T> residual, Rows<T> y, int64_t rows, int64_t cols,
                                   const A* center, const A* scale, const A* offset) {
    int64_t row = 0;
    for (; row + kUnroll <= rows; row += kUnroll)
      apply_rows<L, kUnroll>(x, residual, y, row, cols, center, scale, offset);
    for (; row < rows; ++row) apply_rows<L, 1>(x, residual, y, row, cols, center, scale, offset);
  }

  template <int L, int R>
  static GRADAUG_INLINE void apply_rows(Rows<const T> x, Rows<const T> residual, Rows<T> y, int64_t row, int64_t cols,
                                        const A* center, const A* scale, const A* offset) {
    for (int64_t slot = 0; slot < cols; slot += L) {
      const int64_t c = piece_start<L>(slot, cols);
#pragma omp simd
      for (int i = 0; i < L; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          A z = normalise(A(load(x.at(row + r, c + i))), center[c + i], scale[c + i], offset[c + i]);
          if constexpr (kResidual) z += load(residual.at(row + r, c + i));
          store(y.at(row + r, c + i), kRelu ? relu(z) : z);
        }
      }
    }
  }
};

template <typename T, bool kRelu, bool kStore>
struct RowGradientSums {
  using A = Acc<T>;

  // sum_dz = sum(dz) and sum_dz_x = sum(dz * (x - center)) of every column, dz = dy or, with a ReLU, dy * (y > 0).
  // Reads dy, x (and y) once; keeps the sums of one block of rows; writes the sums [cols], and dz where asked to.
  // center [cols]; block, block_x [cols + kLane]: scratch.
  static GRADAUG_INLINE void run(Rows<const T> dy, Rows<const T> x, Rows<const T> y, Rows<T> dz, int64_t rows,
                                 int64_t cols, const A* center, A* block, A* block_x, double* sum_dz,
                                 double* sum_dz_x) {
    if (cols >= kLane) {
      sums<kLane>(dy, x, y, dz, rows, cols, center, block, block_x, sum_dz, sum_dz_x);
    } else {
      sums<1>(dy, x, y, dz, rows, cols, center, block, block_x, sum_dz, sum_dz_x);
    }
  }

  template <int L>
  static GRADAUG_INLINE void sums(Rows<const T> dy, Rows<const T> x, Rows<const T> y, Rows<T> dz, int64_t rows,
                                  int64_t cols, const A* center, A* block, A* block_x, double* sum_dz,
                                  double* sum_dz_x) {
    std::fill(sum_dz, sum_dz + cols, 0.0);
    std::fill(sum_dz_x, sum_dz_x + cols, 0.0);
    for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
      const int64_t end = std::min(rows, begin + kBlockRows);
      std::fill(block, block + slots<L>(cols), A(0));
      std::fill(block_x, block_x + slots<L>(cols), A(0));
      int64_t row = begin;
      for (; row + kUnroll <= end; row += kUnroll) add<L, kUnroll>(dy, x, y, dz, row, cols, center, block, block_x);
      for (; row < end; ++row) add<L, 1>(dy, x, y, dz, row, cols, center, block, block_x);
      for (int64_t c = 0; c < cols; ++c) {
        sum_dz[c] += block[slot_of<L>(c, cols)];
        sum_dz_x[c] += block_x[slot_of<L>(c, cols)];
      }
    }
  }

  template <int L, int R>
  static GRADAUG_INLINE void add(Rows<const T> dy, Rows<const T> x, Rows<const T> y, Rows<T> dz, int64_t row,
                                 int64_t cols, const A* center, A* block, A* block_x) {
    for (int64_t slot = 0; slot < cols; slot += L) {
      const int64_t c = piece_start<L>(slot, cols);
#pragma omp simd
      for (int i = 0; i < L; ++i) {
        A s = 0, q = 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          A g = load(dy.at(row + r, c + i));
          if constexpr (kRelu) g = masked(g, A(load(y.at(row + r, c + i))));
          if constexpr (kStore) store(dz.at(row + r, c + i), g);
          s += g;
          q += g * (load(x.at(row + r, c + i)) - center[c + i]);
        }
        block[slot + i] += s;
        block_x[slot + i] += q;
      }
    }
  }
};

template <typename T, bool kRelu>
struct RowInputGradient {
  using A = Acc<T>;

  // dx = (dz - offset - (x - center) * slope) * scale, dz = dy or, with a ReLU, dy * (y > 0).
  // Reads dy, x (and y) once, writes dx once. center, scale, slope, offset [cols].
  static GRADAUG_INLINE void run(Rows<const T> dy, Rows<const T> x, Rows<const T> y, Rows<T> dx, int64_t rows,
                                 int64_t cols, const A* center, const A* scale, const A* slope, const A* offset) {
    if (cols >= kLane) {
      gradient<kLane>(dy, x, y, dx, rows, cols, center, scale, slope, offset);
    } else {
      gradient<1>(dy, x, y, dx, rows, cols, center, scale, slope, offset);
    }
  }

  template <int L>
  static GRADAUG_INLINE void gradient(Rows<const T> dy, Rows<const T> x, Rows<const T> y, Rows<T> dx, int64_t rows,
                                      int64_t cols, const A* center, const A* scale, const A* slope, const A* offset) {
    int64_t row = 0;
    for (; row + kUnroll <= rows; row += kUnroll)
      gradient_rows<L, kUnroll>(dy, x, y, dx, row, cols, center, scale, slope, offset);
    for (; row < rows; ++row) gradient_rows<L, 1>(dy, x, y, dx, row, cols, center, scale, slope, offset);
  }

  template <int L, int R>
  static GRADAUG_INLINE void gradient_rows(Rows<const T> dy, Rows<const T> x, Rows<const T> y, Rows<T> dx, int64_t row,
                                           int64_t cols, const A* center, const A* scale, const A* slope,
                                           const A* offset) {
    for (int64_t slot = 0; slot < cols; slot += L) {
      const int64_t c = piece_start<L>(slot, cols);
#pragma omp simd
      for (int i = 0; i < L; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          A g = load(dy.at(row + r, c + i));
          if constexpr (kRelu) g = masked(g, A(load(y.at(row + r, c + i))));
          store(dx.at(row + r, c + i), input_gradient(g, A(load(x.at(row + r, c + i))), center[c + i], scale[c + i],
                                                      slope[c + i], offset[c + i]));
        }
      }
    }
  }
};

// ---- planes

template <typename T>
struct Planes {
  T* data;
  int64_t stride_n, stride_c;  // elements

  GRADAUG_INLINE T* at(int64_t n, int64_t c) const { return data + n * stride_n + c * stride_c; }
};

template <typename T>
struct PlaneMoments {
  // Moments of channel c of images [begin, end). Reads x once; keeps the sums about the first value, in double; writes
  // *result.
  static GRADAUG_INLINE void run(Planes<const T> x, int64_t begin, int64_t end, int64_t c, int64_t pixels,
                                 Moments<double>* result) {
    const double center = load(x.at(begin, c));
    double sum = 0, sum_of_squares = 0;
    for (int64_t n = begin; n < end; ++n) {
      const T* p = x.at(n, c);
#pragma omp simd reduction(+ : sum, sum_of_squares)
      for (int64_t i = 0; i < pixels; ++i) {
        const double d = load(p + i) - center;
        sum += d;
        sum_of_squares += d * d;
      }
    }
    const double count = static_cast<double>((end - begin) * pixels);
    *result = push_sums<double>({0, center, 0}, count, sum, sum_of_squares);
  }
};

template <typename T, bool kResidual, bool kRelu>
struct PlaneApply {
  using A = Acc<T>;

  // One plane: y = relu?((x - center) * scale + offset + residual?).
  static GRADAUG_INLINE void run(const T* x, const T* residual, T* y, int64_t pixels, const Forward<A>& f) {
    const A center = f.center, scale = f.scale, offset = f.offset;
#pragma omp simd
    for (int64_t i = 0; i < pixels; ++i) {
      A z = normalise(A(load(x + i)), center, scale, offset);
      if constexpr (kResidual) z += load(residual + i);
      store(y + i, kRelu ? relu(z) : z);
    }
  }
};

template <typename T, bool kRelu, bool kStore>
struct PlaneGradientSums {
  using A = Acc<T>;

  // sum(dz) and sum(dz * (x - center)) of channel c of images [begin, end), as RowGradientSums.
  static GRADAUG_INLINE void run(Planes<const T> dy, Planes<const T> x, Planes<const T> y, Planes<T> dz, int64_t begin,
                                 int64_t end, int64_t c, int64_t pixels, double center, double* sum_dz,
                                 double* sum_dz_x) {
    double total = 0, total_x = 0;
    for (int64_t n = begin; n < end; ++n) {
      const T *dy_n = dy.at(n, c), *x_n = x.at(n, c), *y_n = kRelu ? y.at(n, c) : nullptr;
      T* dz_n = kStore ? dz.at(n, c) : nullptr;
#pragma omp simd reduction(+ : total, total_x)
      for (int64_t i = 0; i < pixels; ++i) {
        A g = load(dy_n + i);
        if constexpr (kRelu) g = masked(g, A(load(y_n + i)));
        if constexpr (kStore) store(dz_n + i, g);
        total += g;
        total_x += g * (load(x_n + i) - center);
      }
    }
    *sum_dz = total;
    *sum_dz_x = total_x;
  }
};

template <typename T, bool kRelu>
struct PlaneInputGradient {
  using A = Acc<T>;

  // One plane: dx = (dz - offset - (x - center) * slope) * scale.
  static GRADAUG_INLINE void run(const T* dy, const T* x, const T* y, T* dx, int64_t pixels, const Backward<A>& b) {
    const A center = b.center, scale = b.scale, slope = b.slope, offset = b.offset;
#pragma omp simd
    for (int64_t i = 0; i < pixels; ++i) {
      A g = load(dy + i);
      if constexpr (kRelu) g = masked(g, A(load(y + i)));
      store(dx + i, input_gradient(g, A(load(x + i)), center, scale, slope, offset));
    }
  }
};

// ---- drivers

// [0, n) cut into the same chunks whenever sizes and number of threads are the same; f(chunk, begin, end).
int64_t num_chunks(int64_t n, int64_t elements) {
  const int64_t worthwhile = std::max<int64_t>(1, elements / kGrain);
  return std::min({n, worthwhile, static_cast<int64_t>(at::get_num_threads())});
}

template <typename F>
void parallel_chunks(int64_t n, int64_t chunks, const F& f) {
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, n * i / chunks, n * (i + 1) / chunks);
  });
}

// How often [M, C] is folded into wider rows: a power of two that divides M, and no wider than needed.
int64_t fold_of(int64_t m, int64_t channels) {
  int64_t fold = 1;
  while (fold * channels < 4 * kLane && m % (2 * fold) == 0) fold *= 2;
  return fold;
}

// The sizes of one call. rows: [n * s, c] folded into [rows, cols]; planes: [n, c, s].
struct Sizes {
  int64_t n, c, s, m;  // m = n * s
  int64_t fold, rows, cols, chunks;

  Sizes(const Tensor& x, std::initializer_list<const Tensor*> read_in_place)
      : n(x.size(0)), c(x.size(1)), s(x.size(2) * x.size(3)), m(n * s) {
    bool dense = true;
    for (const Tensor* t : read_in_place) dense = dense && (!t->defined() || row_pitch(*t) == c);
    fold = dense ? fold_of(m, c) : 1;
    rows = m / fold;
    cols = c * fold;
    chunks = num_chunks(rows, x.numel());
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

  // Planes: every channel's images are cut into this many parts, so that few channels still occupy every thread.
  int64_t parts() const {
    const int64_t worthwhile = std::max<int64_t>(1, m * c / kGrain);
    const int64_t wanted = std::min<int64_t>(worthwhile, 4 * at::get_num_threads());
    return std::min(n, (wanted + c - 1) / c);
  }
};

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

// Moments of every channel.
template <typename T>
std::vector<Moments<double>> moments_of(const Tensor& x, const Layout& layout, const Sizes& size) {
  std::vector<Moments<double>> total(size.c, {0, 0, 0});
  if (layout.rows) {
    const int64_t cols = size.cols, chunks = size.chunks;
    std::vector<Acc<T>> scratch(chunks * 3 * (cols + kLane));
    std::vector<double> mean(chunks * cols), m2(chunks * cols);  // [chunks, cols]
    parallel_chunks(size.rows, chunks, [&](int64_t i, int64_t begin, int64_t end) {
      Rows<const T> part = size.rows_of<T>(x);
      part.data = part.at(begin, 0);
      Acc<T>* mine = scratch.data() + i * 3 * (cols + kLane);
      run<RowMoments<T>>(part, end - begin, cols, mine, mine + cols + kLane, mine + 2 * (cols + kLane),
                         mean.data() + i * cols, m2.data() + i * cols);
    });
    for (int64_t i = 0; i < chunks; ++i) {
      const double count = static_cast<double>(size.rows * (i + 1) / chunks - size.rows * i / chunks);
      for (int64_t col = 0; col < cols; ++col) {
        Moments<double>& set = total[col % size.c];
        set = merge(set, {count, mean[i * cols + col], m2[i * cols + col]});
      }
    }
  } else {
    const int64_t parts = size.parts();
    std::vector<Moments<double>> partial(size.c * parts);  // [C, parts]
    at::parallel_for(0, size.c * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t part = i % parts;
        run<PlaneMoments<T>>(size.planes_of<T>(x), size.n * part / parts, size.n * (part + 1) / parts, i / parts,
                             size.s, &partial[i]);
      }
    });
    for (int64_t i = 0; i < size.c * parts; ++i) total[i / parts] = merge(total[i / parts], partial[i]);
  }
  return total;
}

template <typename T, bool kResidual, bool kRelu>
void apply(const Tensor& x, const Tensor& residual, const Tensor& y, const Layout& layout, const Sizes& size,
           const std::vector<Forward<Acc<T>>>& coefficients) {
  using A = Acc<T>;
  if (layout.rows) {
    std::vector<A> center(size.cols), scale(size.cols), offset(size.cols);
    for (int64_t col = 0; col < size.cols; ++col) {
      const Forward<A>& f = coefficients[col % size.c];
      center[col] = f.center, scale[col] = f.scale, offset[col] = f.offset;
    }
    parallel_chunks(size.rows, size.chunks, [&](int64_t, int64_t begin, int64_t end) {
      Rows<const T> x_part = size.rows_of<T>(x), residual_part = size.rows_of<T>(residual);
      Rows<T> y_part = size.mutable_rows_of<T>(y);
      x_part.data = x_part.at(begin, 0), y_part.data = y_part.at(begin, 0);
      if constexpr (kResidual) residual_part.data = residual_part.at(begin, 0);
      run<RowApply<T, kResidual, kRelu>>(x_part, residual_part, y_part, end - begin, size.cols, center.data(),
                                         scale.data(), offset.data());
    });
  } else {
    const Planes<const T> xs = size.planes_of<T>(x), residuals = size.planes_of<T>(residual);
    const Planes<T> ys = size.mutable_planes_of<T>(y);
    const int64_t grain = std::max<int64_t>(1, kGrain / size.s);
    at::parallel_for(0, size.n * size.c, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = i / size.c, c = i % size.c;
        run<PlaneApply<T, kResidual, kRelu>>(xs.at(n, c), kResidual ? residuals.at(n, c) : nullptr, ys.at(n, c), size.s,
                                             coefficients[c]);
      }
    });
  }
}

struct GradientSums {
  std::vector<double> dz, dz_x;  // [C]: sum(dz), sum(dz * (x - mean))
};

template <typename T, bool kRelu, bool kStore>
GradientSums gradient_sums(const Tensor& dy, const Tensor& x, const Tensor& y, const Tensor& dz, const Layout& layout,
                           const Sizes& size, const std::vector<double>& mean) {
  using A = Acc<T>;
  GradientSums total{std::vector<double>(size.c, 0.0), std::vector<double>(size.c, 0.0)};
  if (layout.rows) {
    const int64_t cols = size.cols, chunks = size.chunks;
    std::vector<A> center(cols), scratch(chunks * 2 * (cols + kLane));
    for (int64_t col = 0; col < cols; ++col) center[col] = static_cast<A>(mean[col % size.c]);
    std::vector<double> sum(chunks * cols), sum_x(chunks * cols);  // [chunks, cols]
    parallel_chunks(size.rows, chunks, [&](int64_t i, int64_t begin, int64_t end) {
      Rows<const T> dy_part = size.rows_of<T>(dy), x_part = size.rows_of<T>(x), y_part = size.rows_of<T>(y);
      Rows<T> dz_part = size.mutable_rows_of<T>(dz);
      dy_part.data = dy_part.at(begin, 0), x_part.data = x_part.at(begin, 0);
      if constexpr (kRelu) y_part.data = y_part.at(begin, 0);
      if constexpr (kStore) dz_part.data = dz_part.at(begin, 0);
      A* mine = scratch.data() + i * 2 * (cols + kLane);
      run<RowGradientSums<T, kRelu, kStore>>(dy_part, x_part, y_part, dz_part, end - begin, cols, center.data(), mine,
                                             mine + cols + kLane, sum.data() + i * cols, sum_x.data() + i * cols);
    });
    for (int64_t i = 0; i < chunks * cols; ++i) {
      total.dz[i % cols % size.c] += sum[i];
      total.dz_x[i % cols % size.c] += sum_x[i];
    }
  } else {
    const int64_t parts = size.parts();
    std::vector<double> sum(size.c * parts), sum_x(size.c * parts);  // [C, parts]
    at::parallel_for(0, size.c * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t c = i / parts, part = i % parts;
        run<PlaneGradientSums<T, kRelu, kStore>>(size.planes_of<T>(dy), size.planes_of<T>(x), size.planes_of<T>(y),
                                                 size.mutable_planes_of<T>(dz), size.n * part / parts,
                                                 size.n * (part + 1) / parts, c, size.s, mean[c], &sum[i], &sum_x[i]);
      }
    });
    for (int64_t i = 0; i < size.c * parts; ++i) {
      total.dz[i / parts] += sum[i];
      total.dz_x[i / parts] += sum_x[i];
    }
  }
  return total;
}

template <typename T, bool kRelu>
void input_gradients(const Tensor& dy, const Tensor& x, const Tensor& y, const Tensor& dx, const Layout& layout,
                     const Sizes& size, const std::vector<Backward<Acc<T>>>& coefficients) {
  using A = Acc<T>;
  if (layout.rows) {
    std::vector<A> center(size.cols), scale(size.cols), slope(size.cols), offset(size.cols);
    for (int64_t col = 0; col < size.cols; ++col) {
      const Backward<A>& b = coefficients[col % size.c];
      center[col] = b.center, scale[col] = b.scale, slope[col] = b.slope, offset[col] = b.offset;
    }
    parallel_chunks(size.rows, size.chunks, [&](int64_t, int64_t begin, int64_t end) {
      Rows<const T> dy_part = size.rows_of<T>(dy), x_part = size.rows_of<T>(x), y_part = size.rows_of<T>(y);
      Rows<T> dx_part = size.mutable_rows_of<T>(dx);
      dy_part.data = dy_part.at(begin, 0), x_part.data = x_part.at(begin, 0), dx_part.data = dx_part.at(begin, 0);
      if constexpr (kRelu) y_part.data = y_part.at(begin, 0);
      run<RowInputGradient<T, kRelu>>(dy_part, x_part, y_part, dx_part, end - begin, size.cols, center.data(),
                                      scale.data(), slope.data(), offset.data());
    });
  } else {
    const Planes<const T> dys = size.planes_of<T>(dy), xs = size.planes_of<T>(x), ys = size.planes_of<T>(y);
    const Planes<T> dxs = size.mutable_planes_of<T>(dx);
    const int64_t grain = std::max<int64_t>(1, kGrain / size.s);
    at::parallel_for(0, size.n * size.c, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = i / size.c, c = i % size.c;
        run<PlaneInputGradient<T, kRelu>>(dys.at(n, c), xs.at(n, c), kRelu ? ys.at(n, c) : nullptr, dxs.at(n, c),
                                          size.s, coefficients[c]);
      }
    });
  }
}

// ---- operators

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& given_mean,
                                           const std::optional<Tensor>& given_var,
                                           const std::optional<Tensor>& residual, bool relu, double eps) {
  check_forward(x, weight, bias, given_mean, given_var, residual);
  const Layout layout(x);
  const int64_t channels = x.size(1);
  Tensor y = layout.empty(x);                                   // [N, C, H, W]
  std::vector<double> mean(channels, 0.0), var(channels, 0.0);  // [C]
  if (given_mean) mean = statistic_values(*given_mean), var = statistic_values(*given_var);
  if (x.numel() > 0) {
    const Tensor x_read = layout.readable(x), residual_read = residual ? layout.readable(*residual) : Tensor();
    const Sizes size(x, {&x_read, &residual_read});
    const std::vector<double> weights = parameter_values(weight, channels, 1),
                              biases = parameter_values(bias, channels, 0);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "slim_batch_norm", [&] {
      if (!given_mean) {
        const std::vector<Moments<double>> moments = moments_of<scalar_t>(x_read, layout, size);
        for (int64_t c = 0; c < channels; ++c) mean[c] = moments[c].mean, var[c] = variance(moments[c]);
      }
      std::vector<Forward<Acc<scalar_t>>> coefficients(channels);
      for (int64_t c = 0; c < channels; ++c) {
        coefficients[c] = forward_coefficients<Acc<scalar_t>>(mean[c], var[c], weights[c], biases[c], eps);
      }
      if (residual) {
        (relu ? apply<scalar_t, true, true> : apply<scalar_t, true, false>)(x_read, residual_read, y, layout, size,
                                                                            coefficients);
      } else {
        (relu ? apply<scalar_t, false, true> : apply<scalar_t, false, false>)(x_read, residual_read, y, layout, size,
                                                                              coefficients);
      }
    });
  }
  return {y, statistic_tensor(mean, x), statistic_tensor(var, x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, const Tensor& mean_tensor,
                                                    const Tensor& var_tensor, bool batch_stats, bool needs_dz,
                                                    double eps) {
  check_backward(dy, x, y, weight, bias, mean_tensor, var_tensor);
  const Layout layout(x);
  const int64_t channels = x.size(1);
  Tensor dx = layout.empty(x);                                           // [N, C, H, W]
  Tensor dz = needs_dz ? layout.empty(x) : at::empty({0}, x.options());  // [N, C, H, W]
  std::vector<double> dweight(channels, 0.0), dbias(channels, 0.0);      // [C]
  if (x.numel() > 0) {
    const Tensor dy_read = layout.readable(dy), x_read = layout.readable(x);
    const Tensor y_read = y ? layout.readable(*y) : Tensor(), dz_written = needs_dz ? dz : Tensor();
    const Sizes size(x, {&dy_read, &x_read, &y_read});
    const std::vector<double> mean = statistic_values(mean_tensor), var = statistic_values(var_tensor);
    const std::vector<double> weights = parameter_values(weight, channels, 1);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "slim_batch_norm_backward", [&] {
      GradientSums sums;
      if (y) {
        sums =
            (needs_dz ? gradient_sums<scalar_t, true, true>
                      : gradient_sums<scalar_t, true, false>)(dy_read, x_read, y_read, dz_written, layout, size, mean);
      } else {
        sums =
            (needs_dz ? gradient_sums<scalar_t, false, true>
                      : gradient_sums<scalar_t, false, false>)(dy_read, x_read, y_read, dz_written, layout, size, mean);
      }
      std::vector<Backward<Acc<scalar_t>>> coefficients(channels);
      const double inv_m = batch_stats ? 1.0 / static_cast<double>(size.m) : 0.0;
      for (int64_t c = 0; c < channels; ++c) {
        coefficients[c] =
            backward_coefficients<Acc<scalar_t>>(mean[c], var[c], weights[c], eps, sums.dz[c], sums.dz_x[c], inv_m);
        dweight[c] = weight_gradient(sums.dz_x[c], var[c], eps);
        dbias[c] = sums.dz[c];
      }
      if (y && !needs_dz) {
        input_gradients<scalar_t, true>(dy_read, x_read, y_read, dx, layout, size, coefficients);
      } else {  // dz is at hand: one stream less to read than dy and y
        input_gradients<scalar_t, false>(needs_dz ? dz : dy_read, x_read, y_read, dx, layout, size, coefficients);
      }
    });
  }
  return {dx, dz, parameter_gradient(weight, dweight, mean_tensor), parameter_gradient(bias, dbias, mean_tensor)};
}

}  // namespace
}  // namespace gradaug::batch_norm

TORCH_LIBRARY_IMPL(gradaug, CPU, m) {
  m.impl("slim_batch_norm", &gradaug::batch_norm::forward);
  m.impl("slim_batch_norm_backward", &gradaug::batch_norm::backward);
}

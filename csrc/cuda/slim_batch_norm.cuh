// Batch norm on CUDA: kernels and their launches, without torch. Arithmetic: slim_batch_norm.h.
//
// An activation is a set of lines of adjacent values (Extent):
//
//   rows    channels_last: a line is one pixel, [N * H * W lines, C values]; a thread keeps its channels
//   planes  contiguous: a line is one plane of one channel, [C][N lines, H * W values]; a block keeps its channel
//
// A block is threads x along a line, threads y across lines; blockIdx.x is a tile of channels (rows) or a channel
// (planes), blockIdx.y a range of lines, a split. Values are read and written 16 bytes at once where every pointer and
// stride is a multiple of that, else one by one, with more lines in flight.
//
// Sums are taken in a fixed order, so results repeat: a thread's in A (float; double for double), the splits' in
// double. Nothing synchronises or allocates: the launches can be captured into a graph.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/launch.cuh"
#include "slim_batch_norm.h"

namespace gradaug::batch_norm {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kThreads = 256;    // most threads of a block
constexpr int kBlocks = 3;       // that a multiprocessor holds: bounds the registers
constexpr int kTile = 32;        // most threads along a row
constexpr int kSamples = 8;      // values of a channel whose mean is the center of its sums
constexpr int kMaxSplits = 256;  // partial sums of a channel
constexpr int kFinishLanes = 8;  // threads that add the splits of a channel
constexpr int kFinishChannels = 32;

// ---- values

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* p) {
  Vector<T, V> v;
  if constexpr (sizeof(v) == 16) {
    *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(p);
  } else {
    static_assert(V == 1);
    v.at[0] = *p;
  }
  return v;
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, V>& v) {
  if constexpr (sizeof(v) == 16) {
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&v);
  } else {
    static_assert(V == 1);
    *p = v.at[0];
  }
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// ---- tensors

struct Extent {
  bool rows;
  int64_t channels;
  int64_t lines;   // rows: N * H * W, planes: N
  int64_t length;  // values of a line; rows: C, planes: H * W

  int64_t count() const { return rows ? lines : lines * length; }  // values of a channel
};

// Value p of line l is data[l * line + p]; planes add channel * c. Strides in elements.
template <typename T>
struct Lines {
  T* data;
  int64_t line, channel;
};

// weight or bias: the first `channels` of them are read. data is null where there is none.
struct Parameter {
  const void* data;
  int64_t stride;
  bool like_x;  // in the dtype of x, else in A
};

// The gradient of a parameter, [size] >= [channels]. data is null where there is none.
struct ParameterGradient {
  void* data;
  int64_t size;
  bool like_x;
};

// mean or var: null where there is none.
template <typename A>
struct Statistic {
  const A* data;
  int64_t stride;
};

template <typename T>
__device__ __forceinline__ double read(Parameter p, int64_t c, double missing) {
  if (p.data == nullptr) return missing;
  if (p.like_x) return static_cast<double>(widen(static_cast<const T*>(p.data)[c * p.stride]));
  return static_cast<double>(static_cast<const Accumulator<T>*>(p.data)[c * p.stride]);
}

template <typename T>
__device__ __forceinline__ void write(ParameterGradient p, int64_t c, double v) {
  if (c >= p.size || p.data == nullptr) return;
  const Accumulator<T> a = static_cast<Accumulator<T>>(v);
  if (p.like_x) {
    static_cast<T*>(p.data)[c] = narrow<T>(a);
  } else {
    static_cast<Accumulator<T>*>(p.data)[c] = a;
  }
}

// ---- the part of an activation that a thread works on

// Moves from line to line of a tensor.
template <typename T, int V>
struct Cursor {
  T* at;
  int64_t step;

  template <int U, typename Value>
  __device__ __forceinline__ void load(Vector<Value, V> (&v)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u, at += step) v[u] = load_vector<Value, V>(at);
  }

  template <int U, typename Value>
  __device__ __forceinline__ void store(const Vector<Value, V> (&v)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u, at += step) store_vector(at, v[u]);
  }
};

template <int V, bool kRows>
struct Walk {
  static constexpr int kChannels = kRows ? V : 1;  // that a thread keeps

  int64_t channel;         // the first of them
  bool inside;             // are they channels of the tensor?
  int64_t position, step;  // first position in a line, and from one to the next
  int64_t begin, end;      // lines
  int64_t across;          // from one of them to the next

  __device__ __forceinline__ explicit Walk(const Extent& e) {
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * blockDim.x;
    position = (kRows ? tile + threadIdx.x : threadIdx.x) * V;
    step = kRows ? e.length : static_cast<int64_t>(blockDim.x) * V;
    channel = kRows ? position : blockIdx.x;
    inside = channel < e.channels;
    begin = e.lines * blockIdx.y / gridDim.y + threadIdx.y;
    end = e.lines * (blockIdx.y + 1) / gridDim.y;
    across = blockDim.y;
  }

  // Where position p of the first line is.
  template <typename T>
  __device__ __forceinline__ Cursor<T, V> cursor(const Lines<T>& t, int64_t p) const {
    return {t.data + (kRows ? 0 : channel * t.channel) + begin * t.line + p, across * t.line};
  }

  // Runs step over all lines: U at once (they are in flight together), then the rest one by one.
  template <int U, typename Step>
  __device__ __forceinline__ void over_lines(Step& step) const {
    int64_t line = begin;
    if constexpr (U > 1) {
#pragma unroll 1
      for (; line + (U - 1) * across < end; line += U * across) step.template run<U>();
    }
#pragma unroll 1
    for (; line < end; line += across) step.template run<1>();
  }

  // Coefficients of the thread's channels, [channels].
  template <typename A>
  __device__ __forceinline__ void load_channels(const A* values, A (&v)[kChannels]) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) v[i] = inside ? values[channel + i] : A(0);
  }
};

// Adds v over the threads of the block that have the same channels: a tree over threads y (rows) or all (planes).
// Their first thread gets the sums. The number of threads is a power of two.
template <typename A, int K, bool kRows>
__device__ __forceinline__ void add_over_block(A (&v)[K]) {
  __shared__ A upper[K][kThreads / 2];
  const int threads_x = blockDim.x, thread = threadIdx.y * threads_x + threadIdx.x;
  const int width = kRows ? threads_x : 1;  // threads that are not added up
  for (int half = threads_x * static_cast<int>(blockDim.y) / 2; half >= width; half /= 2) {
    if (thread >= half && thread < 2 * half) {
#pragma unroll
      for (int k = 0; k < K; ++k) upper[k][thread - half] = v[k];
    }
    __syncthreads();
    if (thread < half) {
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] += upper[k][thread];
    }
    __syncthreads();
  }
}

// Adds sums [2][kChannels] over the block and writes them to partial [2, splits, channels]. The many threads of a plane
// are added in double, which costs little for two sums.
template <typename A, int V, bool kRows>
__device__ __forceinline__ void write_partial(const Walk<V, kRows>& walk,
                                              const A (&sums)[2 * Walk<V, kRows>::kChannels], const Extent& e,
                                              double* partial) {
  constexpr int K = Walk<V, kRows>::kChannels;
  std::conditional_t<kRows, A, double> v[2 * K];
#pragma unroll
  for (int k = 0; k < 2 * K; ++k) v[k] = sums[k];
  add_over_block<std::conditional_t<kRows, A, double>, 2 * K, kRows>(v);
  if (threadIdx.y != 0 || (!kRows && threadIdx.x != 0) || !walk.inside) return;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    partial[static_cast<int64_t>(blockIdx.y) * e.channels + walk.channel + i] = v[i];
    partial[static_cast<int64_t>(gridDim.y + blockIdx.y) * e.channels + walk.channel + i] = v[K + i];
  }
}

// ---- forward

// The mean of a few values, spread over the channel: sums about it do not cancel, whatever the data's offset. Rounded
// to T, so that differences from it are exact or nearly so. The same in every thread that has the channel.
template <typename T, int V, bool kRows>
__device__ __forceinline__ void find_center(const Walk<V, kRows>& walk, const Lines<const T>& x, const Extent& e,
                                            Accumulator<T> (&center)[Walk<V, kRows>::kChannels]) {
  using A = Accumulator<T>;
  constexpr int K = Walk<V, kRows>::kChannels;
#pragma unroll
  for (int i = 0; i < K; ++i) center[i] = A(0);
  if (!walk.inside) return;
#pragma unroll
  for (int s = 0; s < kSamples; ++s) {
    const int64_t line = e.lines * s / kSamples;
    const int64_t position = kRows ? walk.position : e.length * s / kSamples;
    const T* sampled = x.data + (kRows ? 0 : walk.channel * x.channel) + line * x.line + position;
    const Vector<T, K> sample = load_vector<T, K>(sampled);
#pragma unroll
    for (int i = 0; i < K; ++i) center[i] += widen(sample.at[i]) * (A(1) / kSamples);
  }
#pragma unroll
  for (int i = 0; i < K; ++i) center[i] = widen(narrow<T>(center[i]));
}

template <typename T, int V, bool kRows>
struct MomentsStep {
  static constexpr int K = Walk<V, kRows>::kChannels;
  Accumulator<T> center[K], sums[2 * K];
  Cursor<const T, V> x;

  template <int U>
  __device__ __forceinline__ void run() {
    Vector<T, V> xs[U];
    x.load(xs);
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = kRows ? i : 0;
        const Accumulator<T> d = widen(xs[u].at[i]) - center[k];
        sums[k] += d;
        sums[K + k] += d * d;
      }
    }
  }
};

// Sums of x and x^2 about a center. Reads x once; a thread keeps center and two sums of its channels; a block adds up
// its threads' and writes partial [2, splits, channels], the blocks of split 0 also center [channels].
template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments_kernel(Lines<const T> x, Extent e, Accumulator<T>* centers, double* partial) {
  constexpr int K = Walk<V, kRows>::kChannels, U = V == 1 ? 8 : 4;
  const Walk<V, kRows> walk(e);
  MomentsStep<T, V, kRows> step;
  find_center<T>(walk, x, e, step.center);
#pragma unroll
  for (int k = 0; k < 2 * K; ++k) step.sums[k] = Accumulator<T>(0);
  for (int64_t p = walk.position; p < e.length; p += walk.step) {
    step.x = walk.cursor(x, p);
    walk.template over_lines<U>(step);
  }
  if (blockIdx.y == 0 && threadIdx.y == 0 && (kRows || threadIdx.x == 0) && walk.inside) {
#pragma unroll
    for (int i = 0; i < K; ++i) centers[walk.channel + i] = step.center[i];
  }
  write_partial(walk, step.sums, e, partial);
}

// Adds partial [2, splits, channels] over the splits: thread x is a channel, threads y take every kFinishLanes-th
// split. Threads y = 0 get the sums.
__device__ __forceinline__ void add_splits(const double* partial, int splits, int64_t channels, double& first,
                                           double& second) {
  __shared__ double lanes[2][kFinishLanes][kFinishChannels];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinishChannels + threadIdx.x;
  first = second = 0;
  if (c < channels) {
    for (int s = threadIdx.y; s < splits; s += kFinishLanes) {
      first += partial[s * channels + c];
      second += partial[(splits + s) * channels + c];
    }
  }
  lanes[0][threadIdx.y][threadIdx.x] = first;
  lanes[1][threadIdx.y][threadIdx.x] = second;
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int lane = 1; lane < kFinishLanes; ++lane) {
    first += lanes[0][lane][threadIdx.x];
    second += lanes[1][lane][threadIdx.x];
  }
}

// Statistics and coefficients of every channel: from partial [2, splits, channels] about center [channels], or from the
// given statistics. Writes mean, var [channels] and center, scale, offset: coefficients [3, channels].
template <typename T>
__global__ void __launch_bounds__(kFinishLanes* kFinishChannels)
    finish_forward_kernel(const double* partial, const Accumulator<T>* centers, int splits, int64_t channels,
                          int64_t count, Statistic<Accumulator<T>> given_mean, Statistic<Accumulator<T>> given_var,
                          Parameter weight, Parameter bias, double eps, Accumulator<T>* mean, Accumulator<T>* var,
                          Accumulator<T>* coefficients) {
  using A = Accumulator<T>;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinishChannels + threadIdx.x;
  double mean_c, var_c, sum, sum_of_squares;
  if (given_mean.data == nullptr) add_splits(partial, splits, channels, sum, sum_of_squares);
  if (threadIdx.y != 0 || c >= channels) return;
  if (given_mean.data == nullptr) {
    const auto set =
        push_sums<double>({0.0, static_cast<double>(centers[c]), 0.0}, static_cast<double>(count), sum, sum_of_squares);
    mean_c = set.mean;
    var_c = variance(set);
  } else {
    mean_c = static_cast<double>(given_mean.data[c * given_mean.stride]);
    var_c = static_cast<double>(given_var.data[c * given_var.stride]);
  }
  mean[c] = static_cast<A>(mean_c);
  var[c] = static_cast<A>(var_c);
  const auto f = forward_coefficients<A>(mean_c, var_c, read<T>(weight, c, 1.0), read<T>(bias, c, 0.0), eps);
  coefficients[c] = f.center;
  coefficients[channels + c] = f.scale;
  coefficients[2 * channels + c] = f.offset;
}

template <typename T, int V, bool kRows>
struct ApplyStep {
  using A = Accumulator<T>;
  static constexpr int K = Walk<V, kRows>::kChannels;
  A center[K], scale[K], offset[K], floor;
  bool with_residual;
  Cursor<const T, V> x, residual;
  Cursor<T, V> y;

  template <int U>
  __device__ __forceinline__ void run() {
    Vector<T, V> xs[U], residuals[U];
    x.load(xs);
    if (with_residual) residual.load(residuals);
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = kRows ? i : 0;
        A z = normalise(widen(xs[u].at[i]), center[k], scale[k], offset[k]);
        if (with_residual) z += widen(residuals[u].at[i]);
        xs[u].at[i] = narrow<T>(relu(z, floor));
      }
    }
    y.store(xs);
  }
};

// y = relu((x - center) * scale + offset + residual?, floor). Reads x (and residual) once; a thread keeps the
// coefficients [3, channels] of its channels; writes y once.
template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    apply_kernel(Lines<const T> x, Lines<const T> residual, Lines<T> y, Extent e, Accumulator<T> floor,
                 const Accumulator<T>* coefficients) {
  constexpr int U = V == 1 ? 4 : 2;
  const Walk<V, kRows> walk(e);
  ApplyStep<T, V, kRows> step;
  walk.load_channels(coefficients, step.center);
  walk.load_channels(coefficients + e.channels, step.scale);
  walk.load_channels(coefficients + 2 * e.channels, step.offset);
  step.floor = floor;
  step.with_residual = residual.data != nullptr;
  for (int64_t p = walk.position; p < e.length; p += walk.step) {
    step.x = walk.cursor(x, p);
    if (step.with_residual) step.residual = walk.cursor(residual, p);
    step.y = walk.cursor(y, p);
    walk.template over_lines<U>(step);
  }
}

// ---- backward

template <typename T, int V, bool kRows>
struct GradientSumsStep {
  using A = Accumulator<T>;
  static constexpr int K = Walk<V, kRows>::kChannels;
  A center[K], sums[2 * K];
  bool with_relu, with_dz;
  Cursor<const T, V> dy, x, y;
  Cursor<T, V> dz;

  template <int U>
  __device__ __forceinline__ void run() {
    Vector<T, V> dys[U], xs[U], ys[U];
    dy.load(dys);
    x.load(xs);
    if (with_relu) y.load(ys);
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = kRows ? i : 0;
        A g = widen(dys[u].at[i]);
        if (with_relu) g = masked(g, A(widen(ys[u].at[i])));
        sums[k] += g;
        sums[K + k] += g * (widen(xs[u].at[i]) - center[k]);
        dys[u].at[i] = narrow<T>(g);
      }
    }
    if (with_dz) dz.store(dys);
  }
};

// sum(dz) and sum(dz * (x - mean)), dz = dy or, where y is given, dy * (y > 0). Reads dy, x (and y) once; a thread
// keeps mean and two sums of its channels; a block adds up its threads' and writes partial [2, splits, channels];
// writes dz where it is asked for.
template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_sums_kernel(Lines<const T> dy, Lines<const T> x, Lines<const T> y, Lines<T> dz, Extent e,
                         Statistic<Accumulator<T>> mean, double* partial) {
  using A = Accumulator<T>;
  constexpr int K = Walk<V, kRows>::kChannels, U = V > 1 ? 1 : sizeof(T) == 8 ? 2 : 4;
  const Walk<V, kRows> walk(e);
  GradientSumsStep<T, V, kRows> step;
  step.with_relu = y.data != nullptr;
  step.with_dz = dz.data != nullptr;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    step.center[i] = walk.inside ? mean.data[(walk.channel + i) * mean.stride] : A(0);
    step.sums[i] = step.sums[K + i] = A(0);
  }
  for (int64_t p = walk.position; p < e.length; p += walk.step) {
    step.dy = walk.cursor(dy, p);
    step.x = walk.cursor(x, p);
    if (step.with_relu) step.y = walk.cursor(y, p);
    if (step.with_dz) step.dz = walk.cursor(dz, p);
    walk.template over_lines<U>(step);
  }
  write_partial(walk, step.sums, e, partial);
}

// Parameter gradients and coefficients of every channel, from partial [2, splits, channels]. Writes dweight, dbias,
// zero beyond the channels, and center, scale, slope, offset: coefficients [4, channels]. inv_m: 1 / count, or 0 where
// the statistics were given.
template <typename T>
__global__ void __launch_bounds__(kFinishLanes* kFinishChannels)
    finish_backward_kernel(const double* partial, int splits, int64_t channels, double inv_m,
                           Statistic<Accumulator<T>> mean, Statistic<Accumulator<T>> var, Parameter weight, double eps,
                           ParameterGradient dweight, ParameterGradient dbias, Accumulator<T>* coefficients) {
  using A = Accumulator<T>;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinishChannels + threadIdx.x;
  double sum_dz, sum_dz_x;
  add_splits(partial, splits, channels, sum_dz, sum_dz_x);
  if (threadIdx.y != 0) return;
  if (c >= channels) {
    write<T>(dweight, c, 0.0);
    write<T>(dbias, c, 0.0);
    return;
  }
  const double mean_c = static_cast<double>(mean.data[c * mean.stride]);
  const double var_c = static_cast<double>(var.data[c * var.stride]);
  write<T>(dweight, c, weight_gradient(sum_dz_x, var_c, eps));
  write<T>(dbias, c, sum_dz);
  const auto b = backward_coefficients<A>(mean_c, var_c, read<T>(weight, c, 1.0), eps, sum_dz, sum_dz_x, inv_m);
  coefficients[c] = b.center;
  coefficients[channels + c] = b.scale;
  coefficients[2 * channels + c] = b.slope;
  coefficients[3 * channels + c] = b.offset;
}

template <typename T, int V, bool kRows>
struct InputGradientStep {
  using A = Accumulator<T>;
  static constexpr int K = Walk<V, kRows>::kChannels;
  A center[K], scale[K], slope[K], offset[K];
  bool with_relu;
  Cursor<const T, V> dy, x, y;
  Cursor<T, V> dx;

  template <int U>
  __device__ __forceinline__ void run() {
    Vector<T, V> dys[U], xs[U], ys[U];
    dy.load(dys);
    x.load(xs);
    if (with_relu) y.load(ys);
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = kRows ? i : 0;
        A g = widen(dys[u].at[i]);
        if (with_relu) g = masked(g, A(widen(ys[u].at[i])));
        const A dx_i = input_gradient(g, A(widen(xs[u].at[i])), center[k], scale[k], slope[k], offset[k]);
        dys[u].at[i] = narrow<T>(dx_i);
      }
    }
    dx.store(dys);
  }
};

// dx = (dz - offset - (x - center) * slope) * scale, dz = dy or, where y is given, dy * (y > 0). Reads dy, x (and y)
// once; a thread keeps the coefficients [4, channels] of its channels; writes dx once.
template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    input_gradient_kernel(Lines<const T> dy, Lines<const T> x, Lines<const T> y, Lines<T> dx, Extent e,
                          const Accumulator<T>* coefficients) {
  constexpr int U = V > 1 ? 1 : sizeof(T) == 8 ? 2 : 4;
  const Walk<V, kRows> walk(e);
  InputGradientStep<T, V, kRows> step;
  step.with_relu = y.data != nullptr;
  walk.load_channels(coefficients, step.center);
  walk.load_channels(coefficients + e.channels, step.scale);
  walk.load_channels(coefficients + 2 * e.channels, step.slope);
  walk.load_channels(coefficients + 3 * e.channels, step.offset);
  for (int64_t p = walk.position; p < e.length; p += walk.step) {
    step.dy = walk.cursor(dy, p);
    step.x = walk.cursor(x, p);
    if (step.with_relu) step.y = walk.cursor(y, p);
    step.dx = walk.cursor(dx, p);
    walk.template over_lines<U>(step);
  }
}

// ---- launches

template <typename T>
constexpr int kVector = 16 / sizeof(T);

// Can t be read and written kVector values at once?
template <typename T>
bool vectorisable(const Lines<T>& t) {
  constexpr int V = kVector<std::remove_const_t<T>>;
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.line % V == 0 && t.channel % V == 0;
}

// The smallest power of two that is at least n, at most `limit`, which is one.
inline int power_of_two(int64_t n, int limit) {
  int power = 1;
  while (power < limit && power < n) power *= 2;
  return power;
}

// How the kernels of one call are launched.
struct Plan {
  Extent extent;
  bool vector;  // 16 bytes at once, else one value
  dim3 block;
  unsigned tiles;  // blocks along x
  int splits;      // blocks along y of the kernels that sum
  int map_splits;  // and of those that only write
};

// aligned: every tensor is vectorisable.
template <typename T>
Plan make_plan(const Extent& e, bool aligned, int multiprocessors) {
  Plan plan{e, aligned && e.length % kVector<T> == 0, dim3(1), 1, 1, 1};
  const int64_t units = plan.vector ? e.length / kVector<T> : e.length;  // of a line, one per thread
  const int threads_x = power_of_two(units, e.rows ? kTile : kThreads);
  const int threads_y = power_of_two(e.lines, kThreads / threads_x);
  plan.block = dim3(threads_x, threads_y);
  plan.tiles = static_cast<unsigned>(e.rows ? (units + threads_x - 1) / threads_x : e.channels);
  // Enough blocks to fill the device, and lines enough for a thread to pay for what it does once.
  const auto splits = [&](int blocks_per_multiprocessor, int lines_per_thread, int most) {
    const int64_t wanted =
        (static_cast<int64_t>(multiprocessors) * blocks_per_multiprocessor + plan.tiles - 1) / plan.tiles;
    const int64_t worthwhile = e.lines / (static_cast<int64_t>(threads_y) * lines_per_thread);
    const int64_t number = wanted < worthwhile ? wanted : worthwhile;
    return static_cast<int>(number < 1 ? 1 : number > most ? most : number);
  };
  plan.splits = splits(kBlocks, e.rows ? 16 : 1, kMaxSplits);
  plan.map_splits = splits(4 * kBlocks, e.rows ? 4 : 1, 65535);
  return plan;
}

// Calls f with the plan's vector length and layout as compile-time constants.
template <typename T, typename F>
void with_plan(const Plan& plan, F f) {
  using Wide = std::integral_constant<int, kVector<T>>;
  using Single = std::integral_constant<int, 1>;
  if (plan.extent.rows) {
    plan.vector ? f(Wide{}, std::true_type{}) : f(Single{}, std::true_type{});
  } else {
    plan.vector ? f(Wide{}, std::false_type{}) : f(Single{}, std::false_type{});
  }
}

inline dim3 finish_grid(int64_t channels) {
  return dim3(static_cast<unsigned>((channels + kFinishChannels - 1) / kFinishChannels));
}

// A call's workspace: partial sums in double, then four coefficients of every channel in A. Its size in doubles.
inline double* after_partial(const Plan& plan, double* workspace) {
  return workspace + 2 * plan.splits * plan.extent.channels;
}
inline int64_t workspace_size(const Plan& plan) { return (2 * plan.splits + 4) * plan.extent.channels; }

// given_mean and given_var are null for batch statistics; mean, var [channels] are written.
template <typename T>
struct ForwardTensors {
  Lines<const T> x, residual;  // residual.data may be null
  Lines<T> y;
  Parameter weight, bias;
  Statistic<Accumulator<T>> given_mean, given_var;
  Accumulator<T>*mean, *var;
};

template <typename T>
void launch_forward(const Plan& plan, const ForwardTensors<T>& t, bool with_relu, double eps, double* workspace,
                    cudaStream_t stream) {
  const Extent& e = plan.extent;
  double* partial = workspace;                                                             // [2, splits, channels]
  auto* coefficients = reinterpret_cast<Accumulator<T>*>(after_partial(plan, workspace));  // [3, channels]
  Accumulator<T>* centers = coefficients + 3 * e.channels;                                 // [channels]
  with_plan<T>(plan, [&](auto vector, auto rows) {
    if (t.given_mean.data == nullptr) {
      auto* moments = moments_kernel<T, vector, rows>;
      GRADAUG_LAUNCH(moments, dim3(plan.tiles, plan.splits), plan.block, 0, stream, t.x, e, centers, partial);
    }
    auto* finish = finish_forward_kernel<T>;
    GRADAUG_LAUNCH(finish, finish_grid(e.channels), dim3(kFinishChannels, kFinishLanes), 0, stream, partial, centers,
                   plan.splits, e.channels, e.count(), t.given_mean, t.given_var, t.weight, t.bias, eps, t.mean, t.var,
                   coefficients);
    const Accumulator<T> floor = with_relu ? Accumulator<T>(0) : -std::numeric_limits<Accumulator<T>>::infinity();
    auto* apply = apply_kernel<T, vector, rows>;
    GRADAUG_LAUNCH(apply, dim3(plan.tiles, plan.map_splits), plan.block, 0, stream, t.x, t.residual, t.y, e, floor,
                   coefficients);
  });
}

template <typename T>
struct BackwardTensors {
  Lines<const T> dy, x, y;  // y.data may be null: no ReLU
  Lines<T> dx, dz;          // dz.data may be null: not wanted
  Parameter weight;
  Statistic<Accumulator<T>> mean, var;
  ParameterGradient dweight, dbias;
};

template <typename T>
void launch_backward(const Plan& plan, const BackwardTensors<T>& t, bool batch_stats, double eps, double* workspace,
                     cudaStream_t stream) {
  const Extent& e = plan.extent;
  double* partial = workspace;                                                             // [2, splits, channels]
  auto* coefficients = reinterpret_cast<Accumulator<T>*>(after_partial(plan, workspace));  // [4, channels]
  const double inv_m = batch_stats ? 1.0 / static_cast<double>(e.count()) : 0.0;
  int64_t parameters = e.channels;
  if (t.dweight.data != nullptr && t.dweight.size > parameters) parameters = t.dweight.size;
  if (t.dbias.data != nullptr && t.dbias.size > parameters) parameters = t.dbias.size;
  with_plan<T>(plan, [&](auto vector, auto rows) {
    auto* sums = gradient_sums_kernel<T, vector, rows>;
    GRADAUG_LAUNCH(sums, dim3(plan.tiles, plan.splits), plan.block, 0, stream, t.dy, t.x, t.y, t.dz, e, t.mean,
                   partial);
    auto* finish = finish_backward_kernel<T>;
    GRADAUG_LAUNCH(finish, finish_grid(parameters), dim3(kFinishChannels, kFinishLanes), 0, stream, partial,
                   plan.splits, e.channels, inv_m, t.mean, t.var, t.weight, eps, t.dweight, t.dbias, coefficients);
    // Where dz was written it is at hand: one tensor less to read than dy and y.
    const bool from_dz = t.dz.data != nullptr;
    const Lines<const T> dz{from_dz ? t.dz.data : t.dy.data, from_dz ? t.dz.line : t.dy.line,
                            from_dz ? t.dz.channel : t.dy.channel};
    const Lines<const T> y = from_dz ? Lines<const T>{} : t.y;
    auto* gradient = input_gradient_kernel<T, vector, rows>;
    GRADAUG_LAUNCH(gradient, dim3(plan.tiles, plan.map_splits), plan.block, 0, stream, dz, t.x, y, t.dx, e,
                   coefficients);
  });
}

}  // namespace gradaug::batch_norm

// The arithmetic of batch norm, shared by cpu/slim_batch_norm.cpp and cuda/slim_batch_norm.cuh: no torch, no memory.
//
//   x_hat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps),  y = relu?(x_hat * weight + bias + residual?)
//   dx    = rstd * weight * (dz - sum(dz) / M - x_hat * sum(dz * x_hat) / M),  dz = dy * (y > 0)
//
// Kernels sum in A (float; double for double), one block of values at a time, and merge the blocks' moments in double.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define GRADAUG_INLINE __host__ __device__ __forceinline__
#else
#define GRADAUG_INLINE inline __attribute__((always_inline))
#endif

namespace gradaug::batch_norm {

// Moments of a set of values: m2 is the sum of squared deviations from the mean.
template <typename A>
struct Moments {
  A count, mean, m2;
};

// Adds `count` > 0 values, given by their sums about the current mean: sum of (v - mean), and of (v - mean)^2.
// An empty set may have any mean: the first of the values keeps the sums from cancelling, whatever the data's offset.
template <typename A>
GRADAUG_INLINE Moments<A> push_sums(Moments<A> set, A count, A sum, A sum_of_squares) {
  const A total = set.count + count;
  const A step = sum / total;
  const A m2 = set.m2 + (sum_of_squares - sum * step);
  return {total, set.mean + step, m2 < A(0) ? A(0) : m2};
}

// The moments of the union of two disjoint sets (Chan, Golub & LeVeque, 1979); either may be empty.
template <typename A>
GRADAUG_INLINE Moments<A> merge(Moments<A> a, Moments<A> b) {
  if (b.count == A(0)) return a;
  if (a.count == A(0)) return b;
  const A total = a.count + b.count;
  const A delta = b.mean - a.mean;
  const A step = delta * (b.count / total);
  return {total, a.mean + step, a.m2 + b.m2 + delta * step * a.count};
}

// Biased variance.
template <typename A>
GRADAUG_INLINE A variance(Moments<A> set) {
  return set.m2 / set.count;
}

// y = relu?((x - center) * scale + offset + residual?), per channel.
template <typename A>
struct Forward {
  A center, scale, offset;
};

// The mean is subtracted first, so that nothing cancels where |mean| >> std; what its rounding to A loses goes to
// offset.
template <typename A>
GRADAUG_INLINE Forward<A> forward_coefficients(double mean, double var, double weight, double bias, double eps) {
  const double scale = weight / sqrt(var + eps);
  const A center = static_cast<A>(mean);
  return {center, static_cast<A>(scale), static_cast<A>(bias - (mean - static_cast<double>(center)) * scale)};
}

template <typename A>
GRADAUG_INLINE A normalise(A x, A center, A scale, A offset) {
  return (x - center) * scale + offset;
}

// The ReLU with floor = 0, nothing with floor = -infinity. NaN stays NaN.
template <typename A>
GRADAUG_INLINE A relu(A z, A floor = A(0)) {
  return z < floor ? floor : z;
}

// The gradient that passes the ReLU.
template <typename A>
GRADAUG_INLINE A masked(A dy, A y) {
  return y > A(0) ? dy : A(0);
}

// dx = (dz - offset - (x - center) * slope) * scale, per channel.
template <typename A>
struct Backward {
  A center, scale, slope, offset;
};

// From sum_dz = sum(dz) and sum_dz_x = sum(dz * (x - mean)) over the M values of a channel. With given statistics the
// gradient does not flow through them: pass inv_m = 0, otherwise inv_m = 1 / M.
template <typename A>
GRADAUG_INLINE Backward<A> backward_coefficients(double mean, double var, double weight, double eps, double sum_dz,
                                                 double sum_dz_x, double inv_m) {
  const double rstd = 1.0 / sqrt(var + eps);
  return {static_cast<A>(mean), static_cast<A>(rstd * weight), static_cast<A>(rstd * rstd * sum_dz_x * inv_m),
          static_cast<A>(sum_dz * inv_m)};
}

// The differences are taken before scaling, so that dx is 0 where they vanish (one value per channel).
template <typename A>
GRADAUG_INLINE A input_gradient(A dz, A x, A center, A scale, A slope, A offset) {
  return ((dz - offset) - (x - center) * slope) * scale;
}

// dweight = sum(dz * x_hat); dbias is sum(dz) itself.
GRADAUG_INLINE double weight_gradient(double sum_dz_x, double var, double eps) { return sum_dz_x / sqrt(var + eps); }

}  // namespace gradaug::batch_norm

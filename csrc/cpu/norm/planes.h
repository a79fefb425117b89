// The loops of batch norm over planes (contiguous; norm/table.h) for any S: the elements of an instruction set,
// simd/. Included only in translation units that are compiled for one instruction set.
#pragma once

#include "cpu/norm/table.h"
#include "cpu/simd/portable.h"
#include "cpu/simd/unroll.h"
#include "slim_batch_norm.h"

namespace gradaug::batch_norm {
namespace {

constexpr int64_t kRun = 8;           // vectors of a plane that are summed before they are added to the other runs
constexpr int64_t kPlaneGroup = 256;  // channels that are summed together, image after image: in the order of memory

// The values of a plane that do not fill a vector at its end: of `pixels`, those from `begin` on are read, at `begin`
// where they alone fit, else up to the plane's end with the vector before. The others are replaced.
template <class Vectors_>
struct PlaneTail {
  using S = Vectors_;
  using T = typename S::T;
  using Raw = typename S::Raw;
  int64_t begin;  // of the vector
  int count;      // values in the plane from there on
  bool any;
  Raw keep;

  explicit GRADAUG_INLINE PlaneTail(int64_t pixels) {
    const int rest = static_cast<int>(pixels % S::width);
    any = rest > 0;
    begin = pixels < S::width ? 0 : pixels - S::width;
    count = pixels < S::width ? static_cast<int>(pixels) : S::width;
    keep = S::mask_from(S::width - rest);
  }

  GRADAUG_INLINE Raw read(const T* plane) const {
    return count < S::width ? S::read(plane + begin, count, Raw{}) : S::read(plane + begin);
  }
  GRADAUG_INLINE Raw read(const T* plane, Raw fill) const {
    return count < S::width ? S::read(plane + begin, count, fill) : only(S::read(plane + begin), fill);
  }
  GRADAUG_INLINE Raw only(Raw raw, Raw fill) const { return count < S::width ? raw : S::select(keep, raw, fill); }
  GRADAUG_INLINE void write(T* plane, Raw raw) const {
    count < S::width ? S::write(plane + begin, raw, count) : S::write(plane + begin, raw);
  }
};

// Two sums over kRun vectors of a plane.
template <class S>
struct PlaneRun {
  typename S::Wide first, second;

  GRADAUG_INLINE PlaneRun() : first(S::wide(0)), second(S::wide(0)) {}
};

// Two sums of a channel: runs are added in A, and a few of them in double.
template <class S>
struct PlaneSums {
  typename S::Wide first, second;
  double first_total, second_total;
  int64_t vectors;

  GRADAUG_INLINE PlaneSums() {}
  GRADAUG_INLINE void start() {
    first = second = S::wide(0);
    first_total = second_total = 0;
    vectors = 0;
  }
  GRADAUG_INLINE void flush() {
    first_total += S::sum(first);
    second_total += S::sum(second);
    first = second = S::wide(0);
    vectors = 0;
  }
  GRADAUG_INLINE void add(const PlaneRun<S>& run) {
    for (int i = 0; i < 2; i++) first.v[i] += run.first.v[i], second.v[i] += run.second.v[i];
    if ((vectors += kRun) >= 2 * S::width) flush();  // the fewer lanes, the more is in each
  }
};

// Adds a plane: add(run, at) for each whole vector of it, add_tail(run) for what is left.
template <class S, class Add, class AddTail>
GRADAUG_INLINE void for_runs(int64_t pixels, PlaneSums<S>& sums, const Add& add, const AddTail& add_tail) {
  const int64_t whole = pixels - pixels % S::width;
  for (int64_t begin = 0; begin < pixels; begin += kRun * S::width) {
    const int64_t end = begin + kRun * S::width;
    PlaneRun<S> run;
    for (int64_t at = begin; at < (end < whole ? end : whole); at += S::width) add(run, at);
    if (end >= pixels && whole < pixels) add_tail(run);
    sums.add(run);
  }
}

// A number near the mean, exact in T: the median of three means of a few values, as Centers.
template <class S>
GRADAUG_INLINE typename S::A plane_center(Planes<const typename S::T> x, int64_t n, int64_t n_end, int64_t c,
                                          int64_t pixels) {
  const int count = pixels < S::width ? static_cast<int>(pixels) : S::width;
  double mean[3];
  for (int i = 0; i < 3; i++) {
    const auto* p = x.at(n + (n_end - n - 1) * i / 2, c) + (pixels - count) * i / 2;
    const auto raw = count < S::width ? S::read(p, count, typename S::Raw{}) : S::read(p);
    mean[i] = S::sum(S::widen(raw)) / count;
  }
  const double low = mean[0] < mean[1] ? mean[0] : mean[1], high = mean[0] < mean[1] ? mean[1] : mean[0],
               upper = high < mean[2] ? high : mean[2];
  return S::widen(S::narrow(S::wide(static_cast<typename S::A>(low < upper ? upper : low)))).v[0][0];
}

// Reads x once; keeps the sums of a group of channels.
template <class S>
void plane_moments(Planes<const typename S::T> x, int64_t n, int64_t n_end, int64_t c, int64_t c_end, int64_t pixels,
                   PlaneMoments* result) {
  using Wide = typename S::Wide;
  using Raw = typename S::Raw;
  const PlaneTail<S> tail(pixels);
  for (int64_t count; c < c_end; c += count, result += count) {
    count = kPlaneGroup < c_end - c ? kPlaneGroup : c_end - c;
    typename S::A center[kPlaneGroup];
    PlaneSums<S> sums[kPlaneGroup];
    for (int64_t i = 0; i < count; i++) {
      center[i] = plane_center<S>(x, n, n_end, c + i, pixels);
      sums[i].start();
    }
    for (int64_t image = n; image < n_end; image++) {
      for (int64_t i = 0; i < count; i++) {
        const auto* plane = x.at(image, c + i);
        const Wide mid = S::wide(center[i]);
        const auto add = [&](PlaneRun<S>& run, Raw raw) GRADAUG_INLINED {
          const Wide value = S::widen(raw);
          GRADAUG_UNROLL
          for (int j = 0; j < 2; j++) {
            const auto d = value.v[j] - mid.v[j];
            run.first.v[j] += d;
            run.second.v[j] += d * d;
          }
        };
        for_runs<S>(
            pixels, sums[i], [&](PlaneRun<S>& run, int64_t at) GRADAUG_INLINED { add(run, S::read(plane + at)); },
            [&](PlaneRun<S>& run) GRADAUG_INLINED { add(run, tail.read(plane, S::narrow(mid))); });
      }
    }
    for (int64_t i = 0; i < count; i++) {
      sums[i].flush();
      result[i] = {center[i], sums[i].first_total, sums[i].second_total};
    }
  }
}

// Reads x (and the residual) once, writes y once.
template <class S, bool kResidual, bool kRelu>
void plane_apply(const PlanesForward<typename S::T>& planes, int64_t n, int64_t n_end, int64_t c, int64_t c_end,
                 int64_t pixels) {
  using Wide = typename S::Wide;
  using Raw = typename S::Raw;
  const PlaneTail<S> tail(pixels);
  const int64_t whole = pixels - pixels % S::width;
  while (n_end-- > n) {  // the image that has been read last is in the cache
    for (int64_t channel = c; channel < c_end; channel++) {
      const auto *x = planes.x.at(n_end, channel), *residual = kResidual ? planes.residual.at(n_end, channel) : nullptr;
      auto* y = planes.y.at(n_end, channel);
      const auto center = S::set(planes.center[channel]), scale = S::set(planes.scale[channel]),
                 offset = S::set(planes.offset[channel]);
      const auto result = [&](Raw raw, Raw add) GRADAUG_INLINED {
        Wide value = S::widen(raw), more;
        if constexpr (kResidual) more = S::widen(add);
        GRADAUG_UNROLL
        for (int i = 0; i < 2; i++) {
          value.v[i] = normalise(value.v[i], center, scale, offset);
          if constexpr (kResidual) value.v[i] += more.v[i];
          if constexpr (kRelu) value.v[i] = S::relu(value.v[i]);
        }
        return S::narrow(value);
      };
      for (int64_t i = 0; i < whole; i += S::width) {
        S::write(y + i, result(S::read(x + i), kResidual ? S::read(residual + i) : Raw{}));
      }
      if (tail.any) tail.write(y, result(tail.read(x), kResidual ? tail.read(residual) : Raw{}));
    }
  }
}

// Reads dy, x (and y) once, writes dz where asked to; keeps the sums of a group of channels.
template <class S, bool kRelu, bool kStore>
void plane_gradient_sums(const PlanesBackward<typename S::T>& planes, int64_t n, int64_t n_end, int64_t c,
                         int64_t c_end, int64_t pixels, GradientSums* result) {
  using Wide = typename S::Wide;
  using Raw = typename S::Raw;
  const PlaneTail<S> tail(pixels);
  for (int64_t count; c < c_end; c += count, result += count) {
    count = kPlaneGroup < c_end - c ? kPlaneGroup : c_end - c;
    PlaneSums<S> sums[kPlaneGroup];
    for (int64_t i = 0; i < count; i++) sums[i].start();
    for (int64_t image = n; image < n_end; image++) {
      for (int64_t i = 0; i < count; i++) {
        const auto *dy = planes.dy.at(image, c + i), *x = planes.x.at(image, c + i),
                   *y = kRelu ? planes.y.at(image, c + i) : nullptr;
        auto* dz = kStore ? planes.dz.at(image, c + i) : nullptr;
        const auto center = S::set(planes.center[c + i]);
        const auto add = [&](PlaneRun<S>& run, Raw raw, Raw x_raw) GRADAUG_INLINED {
          const Wide g = S::widen(raw), value = S::widen(x_raw);
          GRADAUG_UNROLL
          for (int j = 0; j < 2; j++) {
            run.first.v[j] += g.v[j];
            run.second.v[j] += g.v[j] * (value.v[j] - center);
          }
        };
        for_runs<S>(
            pixels, sums[i],
            [&](PlaneRun<S>& run, int64_t at) GRADAUG_INLINED {
              Raw raw = S::read(dy + at);
              if constexpr (kRelu) raw = S::positive(raw, S::read(y + at));
              if constexpr (kStore) S::write(dz + at, raw);
              add(run, raw, S::read(x + at));
            },
            [&](PlaneRun<S>& run) GRADAUG_INLINED {
              Raw raw = tail.read(dy);
              if constexpr (kRelu) raw = S::positive(raw, tail.read(y));
              if constexpr (kStore) tail.write(dz, raw);
              add(run, tail.only(raw, Raw{}), tail.read(x));
            });
      }
    }
    for (int64_t i = 0; i < count; i++) {
      sums[i].flush();
      result[i] = {sums[i].first_total, sums[i].second_total};
    }
  }
}

// Reads dy, x (and y) once, writes dx once.
template <class S, bool kRelu>
void plane_input_gradients(const PlanesBackward<typename S::T>& planes, int64_t n, int64_t n_end, int64_t c,
                           int64_t c_end, int64_t pixels) {
  using Wide = typename S::Wide;
  using Raw = typename S::Raw;
  const PlaneTail<S> tail(pixels);
  const int64_t whole = pixels - pixels % S::width;
  while (n_end-- > n) {  // the image that has been read last is in the cache
    for (int64_t channel = c; channel < c_end; channel++) {
      const auto *dy = planes.dy.at(n_end, channel), *x = planes.x.at(n_end, channel),
                 *y = kRelu ? planes.y.at(n_end, channel) : nullptr;
      auto* dx = planes.dx.at(n_end, channel);
      const auto center = S::set(planes.center[channel]), scale = S::set(planes.scale[channel]),
                 slope = S::set(planes.slope[channel]), offset = S::set(planes.offset[channel]);
      const auto result = [&](Raw raw, Raw x_raw, Raw y_raw) GRADAUG_INLINED {
        if constexpr (kRelu) raw = S::positive(raw, y_raw);
        Wide g = S::widen(raw);
        const Wide value = S::widen(x_raw);
        GRADAUG_UNROLL
        for (int i = 0; i < 2; i++) g.v[i] = input_gradient(g.v[i], value.v[i], center, scale, slope, offset);
        return S::narrow(g);
      };
      for (int64_t i = 0; i < whole; i += S::width) {
        S::write(dx + i, result(S::read(dy + i), S::read(x + i), kRelu ? S::read(y + i) : Raw{}));
      }
      if (tail.any) tail.write(dx, result(tail.read(dy), tail.read(x), kRelu ? tail.read(y) : Raw{}));
    }
  }
}

// What is compiled apart is chosen by what a call needs.
template <class S>
struct PlaneVariants {
  using T = typename S::T;
  using A = typename S::A;

  static void apply(const PlanesForward<T>& planes, int64_t n, int64_t n_end, int64_t c, int64_t c_end, int64_t pixels,
                    bool relu) {
    const bool residual = planes.residual.data != nullptr;
    (residual ? relu ? plane_apply<S, true, true> : plane_apply<S, true, false>
     : relu ? plane_apply<S, false, true>
              : plane_apply<S, false, false>)(planes, n, n_end, c, c_end, pixels);
  }

  static void gradient_sums(const PlanesBackward<T>& planes, int64_t n, int64_t n_end, int64_t c, int64_t c_end,
                            int64_t pixels, GradientSums* result) {
    const bool store = planes.dz.data != nullptr;
    (planes.y.data ? store ? plane_gradient_sums<S, true, true> : plane_gradient_sums<S, true, false>
     : store ? plane_gradient_sums<S, false, true>
                   : plane_gradient_sums<S, false, false>)(planes, n, n_end, c, c_end, pixels, result);
  }

  static void input_gradients(const PlanesBackward<T>& planes, int64_t n, int64_t n_end, int64_t c, int64_t c_end,
                              int64_t pixels) {
    (planes.y.data ? plane_input_gradients<S, true> : plane_input_gradients<S, false>)(planes, n, n_end, c, c_end,
                                                                                       pixels);
  }
};

}  // namespace
}  // namespace gradaug::batch_norm

// The loops of batch norm over rows (channels_last; norm/table.h) for any S: the elements of an instruction set,
// simd/. Included only in translation units that are compiled for one instruction set.
#pragma once

#include "cpu/norm/table.h"
#include "cpu/simd/portable.h"
#include "cpu/simd/unroll.h"
#include "slim_batch_norm.h"

namespace gradaug::batch_norm {
namespace {

constexpr int kStreams = 4;        // rows at once
constexpr int64_t kShortSums = 8;  // as many steps are summed in A, then in double

// A row is walked vector by vector. What belongs to the columns, sums or coefficients, lies in scratch memory in the
// order in which it is used, and each of it that is loaded serves kStreams rows. These are a quarter of all rows apart:
// four streams that the processor prefetches, each from one end to the other.
//
// Where the columns do not fill the last vector, it ends at the last column and overlaps the one before: results are
// written twice, and what has been summed before is replaced by what adds nothing.

enum class Cut { none, overlap, partial };

// Rows between the streams: a little less than possible where fewer of them then meet in a set of the first-level
// cache.
template <class T>
int64_t stream_rows(int64_t rows, int64_t pitch) {
  constexpr int64_t page = 4096, near = page / 8;
  const int64_t most = rows / kStreams, bytes = pitch * static_cast<int64_t>(sizeof(T));
  int64_t best = most, fewest = kStreams * kStreams;
  for (int64_t spacing = most; spacing > most - 16 && spacing * bytes > 2 * page && fewest > 0; spacing--) {
    int64_t meetings = 0;
    for (int apart = 1; apart < kStreams; apart++) {
      const int64_t offset = apart * spacing * bytes % page;
      if (offset < near || offset > page - near) meetings += kStreams - apart;
    }
    if (meetings < fewest) fewest = meetings, best = spacing;
  }
  return best;
}

// f.template operator()<kCut>(c, kept, cut): for each vector of columns, c the first of them, with the kKept vectors of
// scratch memory that belong to it. overlap: the columns before `cut` were in the vector before. partial: only `cut`
// are.
template <class S, int kKept, class F>
GRADAUG_INLINE void for_vectors(int64_t cols, typename S::A* kept, const F& f) {
  int64_t c = 0;
  for (; c + S::width <= cols; c += S::width, kept += kKept * S::width) f.template operator()<Cut::none>(c, kept, 0);
  if (c == cols) return;
  if (cols >= S::width) {
    f.template operator()<Cut::overlap>(cols - S::width, kept, static_cast<int>(c + S::width - cols));
  } else {
    f.template operator()<Cut::partial>(int64_t(0), kept, static_cast<int>(cols));
  }
}

// f.template operator()<R>(row, spacing): for R rows at once; flush() after every kShortSums times and at the end.
template <class T, class F, class Flush>
GRADAUG_INLINE void for_rows(int64_t begin, int64_t end, int64_t pitch, const F& f, const Flush& flush) {
  const int64_t spacing = stream_rows<T>(end - begin, pitch);
  int64_t steps = 0;
  for (int64_t row = begin; row < begin + spacing; row++) {
    f.template operator()<kStreams>(row, spacing);
    if (++steps % kShortSums == 0) flush();
  }
  for (int64_t row = begin + kStreams * spacing; row < end; row++) {
    f.template operator()<1>(row, int64_t(0));
    if (++steps % kShortSums == 0) flush();
  }
  flush();
}

// The rows of one step.
template <class T>
struct Streams {
  T* first;
  int64_t apart;

  GRADAUG_INLINE Streams(const Rows<T>& rows, int64_t row, int64_t spacing)
      : first(rows.data ? rows.at(row, 0) : nullptr), apart(spacing * rows.pitch) {}
  GRADAUG_INLINE T* at(int i, int64_t c) const { return first + i * apart + c; }
};

template <class S, Cut kCut>
GRADAUG_INLINE typename S::Raw read(const typename S::T* p, int cut) {
  if constexpr (kCut == Cut::partial) {
    return S::read(p, cut, typename S::Raw{});
  } else {
    return S::read(p);
  }
}

template <class S, Cut kCut>
GRADAUG_INLINE void write(typename S::T* p, typename S::Raw raw, int cut) {
  if constexpr (kCut == Cut::partial) {
    S::write(p, raw, cut);
  } else {
    S::write(p, raw);
  }
}

// Scratch memory: the coefficients of every column, in turn.
template <class S, int kKept>
GRADAUG_INLINE void keep_coefficients(const typename S::A* const (&coefficients)[kKept], int64_t cols,
                                      typename S::A* scratch) {
  for_vectors<S, kKept>(cols, scratch, [&]<Cut kCut>(int64_t c, typename S::A* kept, int) GRADAUG_INLINED {
    for (int i = 0; i < kKept; i++) S::keep(kept + i * S::width, S::arrange(coefficients[i] + c));
  });
}

// Scratch memory: the center of every column, and two sums that are 0.
template <class S>
GRADAUG_INLINE void keep_sums(const typename S::A* center, int64_t cols, typename S::A* scratch) {
  for_vectors<S, 3>(cols, scratch, [&]<Cut kCut>(int64_t c, typename S::A* kept, int) GRADAUG_INLINED {
    S::keep(kept, S::arrange(center + c));
    for (int i = 1; i < 3; i++) S::keep(kept + i * S::width, S::wide(0));
  });
}

// Adds the two sums of every column to those in double.
template <class S>
GRADAUG_INLINE void flush_sums(int64_t cols, typename S::A* scratch, double* first, double* second) {
  for_vectors<S, 3>(cols, scratch, [&]<Cut kCut>(int64_t c, typename S::A* kept, int) GRADAUG_INLINED {
    S::add_to(first + c, S::kept(kept + S::width));
    S::add_to(second + c, S::kept(kept + 2 * S::width));
    for (int i = 1; i < 3; i++) S::keep(kept + i * S::width, S::wide(0));
  });
}

template <class S>
GRADAUG_INLINE void add_to_kept(typename S::A* kept, const typename S::Wide& more) {
  typename S::Wide sum = S::kept(kept);
  sum.v[0] += more.v[0], sum.v[1] += more.v[1];
  S::keep(kept, sum);
}

// Reads x once.
template <class S>
void row_moments(Rows<const typename S::T> x, int64_t rows, int64_t cols, const typename S::A* center, double* sum,
                 double* sum_of_squares, typename S::A* scratch) {
  using T = typename S::T;
  using Wide = typename S::Wide;
  using Raw = typename S::Raw;
  keep_sums<S>(center, cols, scratch);
  const auto add = [&]<int R>(int64_t row, int64_t spacing) GRADAUG_INLINED {
    const Streams<const T> from(x, row, spacing);
    for_vectors<S, 3>(cols, scratch, [&]<Cut kCut>(int64_t c, typename S::A* kept, int cut) GRADAUG_INLINED {
      const Wide mid = S::kept(kept);
      Wide s = S::wide(0), q = S::wide(0);
      GRADAUG_UNROLL
      for (int r = 0; r < R; r++) {
        Raw raw = read<S, kCut>(from.at(r, c), cut);
        if constexpr (kCut == Cut::overlap) raw = S::select(S::mask_from(cut), raw, S::narrow(mid));
        const Wide value = S::widen(raw);
        GRADAUG_UNROLL
        for (int i = 0; i < 2; i++) {
          const auto d = value.v[i] - mid.v[i];
          s.v[i] += d;
          q.v[i] += d * d;
        }
      }
      add_to_kept<S>(kept + S::width, s);
      add_to_kept<S>(kept + 2 * S::width, q);
    });
  };
  for_rows<T>(0, rows, x.pitch, add, [&]() GRADAUG_INLINED { flush_sums<S>(cols, scratch, sum, sum_of_squares); });
}

// Reads x (and the residual) once, writes y once.
template <class S, bool kResidual, bool kRelu>
void row_apply(const RowsForward<typename S::T>& rows, int64_t begin, int64_t end, int64_t cols,
               typename S::A* scratch) {
  using T = typename S::T;
  using Wide = typename S::Wide;
  keep_coefficients<S, 3>({rows.center, rows.scale, rows.offset}, cols, scratch);
  const auto apply = [&]<int R>(int64_t row, int64_t spacing) GRADAUG_INLINED {
    const Streams<const T> x(rows.x, row, spacing), residual(rows.residual, row, spacing);
    const Streams<T> y(rows.y, row, spacing);
    for_vectors<S, 3>(cols, scratch, [&]<Cut kCut>(int64_t c, typename S::A* kept, int cut) GRADAUG_INLINED {
      const Wide center = S::kept(kept), scale = S::kept(kept + S::width), offset = S::kept(kept + 2 * S::width);
      GRADAUG_UNROLL
      for (int r = 0; r < R; r++) {
        Wide value = S::widen(read<S, kCut>(x.at(r, c), cut)), more;
        if constexpr (kResidual) more = S::widen(read<S, kCut>(residual.at(r, c), cut));
        GRADAUG_UNROLL
        for (int i = 0; i < 2; i++) {
          value.v[i] = normalise(value.v[i], center.v[i], scale.v[i], offset.v[i]);
          if constexpr (kResidual) value.v[i] += more.v[i];
          if constexpr (kRelu) value.v[i] = S::relu(value.v[i]);
        }
        write<S, kCut>(y.at(r, c), S::narrow(value), cut);
      }
    });
  };
  for_rows<T>(begin, end, rows.y.pitch, apply, [] {});
}

// Reads dy, x (and y) once, writes dz where asked to.
template <class S, bool kRelu, bool kStore>
void row_gradient_sums(const RowsBackward<typename S::T>& rows, int64_t begin, int64_t end, int64_t cols,
                       double* sum_dz, double* sum_dz_x, typename S::A* scratch) {
  using T = typename S::T;
  using Wide = typename S::Wide;
  using Raw = typename S::Raw;
  keep_sums<S>(rows.center, cols, scratch);
  const auto add = [&]<int R>(int64_t row, int64_t spacing) GRADAUG_INLINED {
    const Streams<const T> dy(rows.dy, row, spacing), x(rows.x, row, spacing), y(rows.y, row, spacing);
    const Streams<T> dz(rows.dz, row, spacing);
    for_vectors<S, 3>(cols, scratch, [&]<Cut kCut>(int64_t c, typename S::A* kept, int cut) GRADAUG_INLINED {
      const Wide center = S::kept(kept);
      Wide s = S::wide(0), q = S::wide(0);
      GRADAUG_UNROLL
      for (int r = 0; r < R; r++) {
        Raw raw = read<S, kCut>(dy.at(r, c), cut);
        if constexpr (kRelu) raw = S::positive(raw, read<S, kCut>(y.at(r, c), cut));
        if constexpr (kStore) write<S, kCut>(dz.at(r, c), raw, cut);
        if constexpr (kCut == Cut::overlap) raw = S::select(S::mask_from(cut), raw, Raw{});
        const Wide g = S::widen(raw), value = S::widen(read<S, kCut>(x.at(r, c), cut));
        GRADAUG_UNROLL
        for (int i = 0; i < 2; i++) {
          s.v[i] += g.v[i];
          q.v[i] += g.v[i] * (value.v[i] - center.v[i]);
        }
      }
      add_to_kept<S>(kept + S::width, s);
      add_to_kept<S>(kept + 2 * S::width, q);
    });
  };
  for_rows<T>(begin, end, rows.x.pitch, add, [&]() GRADAUG_INLINED { flush_sums<S>(cols, scratch, sum_dz, sum_dz_x); });
}

// Reads dy, x (and y) once, writes dx once.
template <class S, bool kRelu>
void row_input_gradients(const RowsBackward<typename S::T>& rows, int64_t begin, int64_t end, int64_t cols,
                         typename S::A* scratch) {
  using T = typename S::T;
  using Wide = typename S::Wide;
  using Raw = typename S::Raw;
  keep_coefficients<S, 4>({rows.center, rows.scale, rows.slope, rows.offset}, cols, scratch);
  const auto apply = [&]<int R>(int64_t row, int64_t spacing) GRADAUG_INLINED {
    const Streams<const T> dy(rows.dy, row, spacing), x(rows.x, row, spacing), y(rows.y, row, spacing);
    const Streams<T> dx(rows.dx, row, spacing);
    for_vectors<S, 4>(cols, scratch, [&]<Cut kCut>(int64_t c, typename S::A* kept, int cut) GRADAUG_INLINED {
      const Wide center = S::kept(kept), scale = S::kept(kept + S::width), slope = S::kept(kept + 2 * S::width),
                 offset = S::kept(kept + 3 * S::width);
      GRADAUG_UNROLL
      for (int r = 0; r < R; r++) {
        Raw raw = read<S, kCut>(dy.at(r, c), cut);
        if constexpr (kRelu) raw = S::positive(raw, read<S, kCut>(y.at(r, c), cut));
        Wide g = S::widen(raw);
        const Wide value = S::widen(read<S, kCut>(x.at(r, c), cut));
        GRADAUG_UNROLL
        for (int i = 0; i < 2; i++) {
          g.v[i] = input_gradient(g.v[i], value.v[i], center.v[i], scale.v[i], slope.v[i], offset.v[i]);
        }
        write<S, kCut>(dx.at(r, c), S::narrow(g), cut);
      }
    });
  };
  for_rows<T>(begin, end, rows.dx.pitch, apply, [] {});
}

// The mean of a few values would do, were there no outliers: the median of three means of kGroup rows each, taken from
// all over the rows.
template <class S>
struct Centers {
  using T = typename S::T;
  using A = typename S::A;
  using V = typename S::V;
  using Wide = typename S::Wide;
  static constexpr int64_t kGroup = 4;

  static void run(Rows<const T> x, int64_t rows, int64_t cols, A* center) {
    for (int64_t c = 0; c < cols; c += S::width) {
      if (c + S::width <= cols) {
        strip<Cut::none>(x, rows, c, 0, center + c);
      } else if (cols >= S::width) {
        strip<Cut::none>(x, rows, cols - S::width, 0, center + cols - S::width);
      } else {
        strip<Cut::partial>(x, rows, 0, static_cast<int>(cols), center);
      }
    }
  }

  template <Cut kCut>
  static GRADAUG_INLINE void strip(Rows<const T> x, int64_t rows, int64_t c, int cut, A* center) {
    Wide mid;
    if (rows < 3 * kGroup) {
      mid = mean<kCut>(x, rows, c, cut, 0, rows, rows);
    } else {
      Wide group[3];
      for (int i = 0; i < 3; i++) group[i] = mean<kCut>(x, rows, c, cut, i * kGroup, kGroup, 3 * kGroup);
      for (int i = 0; i < 2; i++) mid.v[i] = median(group[0].v[i], group[1].v[i], group[2].v[i]);
    }
    S::restore(center, S::widen(S::narrow(mid)));
  }

  // Of `count` rows from the `first` of `of` rows that are spread evenly over all.
  template <Cut kCut>
  static GRADAUG_INLINE Wide mean(Rows<const T> x, int64_t rows, int64_t c, int cut, int64_t first, int64_t count,
                                  int64_t of) {
    const Wide one = S::widen(read<S, kCut>(x.at(rows * first / of, c), cut));
    Wide sum = S::wide(0);
    for (int64_t i = 1; i < count; i++) {
      const Wide value = S::widen(read<S, kCut>(x.at(rows * (first + i) / of, c), cut));
      for (int j = 0; j < 2; j++) sum.v[j] += value.v[j] - one.v[j];
    }
    for (int j = 0; j < 2; j++) sum.v[j] = one.v[j] + sum.v[j] * S::set(A(1) / static_cast<A>(count));
    return sum;
  }

  static GRADAUG_INLINE V median(V a, V b, V c) {
    const V low = a < b ? a : b, high = a < b ? b : a;
    const V upper = high < c ? high : c;
    return low < upper ? upper : low;
  }
};

// What is compiled apart is chosen by what a call needs.
template <class S>
struct RowVariants {
  using T = typename S::T;
  using A = typename S::A;

  static void apply(const RowsForward<T>& rows, int64_t begin, int64_t end, int64_t cols, bool relu, A* scratch) {
    const bool residual = rows.residual.data != nullptr;
    (residual ? relu ? row_apply<S, true, true> : row_apply<S, true, false>
     : relu ? row_apply<S, false, true>
              : row_apply<S, false, false>)(rows, begin, end, cols, scratch);
  }

  static void gradient_sums(const RowsBackward<T>& rows, int64_t begin, int64_t end, int64_t cols, double* sum_dz,
                            double* sum_dz_x, A* scratch) {
    const bool store = rows.dz.data != nullptr;
    (rows.y.data ? store ? row_gradient_sums<S, true, true> : row_gradient_sums<S, true, false>
     : store ? row_gradient_sums<S, false, true>
                 : row_gradient_sums<S, false, false>)(rows, begin, end, cols, sum_dz, sum_dz_x, scratch);
  }

  static void input_gradients(const RowsBackward<T>& rows, int64_t begin, int64_t end, int64_t cols, A* scratch) {
    (rows.y.data ? row_input_gradients<S, true> : row_input_gradients<S, false>)(rows, begin, end, cols, scratch);
  }
};

}  // namespace
}  // namespace gradaug::batch_norm

// Blocks whose digits the sum loop would lose: where the sides are far apart, and where all
// exponentials are about 1. Such a block is looked at again, while it is in the L1 cache.
#pragma once

#include "row_state.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// f(xs, xt, to) for each vector of a block's columns; `to` is where the scratch keeps them.
template <DType K, class F>
FASTKD_INLINE void each_vector(const typename Kind<K>::Element* x,
                               const typename Kind<K>::Element* y, int64_t n,
                               typename Kind<K>::Acc* kept, F f) {
  using T = typename Kind<K>::Acc;
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    const Two<Vec<T>> xs = Kind<K>::load(x + i), xt = Kind<K>::load(y + i);
    f(xs.a, xt.a, kept + 2 * i);
    f(xs.b, xt.b, kept + 2 * i + Simd<T>::lanes);
  }
}

// The score differences of a block anew; returns the sum of e_s times these.
template <DType K, bool Keep>
__attribute__((noinline)) double lifted_cross(const typename Kind<K>::Element* x,
                                              const typename Kind<K>::Element* y, int64_t n,
                                              Scale<typename Kind<K>::Acc> of_s,
                                              Scale<typename Kind<K>::Acc> of_t,
                                              typename Kind<K>::Acc* kept) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  V cross{};
  each_vector<K>(x, y, n, kept, [&](V xs, V xt, T* to) FASTKD_LAMBDA {
    const V ys = of_s(xs), es = exp2(ys);
    const V other = zero_unless<V>(es != V{}, ys - of_t(xt));
    cross = fma(es, other, cross);
    if constexpr (Keep) storeu(to + 2 * Simd<T>::lanes, other);
  });
  return static_cast<double>(total(cross));
}

// Keeps a block's exponentials less 1, whose digits the 1 would take: at a high temperature that is
// all that tells p from q. False where a score is outside of [-1/2, 1/2] and its exponential not 0.
template <DType K>
__attribute__((noinline)) bool keep_less_one(const typename Kind<K>::Element* x,
                                             const typename Kind<K>::Element* y, int64_t n,
                                             Scale<typename Kind<K>::Acc> of_s,
                                             Scale<typename Kind<K>::Acc> of_t,
                                             typename Kind<K>::Acc* kept) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  const V bound = splat(T(0.5)), nothing = splat(T(sizeof(T) == 4 ? -127 : -1022));
  V most{};
  const auto keep = [&](V score, T* to) FASTKD_LAMBDA {
    const V size = larger(score, -score);
    most = larger(most, score < nothing ? V{} : size);
    storeu(to, size > bound ? V{} - T(1) : exp2m1(score));
  };
  each_vector<K>(x, y, n, kept, [&](V xs, V xt, T* to) FASTKD_LAMBDA {
    keep(of_s(xs), to);
    keep(of_t(xt), to + 2 * Simd<T>::lanes);
  });
  return largest(most) <= T(0.5);
}

// Where a block's sides are far apart (a teacher that is sure of another column), the student's
// scores lose their digits in the differences. So the block's mean difference is taken off the
// teacher's base first. Returns the sum of e_s (y_s - y_t), which is `cross`.
constexpr double kFar = 16.0;
template <DType K, bool Keep>
inline double lifted(const typename Kind<K>::Element* x, const typename Kind<K>::Element* y,
                     int64_t n, const Partial& at, typename Kind<K>::Acc* kept, double cross,
                     Block& block) {
  using T = typename Kind<K>::Acc;
  const double mean = cross / block.s_sum;
  if (!(__builtin_fabs(mean) > kFar && __builtin_fabs(mean) < kMostShift)) return cross;
  const Scale<T> of_s = at.s.scale<T>();
  Scale<T> of_t = at.t.scale<T>();
  const double before = static_cast<double>(of_t.base);
  of_t.base = static_cast<T>(before + mean / at.t.c);
  block.lift = (static_cast<double>(of_t.base) - before) * at.t.c;
  return lifted_cross<K, Keep>(x, y, n, of_s, of_t, kept) + block.lift * block.s_sum;
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd

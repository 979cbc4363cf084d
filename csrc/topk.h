// The pass over one row against a top-k teacher: K columns of the row (its support) and, where
// `tail` is given, one more outcome for the columns off the support (see TopKRows in
// fastkd/backends/base.py).
//
// The student's row is read once, as in pass_fused.h, and its exponentials are kept. Those on the
// support are then set to 0, and their blocks are summed again. So the tail's mass is never a
// difference of sums. The K + 1 points are computed in double, by a function of the divergence that
// is compiled once. Off the support, the gradient is the probability times one factor of the row.
// The support is written last.
#pragma once

#include "topk_by_columns.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// The least mass of the student's tail. Below it, exponentials relative to the row's maximum have
// underflowed.
constexpr double kLeastTail = 0x1p-80;

template <DType K, bool Hard, bool Out>
inline Sums<typename Kind<K>::Acc> student_sums(const typename Kind<K>::Element* x, int64_t n,
                                                Scale<typename Kind<K>::Acc> of_s,
                                                Scale<typename Kind<K>::Acc> of_hard,
                                                typename Kind<K>::Acc* kept) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  Two<V> s{}, hard{};
  V weighted{};
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    prefetch_ahead(x + i, kGroup<T>);
    const Two<V> xs = Kind<K>::load(x + i);
    const Two<V> ys{of_s(xs.a), of_s(xs.b)}, es{exp2(ys.a), exp2(ys.b)};
    s.a += es.a;
    s.b += es.b;
    if constexpr (Out) {
      weighted = fma(es.a, least_score(ys.a), weighted);
      weighted = fma(es.b, least_score(ys.b), weighted);
    }
    if constexpr (Hard) {
      hard.a += exp2(of_hard(xs.a));
      hard.b += exp2(of_hard(xs.b));
    }
    storeu(kept + i, es.a);
    storeu(kept + i + Simd<T>::lanes, es.b);
  }
  return {total(s.a + s.b), T(0), total(hard.a + hard.b), T(0), total(weighted)};
}

template <DType K, bool Hard, bool Out>
__attribute__((noinline)) void student_sum_loop(const Args& a, int64_t r, double c, int64_t chunk,
                                                const Workspace<typename Kind<K>::Acc>& w,
                                                Partial& out) {
  using T = typename Kind<K>::Acc;
  using Element = typename Kind<K>::Element;
  alignas(64) Element buffer[kBlock];
  const Reader<K> student{a.student.row(r), a.student.dtype, buffer};
  Partial partial{{rounded<T>(c)}, {}, {rounded<T>(kLog2E)}};
  const int64_t end = least(a.vocab, (chunk + 1) * kChunk);
  for (int64_t at = chunk * kChunk; at < end; at += kBlock) {
    const int64_t n = least(kBlock, end - at), m = padded<T>(n);
    const Element* x = student(at, n);
    const auto shift = [&](int64_t columns) {
      const double s = lowered<K>(partial.s, x, columns, partial.out_of_range);
      const double hard =
          Hard ? lowered<K>(partial.hard, x, columns, partial.out_of_range) : kInfinity;
      const bool moved = s < partial.s.base || hard < partial.hard.base;
      if (moved) partial.rebase<Expectation::none>(s, kInfinity, hard);
      return moved;
    };
    if (partial.s.empty()) shift(least(m, kPeek));
    if (m > kPeek && partial.s.base == kInfinity) shift(m);
    if (partial.out_of_range) break;
    const auto sums_now = [&] {
      return student_sums<K, Hard, Out>(x, m, partial.s.scale<T>(), partial.hard.scale<T>(),
                                        w.kept + at);
    };
    Sums<T> sums = sums_now();
    if (!sums.within() && shift(m)) sums = sums_now();
    w.blocks[at / kBlock] = {partial.s.base, kInfinity, static_cast<double>(sums.s)};
    partial.s.sum += static_cast<double>(sums.s);
    partial.s.weighted += static_cast<double>(sums.weighted_s);
    partial.hard.sum += static_cast<double>(sums.hard);
    if (Hard && a.smoothing != 0.0) {
      partial.scores += sum_of_scores<K>(x, n, partial.hard.scale<T>());
      partial.columns += static_cast<double>(n);
    }
  }
  out = partial;
}

// The factor that brings a block's exponentials to the row's base.
inline double to_row(const Side& row, const Block& block) {
  return block.s_base == kInfinity ? 0.0 : exp2((row.shift() - block.s_base) * row.c);
}

// Sets the kept exponentials on the support to 0, and returns the sum of all others.
template <DType K>
inline double sum_off_support(const Args& a, int64_t r, Workspace<typename Kind<K>::Acc>& w,
                              const Side& row) {
  using T = typename Kind<K>::Acc;
  const int64_t* at = support_of(a, r);
  const int64_t blocks = (a.vocab + kBlock - 1) / kBlock;
  __builtin_memset(w.touched, 0, static_cast<uint64_t>(blocks));
  for (int64_t i = 0; i < a.k; ++i) {
    if (at[i] < 0) continue;
    const int64_t group = at[i] / kGroup<T> * kGroup<T>;
    w.kept[group + column_in_group<K>(at[i] - group)] = T(0);
    w.touched[at[i] / kBlock] = 1;
  }
  double sum = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    double of_block = w.blocks[b].s_sum;
    if (w.touched[b]) {
      Two<Vec<T>> rest{};
      const int64_t end = padded<T>(least(kBlock, a.vocab - b * kBlock));
      for (int64_t i = 0; i < end; i += kGroup<T>) {
        rest.a += loadu<Vec<T>>(w.kept + b * kBlock + i);
        rest.b += loadu<Vec<T>>(w.kept + b * kBlock + i + Simd<T>::lanes);
      }
      of_block = static_cast<double>(total(rest.a + rest.b));
    }
    sum += of_block * to_row(row, w.blocks[b]);
  }
  return sum;
}

// factor: the soft term's gradient is the row's exponentials times this.
template <DType K, bool Hard, bool Stream>
__attribute__((noinline)) void topk_grad_loop(const Args& a, int64_t r, int64_t chunk,
                                              const Workspace<typename Kind<K>::Acc>& w,
                                              const Partial& row, double factor, const Factors& f) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  using Element = typename Kind<K>::Element;
  constexpr int64_t lanes = Simd<T>::lanes;
  alignas(64) Element buffer_s[Hard ? kBlock : 1], buffer_g[kBlock];
  const Reader<K> student{a.student.row(r), a.student.dtype, buffer_s};
  const Writer<K> write{a.grad.row(r), a.grad.dtype, buffer_g};
  const Scale<T> of_hard = row.hard.scale<T>();
  const V h = splat(static_cast<T>(Hard ? f.h / row.hard.sum : 0.0));
  const V uniform = splat(static_cast<T>(-f.uniform));
  const int64_t begin = chunk * kChunk, end = least(a.vocab, begin + kChunk);
  for (int64_t at = begin + (end - 1 - begin) / kBlock * kBlock; at >= begin; at -= kBlock) {
    const int64_t n = least(kBlock, end - at);
    const Element* x = Hard ? student(at, n) : nullptr;
    Element* g = write(at, n);
    const V by = splat(static_cast<T>(factor * to_row(row.s, w.blocks[at / kBlock])));
    const auto group = [&](int64_t i) FASTKD_LAMBDA {
      const T* kept = w.kept + at + i;
      Two<V> out{loadu<V>(kept) * by, loadu<V>(kept + lanes) * by};
      if constexpr (Hard) {
        const Two<V> logits = Kind<K>::load(x + i);
        out.a += fma(h, exp2(of_hard(logits.a)), uniform);
        out.b += fma(h, exp2(of_hard(logits.b)), uniform);
      }
      return out;
    };
    // the label's group is computed first: the gradient may overwrite its logits
    const bool here = Hard && f.column >= at && f.column < at + n;
    const int64_t label = here ? (f.column - at) / kGroup<T> * kGroup<T> : 0;
    Two<V> marked{};
    if (here) {
      T columns[kGroup<T>];
      marked = group(label);
      __builtin_memcpy(columns, &marked, sizeof marked);
      columns[column_in_group<K>(f.column - at - label)] -= static_cast<T>(f.label);
      __builtin_memcpy(&marked, columns, sizeof marked);
    }
    if (Stream && g != buffer_g) {
      for (int64_t i = 0; i < n; i += kGroup<T>) Kind<K>::past_caches(g + i, group(i));
    } else {
      for (int64_t i = 0; i < n; i += kGroup<T>) Kind<K>::store(g + i, group(i));
    }
    if (here) Kind<K>::store(g + label, marked);
    write.done(g, at, n);
  }
}

template <DType K>
inline double topk_row(const Args& a, int64_t r, const ThreadPool& pool,
                       Workspace<typename Kind<K>::Acc>& w) {
  using T = typename Kind<K>::Acc;
  const bool hard = a.at_one();
  const double c = kLog2E / a.temperature;
  gather(a, r, w);
  Partial row;
  const Outputs<T> outputs(a, r);
  const auto softmax = [&row] { return Softmax{-row.s.shift(), row.s.sum, row.s.weighted}; };
  double result;
  if (a.restricted && !hard) {  // the row off the support does not matter
    place_restricted(a, w);
  } else {
    if (w.kept == nullptr) return topk_row_by_columns(a, r, w);
    each_chunk(pool, a.vocab, false, [&](int64_t chunk) {
      const auto loop =
          a.outputs == nullptr
              ? (hard ? student_sum_loop<K, true, false> : student_sum_loop<K, false, false>)
              : (hard ? student_sum_loop<K, true, true> : student_sum_loop<K, false, true>);
      loop(a, r, c, chunk, w, w.partials[chunk]);
    });
    row = w.partials[0];
    for (int64_t i = 1; i * kChunk < a.vocab; ++i) row.add<Expectation::none>(w.partials[i]);
    if (row.out_of_range) return topk_row_by_columns(a, r, w);
    if (outputs && a.hard != 0.0)
      outputs.hard(a.label[r], __builtin_log2(row.hard.sum),
                   row.hard.scale<T>().of(label_logit(a, r)), row.scores);
    if (degenerate(a, row.s.sum, teacher_mass(w.points), result)) {
      if (a.restricted) place_restricted(a, w);
      point_outputs(a, r, w, softmax(), result);
      fill_gradient(a, r, result);
      return result;
    }
    if (a.restricted) {
      place_restricted(a, w);
    } else {
      place_student(a, w, row.s.shift(), row.s.c, sum_off_support<K>(a, r, w, row.s));
      const Points& x = w.points;
      if (!x.no_tail && x.tail_logp != -kInfinity && x.q_tail < kLeastTail)
        return topk_row_by_columns(a, r, w);
    }
  }
  Points& x = w.points;
  if (degenerate(a, x.total, teacher_mass(x), result)) {
    point_outputs(a, r, w, softmax(), result);
    fill_gradient(a, r, result);
    return result;
  }
  a.points(x);
  point_outputs(a, r, w, softmax(), x.value);
  double loss = a.soft * x.value;
  loss += loss_at_one(a, r, row.hard, row.scores);
  if (a.grad.data == nullptr) return loss;
  const double scale = scale_of<T>(a, r);
  if (scale != scale || loss != loss) {
    fill_gradient(a, r, kNaN);
    return loss;
  }
  const Factors f(a, r, scale, 1.0, row.hard.log_sum());
  if (a.restricted && !hard) {
    fill(a, r, 0, 0.0);
    write_support(a, r, w, f, 0.0, 1.0);
    return loss;
  }
  const double rate = x.q_tail > 0.0 ? x.tail_slope / x.q_tail : 0.0;
  const double factor = a.restricted ? 0.0 : f.k * ((rate - x.sum) / x.total);
  if (!(__builtin_fabs(factor) < kMostShift)) return topk_row_by_columns(a, r, w);
  const bool stream = a.stream && can_stream<Vec<T>>(a.grad.row(r));
  each_chunk(pool, a.vocab, true, [&](int64_t chunk) {
    const auto loop =
        hard ? (stream ? topk_grad_loop<K, true, true> : topk_grad_loop<K, true, false>)
             : (stream ? topk_grad_loop<K, false, true> : topk_grad_loop<K, false, false>);
    loop(a, r, chunk, w, row, factor, f);
  });
  write_support(a, r, w, f, row.hard.shift(), row.hard.sum);
  fill(a, r, a.vocab, 0.0);
  return loss;
}

template <DType K>
void topk(const Args& a, int64_t begin, int64_t end, const ThreadPool& pool) {
  using T = typename Kind<K>::Acc;
  const Flush flush;
  Workspace<T> w(a);
  T* out = static_cast<T*>(a.out);
  for (int64_t r = begin; r < end; ++r) {
    if (dropped(a, r)) {
      out[r] = 0;
      Outputs<T>(a, r).zero();
      fill_gradient(a, r, 0.0);
    } else if (!w.ready) {
      out[r] = static_cast<T>(kNaN);  // out of memory
      fill_gradient(a, r, kNaN);
    } else {
      out[r] = static_cast<T>(topk_row<K>(a, r, pool, w));
    }
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd

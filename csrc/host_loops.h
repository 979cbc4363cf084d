// The loops over labels, weights and losses that are no pass: one number per row, or K. Plain C++,
// the same for every instruction set.
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace fastkd {

// (fault, row, place) of the first kept row of top-k indices and log-probabilities that is not
// valid. fault: 0 none, 1 an index out of range, 2 an index given twice, 3 a log-probability that
// is positive or NaN.
template <class T>
std::tuple<int, int64_t, int64_t> validate_topk_rows(int64_t rows, int64_t k, const T* logprobs,
                                                     const int64_t* indices, const uint8_t* keep,
                                                     int64_t vocab) {
  std::vector<uint64_t> seen(static_cast<size_t>(vocab / 64 + 1));
  for (int64_t r = 0; r < rows; ++r) {
    if (keep != nullptr && !keep[r]) continue;
    const T* logp = logprobs + r * k;
    const int64_t* at = indices + r * k;
    int fault = 0;
    int64_t i = 0;
    for (; i < k && fault == 0; ++i) {
      if (at[i] == -1) continue;
      if (at[i] < -1 || at[i] >= vocab) {
        fault = 1;
        break;
      }
      const uint64_t bit = uint64_t{1} << (at[i] % 64);
      uint64_t& word = seen[static_cast<size_t>(at[i] / 64)];
      if (word & bit) fault = 2;
      if (fault == 0 && !(logp[i] <= T(0))) fault = 3;
      if (fault != 0) break;
      word |= bit;
    }
    if (fault != 0) return {fault, r, i};
    for (i = 0; i < k; ++i)
      if (at[i] >= 0) seen[static_cast<size_t>(at[i] / 64)] = 0;
  }
  return {0, -1, -1};
}

// Writes keep = (label is not `ignore`) where `keep` is given. Returns the first row whose label is
// out of range, or -1, and the number of kept rows.
inline std::pair<int64_t, int64_t> count_label_rows(int64_t n, const int64_t* label, int64_t ignore,
                                                    int64_t vocab, uint8_t* keep) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = label[i] != ignore;
    if (kept && (label[i] < 0 || label[i] >= vocab)) return {i, sum};
    if (keep != nullptr) keep[i] = kept;
    sum += kept;
  }
  return {-1, sum};
}

// scale = keep * weight; where `mean`, divided by its sum (0 where the sum is 0).
template <class T>
void row_scales(int64_t n, const uint8_t* keep, const T* weight, bool mean, T* scale) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    scale[i] = keep == nullptr || keep[i] ? weight[i] : T(0);
    sum += scale[i];
  }
  if (mean)
    for (int64_t i = 0; i < n; ++i) scale[i] = sum == 0.0 ? T(0) : static_cast<T>(scale[i] / sum);
}

// factor * sum of scale * loss, in double and in the order of the rows.
template <class T>
T weighted_sum_of(const T* loss, const T* scale, double factor, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i)
    sum += scale == nullptr ? loss[i] : static_cast<double>(loss[i]) * scale[i];
  return static_cast<T>(sum * factor);
}

constexpr int64_t kTile = 32;

// Columns [begin, end) of a matrix [b, c] as rows of one [c, b], no more than kTile of them. By a
// tile of their own: rows whose distance is a power of 2 throw each other out of a cache.
template <class E>
void transpose_columns(const E* from, E* to, int64_t b, int64_t c, int64_t begin, int64_t end) {
  E tile[kTile * kTile];
  for (int64_t i = 0; i < b; i += kTile) {
    const int64_t m = i + kTile < b ? kTile : b - i, n = end - begin;
    for (int64_t k = 0; k < m; ++k)
      for (int64_t j = 0; j < n; ++j) tile[j * kTile + k] = from[(i + k) * c + begin + j];
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < m; ++k) to[(begin + j) * b + i + k] = tile[j * kTile + k];
  }
}

// The same, of elements of so many bytes.
inline void transpose_columns(int64_t bytes, const char* from, char* to, int64_t b, int64_t c,
                              int64_t begin, int64_t end) {
  const auto as = [&](auto x) {
    using E = decltype(x);
    transpose_columns(reinterpret_cast<const E*>(from), reinterpret_cast<E*>(to), b, c, begin, end);
  };
  bytes == 2 ? as(uint16_t{}) : bytes == 4 ? as(uint32_t{}) : as(uint64_t{});
}

}  // namespace fastkd

// Features of a key, mixed by the attention weights of several queries: what a tile makes before its product, and adds
// to it afterwards.
#pragma once

#include "row_gemm.h"

namespace ffattr::cpu::FFATTR_ISA {

// Heads at a time: more would push the features of a key out of the caches before the next rows read them.
constexpr int64_t kMixHeads = 32;
// Rows that share what is loaded of the features.
constexpr int64_t kMixRows = 6;

// Columns of the features [S, H + 1, columns] of a key.
template <class T>
struct Features {
  const T* from;
  int64_t streams, stream_stride, head_stride;
};

// What each stream of a row is multiplied with, `stream_stride` apart.
template <class T>
struct Factors {
  const T* row[kMixRows];
  int64_t stream_stride;
};

// One stream of `parts` neighbours, each a Value, of `rows` rows; `added` to what is there. Inlined, so that pointers
// stay in registers; no branch lies between product and sum, so that they are one instruction for all numbers of rows
// or for none: what a row is rounded to does not depend on the rows beside it.
template <class Value, int rows, int parts, bool scaled, bool added, class T>
__attribute__((always_inline)) inline void mix_stream(const T* weights, int64_t heads, const Features<T>& features,
                                                      const Factors<T>& factors, int64_t s, int64_t k, T* const* to) {
  constexpr int lanes = sizeof(Value) / sizeof(T);
  const T* from = features.from + s * features.stream_stride + k;
  Value sum[rows][parts] = {};
  for (int64_t h = 0; h < heads; ++h) {
    Value feature[parts];
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) feature[p] = load_as<Value>(from + h * features.head_stride + p * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) sum[r][p] += weights[h * kTileRows + r] * feature[p];
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      T* place = to[r] + k + p * lanes;
      if constexpr (scaled) {
        const Value factor = load_as<Value>(factors.row[r] + s * factors.stream_stride + k + p * lanes);
        if constexpr (added)
          store(place, sum[r][p] * factor + load_as<Value>(place));
        else
          store(place, sum[r][p] * factor);
      } else {
        if constexpr (added) sum[r][p] += load_as<Value>(place);
        store(place, sum[r][p]);
      }
    }
}

template <class Value, int rows, int parts, bool scaled, class T>
__attribute__((always_inline)) inline void mix_columns(const T* weights, int64_t heads, const Features<T>& features,
                                                       const Factors<T>& factors, int64_t k, bool added, T* const* to) {
  for (int64_t s = 0; s < features.streams; ++s)
    if (added || s > 0)
      mix_stream<Value, rows, parts, scaled, true>(weights, heads, features, factors, s, k, to);
    else
      mix_stream<Value, rows, parts, scaled, false>(weights, heads, features, factors, s, k, to);
}

template <int rows, bool scaled, class T>
void mix_rows(const T* weights, int64_t heads, const Features<T>& features, const Factors<T>& factors, int64_t count,
              bool added, T* const* to) {
  constexpr int parts = rows > 4 ? 2 : rows == 4 ? 3 : 4;  // at most 12 sums, as in the product
  int64_t k = 0;
  for (; k + parts * kLanes<T> <= count; k += parts * kLanes<T>)
    mix_columns<Vector<T>, rows, parts, scaled>(weights, heads, features, factors, k, added, to);
  for (; k + kLanes<T> <= count; k += kLanes<T>)
    mix_columns<Vector<T>, rows, 1, scaled>(weights, heads, features, factors, k, added, to);
  for (; k < count; ++k) mix_columns<T, rows, 1, scaled>(weights, heads, features, factors, k, added, to);
}

// to(row)[k] = sum_s factor(row)[s][k] * sum_h weights[h][row] * features[s][h][k] for rows of one key, k < count.
// Without `scaled`, factor is 1.
template <bool scaled, class T, class Factor, class To>
inline void mix(const T* weights, int64_t rows, int64_t heads, const Features<T>& features, int64_t factor_stride,
                const Factor& factor, int64_t count, const To& to) {
  const int64_t blocks = (heads + kMixHeads - 1) / kMixHeads, step = (heads + blocks - 1) / blocks;
  for (int64_t h = 0; h < heads; h += step) {
    const int64_t some = std::min(step, heads - h);
    Features<T> of_heads = features;
    of_heads.from += h * features.head_stride;
    const int64_t groups = (rows + kMixRows - 1) / kMixRows, share = (rows + groups - 1) / groups;
    for (int64_t row = 0; row < rows; row += share) {
      const int64_t group = std::min(share, rows - row);
      const T* w = weights + h * kTileRows + row;
      Factors<T> factors{{}, factor_stride};
      T* places[kMixRows];
      for (int64_t r = 0; r < group; ++r) factors.row[r] = factor(row + r), places[r] = to(row + r);
      switch (group) {
        case 6:
          mix_rows<6, scaled>(w, some, of_heads, factors, count, h > 0, places);
          break;
        case 5:
          mix_rows<5, scaled>(w, some, of_heads, factors, count, h > 0, places);
          break;
        case 4:
          mix_rows<4, scaled>(w, some, of_heads, factors, count, h > 0, places);
          break;
        case 3:
          mix_rows<3, scaled>(w, some, of_heads, factors, count, h > 0, places);
          break;
        case 2:
          mix_rows<2, scaled>(w, some, of_heads, factors, count, h > 0, places);
          break;
        default:
          mix_rows<1, scaled>(w, some, of_heads, factors, count, h > 0, places);
      }
    }
  }
}

}  // namespace ffattr::cpu::FFATTR_ISA

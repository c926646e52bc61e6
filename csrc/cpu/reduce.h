// What a pair's vectors become where that is no Euclidean norm (ffattr/ops/reduction.py): L1 norms, and ALTI.
#pragma once

#include "mix.h"

namespace ffattr::cpu::FFATTR_ISA {

// What a number adds to the row's sum. For ALTI |y| - |y - v| = min(s v, 2 |y| - s v) with the sign s of y: without the
// difference of two large numbers. NaN stays NaN.
template <Reduction kind, class T>
inline Vector<T> term(Vector<T> v, Vector<T> y) {
  using Bits = decltype(v < y);  // integers of this size: signs are bits, without a comparison
  const Bits minus = (Bits)(Vector<T>{} - T{0}) ^ (Bits)(-(Vector<T>{} + T{0}));
  if constexpr (kind == Reduction::l1) {
    return (Vector<T>)((Bits)v & ~minus);
  } else {
    const Bits sign = (Bits)y & minus;
    const Vector<T> along = (Vector<T>)((Bits)v ^ sign), size = (Vector<T>)((Bits)y ^ sign), rest = size + size - along;
    return along < rest ? along : rest;
  }
}
template <Reduction kind, class T>
inline T term(T v, T y) {
  if constexpr (kind == Reduction::l1) return std::abs(v);
  const T along = std::signbit(y) ? -v : v, rest = 2 * std::abs(y) - along;
  return along < rest ? along : rest;
}

// Over `count` columns of (row - mean) * gain * size, where the whole is `total`. `gain` may be null, and is then 1.
template <Reduction kind, class T>
inline T sum_terms(const T* row, T mean, const T* gain, T size, const T* total, int64_t count) {
  Vector<T> sums{};
  T sum{0};
  const auto value = [&]<class Value>(Value, int64_t c) {
    Value v = load_as<Value>(row + c) - mean;
    if (gain != nullptr) v *= load_as<Value>(gain + c);
    return term<kind, T>(Value(v * size), kind == Reduction::l1 ? Value{} : load_as<Value>(total + c));
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= count; c += kLanes<T>) sums += value(Vector<T>{}, c);
  for (; c < count; ++c) sum += value(T{}, c);
  return sum + sum_of<T>(sums);
}

// Adds what is mixed of the residual to `count` columns of a feed-forward row, and returns their sum.
template <class T>
inline T add_mixed(const T* mixed, T scale, int64_t count, T* wide) {
  Vector<T> sums{};
  T sum{0};
  int64_t c = 0;
  for (; c + kLanes<T> <= count; c += kLanes<T>) {
    const Vector<T> value = load(wide + c) + load(mixed + c) * scale;
    sums += value;
    store(wide + c, value);
  }
  for (; c < count; ++c) sum += wide[c] += mixed[c] * scale;
  return sum + sum_of<T>(sums);
}

// What `reduce` (wide_tiles.h) does, with sums of terms in the place of norms. `mix(visit)` calls visit(pair, column,
// count, mixed) for all columns of all pairs.
template <Reduction kind, class T, class Place, class Mix>
inline void reduce_terms(const WideMap<T>& map, const Pair* pairs, int64_t rows, T* wide, int64_t width, const T* sizes,
                         const Place& place, const Mix& mix) {
  struct {
    T row, total, plain;
  } sums[kTileRows] = {};
  const int64_t scope = map.queries * map.columns;
  const auto total_of = [&](int64_t i, int64_t scope) {
    return kind == Reduction::l1 ? map.out  // which is not read
                                 : map.totals + (scope * map.queries + pairs[i].query) * map.width;
  };
  const auto size_of = [&](int64_t i) { return sizes == nullptr ? T{1} : sizes[i]; };
  mix([&](int64_t i, int64_t c, int64_t count, const T* mixed) {
    const T scale = map.residual_scale == nullptr ? T{1} : map.residual_scale[pairs[i].query];
    T* row = wide + place(i) * width + c;
    const T *of_row = total_of(i, 0), *of_total = total_of(i, 1);
    if (map.feeds)
      sums[i].row += sum_terms<kind>(row, T{0}, static_cast<const T*>(nullptr), size_of(i), of_row + c, count);
    sums[i].plain += add_mixed(mixed, scale, count, row);
    sums[i].total += sum_terms<kind>(row, T{0}, static_cast<const T*>(nullptr), size_of(i), of_total + c, count);
  });
  const auto write = [](T* to, T sum) { *to = kind == Reduction::alti && sum < T{0} ? T{0} : sum; };
  for (int64_t i = 0; i < rows; ++i) {
    T* to = map.out + pairs[i].query * map.columns + map.column(pairs[i]);
    write(to, sums[i].row);
    write(to + scope, sums[i].total);
    if (map.norm_scale == nullptr) continue;
    const T mean = map.centre ? sums[i].plain / static_cast<T>(map.width) : T{0};
    write(to + 2 * scope, sum_terms<kind>(wide + place(i) * width, mean, map.gamma,
                                          size_of(i) * map.norm_scale[pairs[i].query], total_of(i, 2), map.width));
  }
}

}  // namespace ffattr::cpu::FFATTR_ISA

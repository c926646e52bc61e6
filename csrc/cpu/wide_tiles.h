// The tiles of the two wide maps: rows are pairs (query, key), made, multiplied and reduced to norms in cache.
#pragma once

#include "row_gemm.h"

namespace ffattr::cpu::FFATTR_ISA {

// to[k] (+)= factor[k] * sum_h weight[h] * from[h * stride + k], for k < count.
template <class T>
inline void scaled_mix(const T* weight, int64_t heads, const T* from, int64_t stride, const T* factor, int64_t count,
                       bool accumulate, T* to) {
  constexpr int unroll = 4;  // four sums hide the latency of one
  int64_t k = 0;
  for (; k + unroll * kLanes<T> <= count; k += unroll * kLanes<T>) {
    Vector<T> sum[unroll] = {};
    for (int64_t h = 0; h < heads; ++h) {
      const Vector<T> w = broadcast(weight[h]);
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u) sum[u] += w * load(from + h * stride + k + u * kLanes<T>);
    }
#pragma GCC unroll 4
    for (int u = 0; u < unroll; ++u) {
      T* place = to + k + u * kLanes<T>;
      const Vector<T> value = sum[u] * load(factor + k + u * kLanes<T>);
      store(place, accumulate ? value + load(place) : value);
    }
  }
  for (; k < count; ++k) {
    T sum{0};
    for (int64_t h = 0; h < heads; ++h) sum += weight[h] * from[h * stride + k];
    to[k] = sum * factor[k] + (accumulate ? to[k] : T{0});
  }
}

// Weights of all heads, and of the residual as one more: weight[H + 1].
template <class T>
inline void gather_weights(const WideMap<T>& map, Pair pair, T* weight) {
  for (int64_t h = 0; h < map.heads; ++h) weight[h] = map.alpha[(h * map.queries + pair.query) * map.keys + pair.key];
  weight[map.heads] = map.is_itself(pair) ? T{1} : T{0};
}

// Writes the norms of one pair, whose feed-forward row is wide[d]; the row is overwritten.
template <class T>
inline void reduce(const WideMap<T>& map, Pair pair, const T* weight, T* wide) {
  const int64_t width = map.width, heads = map.heads + 1;
  const T* features = map.residual + pair.key * heads * width;
  const T scale = map.residual_scale == nullptr ? T{1} : map.residual_scale[pair.query];
  Vector<T> squares{}, total_squares{}, totals{};
  T square{0}, total_square{0}, total{0};
  int64_t c = 0;
  for (; c + kLanes<T> <= width; c += kLanes<T>) {
    const Vector<T> row = load(wide + c);
    Vector<T> mixed{};
    for (int64_t h = 0; h < heads; ++h) mixed += broadcast(weight[h]) * load(features + h * width + c);
    const Vector<T> sum = row + mixed * scale;
    squares += row * row;
    total_squares += sum * sum;
    totals += sum;
    store(wide + c, sum);
  }
  for (; c < width; ++c) {
    T mixed{0};
    for (int64_t h = 0; h < heads; ++h) mixed += weight[h] * features[h * width + c];
    square += wide[c] * wide[c];
    wide[c] += mixed * scale;
    total_square += wide[c] * wide[c];
    total += wide[c];
  }
  T* to = map.out + pair.query * map.keys + pair.key;
  to[0] = std::sqrt(square + sum_of<T>(squares));
  to[map.queries * map.keys] = std::sqrt(total_square + sum_of<T>(total_squares));
  if (map.norm_scale == nullptr) return;
  // The row is still in cache: subtracting the mean before squaring costs nothing and cancels nothing.
  const T mean = map.centre ? (total + sum_of<T>(totals)) / static_cast<T>(width) : T{0};
  squares = Vector<T>{};
  square = T{0};
  for (c = 0; c + kLanes<T> <= width; c += kLanes<T>) {
    Vector<T> part = load(wide + c) - mean;
    if (map.gamma != nullptr) part *= load(map.gamma + c);
    squares += part * part;
  }
  for (; c < width; ++c) {
    const T part = (wide[c] - mean) * (map.gamma == nullptr ? T{1} : map.gamma[c]);
    square += part * part;
  }
  to[2 * map.queries * map.keys] = std::sqrt(square + sum_of<T>(squares)) * map.norm_scale[pair.query];
}

template <class T>
void direct_tile(const DirectTile<T>& tile) {
  const WideMap<T>& map = *tile.map;
  const int64_t heads = map.heads + 1, neurons = tile.neurons;
  const Scratch<T>& scratch = tile.scratch;
  for (int64_t row = 0; row < tile.rows; ++row) gather_weights(map, tile.pairs[row], scratch.weights + row * heads);
  const auto produce = [&](int64_t k0, int64_t depth) {
    for (int64_t row = 0; row < tile.rows; ++row)
      for (int64_t s = 0; s < tile.streams; ++s)
        scaled_mix(scratch.weights + row * heads, heads,
                   tile.features + (s * map.keys + tile.pairs[row].key) * heads * neurons + k0, neurons,
                   tile.slope + (s * map.queries + tile.pairs[row].query) * neurons + k0, depth, s > 0,
                   scratch.a + row * kRowStride<T>);
  };
  multiply(tile.rows, neurons, map.width, tile.packed, scratch.a, scratch.c, produce);
  for (int64_t row = 0; row < tile.rows; ++row)
    reduce(map, tile.pairs[row], scratch.weights + row * heads, scratch.c + row * panels_width<T>(map.width));
}

template <class T>
void operator_tile(const OperatorTile<T>& tile) {
  const T one{1};
  const auto produce = [&](int64_t k0, int64_t depth) {
    for (int64_t row = 0; row < tile.rows; ++row) {
      const bool own = tile.first + row == tile.inner;
      for (int64_t s = 0; s < tile.streams; ++s)
        scaled_mix(&one, 1,
                   own ? tile.own + s * tile.stream_stride + k0
                       : tile.maps + (s * tile.inner + tile.first + row) * tile.neurons + k0,
                   0, tile.slope + s * tile.stream_stride + k0, depth, s > 0, tile.scratch.a + row * kRowStride<T>);
    }
  };
  multiply(tile.rows, tile.neurons, tile.width, tile.packed, tile.scratch.a, tile.scratch.c, produce);
  for (int64_t row = 0; row < tile.rows; ++row) {
    const T* from = tile.scratch.c + row * panels_width<T>(tile.width);
    if (tile.first + row == tile.inner)
      std::copy_n(from, tile.width, tile.own_row);
    else
      pack_row(from, tile.first + row, tile.inner, tile.width, tile.operator_packed);
  }
}

template <class T>
void apply_tile(const ApplyTile<T>& tile) {
  const WideMap<T>& map = *tile.map;
  const int64_t heads = map.heads, dim = tile.head_dim, inner = heads * dim;
  const Scratch<T>& scratch = tile.scratch;
  for (int64_t row = 0; row < tile.rows; ++row)
    gather_weights(map, tile.pairs[row], scratch.weights + row * (heads + 1));
  const auto produce = [&](int64_t k0, int64_t depth) {
    for (int64_t row = 0; row < tile.rows; ++row) {
      const T* weight = scratch.weights + row * (heads + 1);
      const T* values = tile.values + tile.pairs[row].key * inner;
      T* to = scratch.a + row * kRowStride<T> - k0;
      for (int64_t k = k0; k < k0 + depth;) {
        const int64_t end = std::min(k0 + depth, (k / dim + 1) * dim);
        const T w = weight[k / dim];
        for (; k < end; ++k) to[k] = w * values[k];
      }
    }
  };
  multiply(tile.rows, inner, map.width, tile.operator_packed, scratch.a, scratch.c, produce);
  for (int64_t row = 0; row < tile.rows; ++row) {
    T* wide = scratch.c + row * panels_width<T>(map.width);
    if (map.is_itself(tile.pairs[row]))
      for (int64_t c = 0; c < map.width; ++c) wide[c] += tile.own_row[c];
    reduce(map, tile.pairs[row], scratch.weights + row * (heads + 1), wide);
  }
}

}  // namespace ffattr::cpu::FFATTR_ISA

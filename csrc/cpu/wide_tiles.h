// The tiles of the two wide maps: rows are pairs (query, key), made, multiplied and reduced to norms in cache.
#pragma once

#include "reduce.h"

namespace ffattr::cpu::FFATTR_ISA {

// Weights of all heads, and of the residual as one more: weights[H + 1, kTileRows].
template <class T>
inline void gather_weights(const WideMap<T>& map, const Pair* pairs, int64_t rows, T* weights) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* alpha = map.alpha + pairs[i].query * map.columns + map.column(pairs[i]);
    for (int64_t h = 0; h < map.heads; ++h) weights[h * kTileRows + i] = alpha[h * map.queries * map.columns];
    weights[map.heads * kTileRows + i] = map.is_itself(pairs[i]) ? T{1} : T{0};
  }
}

// Divides the weights of each row by a power of two that is near their largest, which goes to `sizes`.
template <class T>
inline void scale_weights(int64_t heads, int64_t rows, T* weights, T* sizes) {
  for (int64_t i = 0; i < rows; ++i) {
    T largest{0};
    for (int64_t h = 0; h < heads; ++h) largest = std::max(largest, std::abs(weights[h * kTileRows + i]));
    int exponent = 0;
    if (largest > T{0} && std::isfinite(largest)) std::frexp(largest, &exponent);
    sizes[i] = std::ldexp(T{1}, exponent);
    const T scale = std::ldexp(T{1}, -exponent);  // of the smallest numbers beyond the largest: then in two steps
    for (int64_t h = 0; h < heads; ++h) {
      T& weight = weights[h * kTileRows + i];
      weight = std::isfinite(scale) ? weight * scale : std::ldexp(weight, -exponent);
    }
  }
}

// `run(first, count)` for pairs that share a key.
template <class Run>
inline void each_key(const Pair* pairs, int64_t rows, const Run& run) {
  for (int64_t first = 0; first < rows;) {
    int64_t end = first + 1;
    while (end < rows && pairs[end].key == pairs[first].key) ++end;
    run(first, end - first);
    first = end;
  }
}

template <class T>
struct Sums {
  T row, total, total_squares;
};

// Adds what is mixed of the residual to `count` columns of a feed-forward row.
template <class T>
inline void add_residual(const T* mixed, T scale, int64_t count, T* wide, Sums<T>& sums) {
  Vector<T> squares{}, totals{}, total_squares{};
  int64_t c = 0;
  for (; c + kLanes<T> <= count; c += kLanes<T>) {
    const Vector<T> row = load(wide + c), sum = row + load(mixed + c) * scale;
    squares += row * row;
    totals += sum;
    total_squares += sum * sum;
    store(wide + c, sum);
  }
  for (; c < count; ++c) {
    sums.row += wide[c] * wide[c];
    wide[c] += mixed[c] * scale;
    sums.total += wide[c];
    sums.total_squares += wide[c] * wide[c];
  }
  sums.row += sum_of<T>(squares);
  sums.total += sum_of<T>(totals);
  sums.total_squares += sum_of<T>(total_squares);
}

// ||gamma * centre(row)|| of a row that is still in cache: subtracting the mean before squaring costs nothing and
// cancels nothing.
template <class T>
inline T normed(const WideMap<T>& map, T total, const T* row) {
  const T mean = map.centre ? total / static_cast<T>(map.width) : T{0};
  Vector<T> squares{};
  T square{0};
  int64_t c = 0;
  for (; c + kLanes<T> <= map.width; c += kLanes<T>) {
    Vector<T> part = load(row + c) - mean;
    if (map.gamma != nullptr) part *= load(map.gamma + c);
    squares += part * part;
  }
  for (; c < map.width; ++c) {
    const T part = (row[c] - mean) * (map.gamma == nullptr ? T{1} : map.gamma[c]);
    square += part * part;
  }
  return std::sqrt(square + sum_of<T>(squares));
}

// Mixes what the residual adds to each pair, some columns at a time: visit(pair, first column, count, mixed).
template <class T, class Visit>
inline void mix_residual(const WideMap<T>& map, const Pair* pairs, int64_t rows, const Scratch<T>& scratch,
                         const Visit& visit) {
  const int64_t heads = map.heads + 1;
  for (int64_t c = 0; c < map.width; c += kDepthBlock<T>) {
    const int64_t count = std::min(kDepthBlock<T>, map.width - c);
    each_key(pairs, rows, [&](int64_t first, int64_t some) {
      const T* residual = map.residual + pairs[first].key * heads * map.width + c;
      mix<false, T>(
          scratch.weights + first, some, heads, {residual, 1, 0, map.width}, 0,
          [](int64_t) { return static_cast<const T*>(nullptr); }, count,
          [&](int64_t row) { return scratch.a + row * kRowStride<T>; });
      for (int64_t row = 0; row < some; ++row) visit(first + row, c, count, scratch.a + row * kRowStride<T>);
    });
  }
}

// Writes the norms of pairs whose feed-forward rows are those of scratch.c; pair i is row place(i), and its row was
// divided by sizes[i] (null: by 1). They are overwritten, and so is scratch.a.
template <class T, class Place>
inline void reduce(const WideMap<T>& map, const Pair* pairs, int64_t rows, const Scratch<T>& scratch, int64_t width,
                   const T* sizes, const Place& place) {
  const auto mixed = [&](const auto& visit) { mix_residual(map, pairs, rows, scratch, visit); };
  if (map.reduction == Reduction::l1)
    return reduce_terms<Reduction::l1>(map, pairs, rows, scratch.c, width, sizes, place, mixed);
  if (map.reduction == Reduction::alti)
    return reduce_terms<Reduction::alti>(map, pairs, rows, scratch.c, width, sizes, place, mixed);
  Sums<T> sums[kTileRows] = {};
  mixed([&](int64_t i, int64_t c, int64_t count, const T* residual) {
    const T scale = map.residual_scale == nullptr ? T{1} : map.residual_scale[pairs[i].query];
    add_residual(residual, scale, count, scratch.c + place(i) * width + c, sums[i]);
  });
  const int64_t scope = map.queries * map.columns;
  for (int64_t i = 0; i < rows; ++i) {
    T* to = map.out + pairs[i].query * map.columns + map.column(pairs[i]);
    const T size = sizes == nullptr ? T{1} : sizes[i];
    to[0] = std::sqrt(sums[i].row) * size;
    to[scope] = std::sqrt(sums[i].total_squares) * size;
    if (map.norm_scale != nullptr)
      to[2 * scope] = normed(map, sums[i].total, scratch.c + place(i) * width) * map.norm_scale[pairs[i].query] * size;
  }
}

// Which of `depth` neurons have a slope that is not zero, in any stream. NaN is not zero.
template <class T>
inline int64_t list_active(const T* slope, int64_t streams, int64_t stream_stride, int64_t depth, uint16_t* list) {
  int64_t count = 0;
  for (int64_t k = 0; k < depth; ++k) {
    bool active = false;
    for (int64_t s = 0; s < streams; ++s) active |= slope[s * stream_stride + k] != T{0};
    list[count] = static_cast<uint16_t>(k);
    count += active;
  }
  return count;
}

template <class T, class Product>
void direct_tile(const DirectTile<T>& tile) {
  const WideMap<T>& map = *tile.map;
  const int64_t heads = map.heads + 1, neurons = tile.neurons;
  const Scratch<T>& scratch = tile.scratch;
  gather_weights(map, tile.pairs, tile.rows, scratch.weights);
  T sizes[kTileRows];
  if constexpr (Product::kScalesRows) scale_weights(heads, tile.rows, scratch.weights, sizes);

  Strip strips[kMostStrips] = {{0, tile.rows, 0, nullptr}};
  int64_t count = 1;
  uint8_t place[kTileRows];
  for (int64_t i = 0; i < tile.rows; ++i) place[i] = static_cast<uint8_t>(i);
  if (tile.strip != 0) {
    count = 0;
    for (; count < kTileRows / tile.strip; ++count) strips[count] = {count * tile.strip, 0, 0, nullptr};
    for (int64_t i = 0; i < tile.rows; ++i) {
      Strip& strip = strips[tile.pairs[i].query - tile.first_query];
      place[i] = static_cast<uint8_t>(strip.first + strip.rows++);
    }
  }
  uint16_t lists[kMostStrips][kDepthBlock<T>];
  alignas(64) T dense[kMixRows][kDepthBlock<T>];
  typename Product::Rows made;

  const auto produce = [&](int64_t k0, int64_t depth) {
    const bool sparse = tile.strip != 0;
    if (sparse)
      for (int64_t i = 0; i < count; ++i)
        if (strips[i].rows > 0) {
          const T* slope = tile.slope + (tile.first_query + i) * neurons + k0;
          strips[i].depth = list_active(slope, tile.streams, map.queries * neurons, depth, lists[i]);
          strips[i].list = lists[i];
        }
    each_key(tile.pairs, tile.rows, [&](int64_t first, int64_t some) {
      const Pair* pairs = tile.pairs + first;
      const Features<T> features{tile.features + pairs->key * heads * neurons + k0, tile.streams,
                                 map.keys * heads * neurons, neurons};
      const auto mix_some = [&](int64_t from, int64_t count, const auto& to) {
        mix<true>(
            scratch.weights + first + from, count, heads, features, map.queries * neurons,
            [&](int64_t row) { return tile.slope + pairs[from + row].query * neurons + k0; }, depth, to);
      };
      if (!sparse && !Product::kScalesRows) {
        mix_some(0, some, [&](int64_t row) { return Product::row(scratch, made, first + row, row); });
        return;
      }
      if (!sparse) {
        const int64_t groups = (some + kMixRows - 1) / kMixRows, share = (some + groups - 1) / groups;
        for (int64_t from = 0; from < some; from += share) {
          const int64_t count = std::min(share, some - from);
          mix_some(from, count, [&](int64_t row) { return Product::row(scratch, made, first + from + row, row); });
          for (int64_t row = 0; row < count; ++row) Product::put(scratch, made, first + from + row, row, depth);
        }
        return;
      }
      mix_some(0, some, [&](int64_t row) { return dense[row]; });
      for (int64_t row = 0; row < some; ++row) {
        const Strip& strip = strips[pairs[row].query - tile.first_query];
        T* to = scratch.a + place[first + row] * kRowStride<T>;
        for (int64_t k = 0; k < strip.depth; ++k) to[k] = dense[row][strip.list[k]];
      }
    });
  };
  if (neurons == 0) std::fill_n(scratch.c, tile.rows * Product::width(map.width), T{0});
  Product::multiply(strips, count, neurons, map.width, tile.packed, tile.triangular, scratch.a, scratch.c, produce);
  reduce(map, tile.pairs, tile.rows, scratch, Product::width(map.width), Product::kScalesRows ? sizes : nullptr,
         [&](int64_t i) { return place[i]; });
}

// to[k] = sum_s from[s][k] * slope[s][k] for `depth` neurons, or for those of a list alone. `next`: read after `from`.
template <class T>
inline void scale(const T* from, const T* next, int64_t stream_stride, const T* slope, int64_t slope_stride,
                  int64_t streams, int64_t depth, const uint16_t* list, T* to) {
  const auto sum = [&]<class Value>(Value, int64_t k) {
    Value value = load_as<Value>(from + k) * load_as<Value>(slope + k);
    for (int64_t s = 1; s < streams; ++s)
      value += load_as<Value>(from + s * stream_stride + k) * load_as<Value>(slope + s * slope_stride + k);
    return value;
  };
  int64_t k = 0;
  if (list != nullptr) {
    for (; k < depth; ++k) to[k] = sum(T{}, list[k]);
    return;
  }
  for (; k + kLanes<T> <= depth; k += kLanes<T>) {
    __builtin_prefetch(next + k);  // rows of one depth block lie too far apart for the processor to guess
    store(to + k, sum(Vector<T>{}, k));
  }
  for (; k < depth; ++k) to[k] = sum(T{}, k);
}

template <class T, class Product>
void operator_tile(const OperatorTile<T>& tile) {
  Strip strip{0, tile.rows, 0, nullptr};
  typename Product::Rows made;
  uint16_t list[kDepthBlock<T>];
  const auto produce = [&](int64_t k0, int64_t depth) {
    const T* slope = tile.slope + k0;
    if constexpr (!Product::kScalesRows) {  // the other units take neighbours alone
      const int64_t active = list_active(slope, tile.streams, tile.stream_stride, depth, list);
      if (active <= kSparse * depth) strip.depth = active, strip.list = list;
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      const bool own = tile.first + row == tile.inner;
      const T* from = own ? tile.own + k0 : tile.maps + (tile.first + row) * tile.neurons + k0;
      scale(from, from + tile.neurons, own ? tile.stream_stride : tile.inner * tile.neurons, slope, tile.stream_stride,
            tile.streams, strip.depth, strip.list, Product::row(tile.scratch, made, row, 0));
      Product::put(tile.scratch, made, row, 0, depth);
    }
  };
  Product::multiply(&strip, 1, tile.neurons, tile.width, tile.packed, tile.triangular, tile.scratch.a, tile.scratch.c,
                    produce);
  const int64_t width = Product::width(tile.width), packed_rows = std::min(tile.rows, tile.inner - tile.first);
  Product::pack_rows(tile.scratch.c, width, tile.first, packed_rows, tile.inner, tile.width, tile.operator_packed);
  if (packed_rows < tile.rows) std::copy_n(tile.scratch.c + packed_rows * width, tile.width, tile.own_row);
}

template <class T, class Product>
void apply_tile(const ApplyTile<T>& tile) {
  const WideMap<T>& map = *tile.map;
  const int64_t dim = tile.head_dim, inner = map.heads * dim;
  const Scratch<T>& scratch = tile.scratch;
  gather_weights(map, tile.pairs, tile.rows, scratch.weights);
  T sizes[kTileRows];
  if constexpr (Product::kScalesRows) scale_weights(map.heads + 1, tile.rows, scratch.weights, sizes);
  typename Product::Rows made;
  const auto produce = [&](int64_t k0, int64_t depth) {
    for (int64_t row = 0; row < tile.rows; ++row) {
      const T* values = tile.values + tile.pairs[row].key * inner;
      T* to = Product::row(scratch, made, row, 0) - k0;
      for (int64_t k = k0; k < k0 + depth;) {
        const int64_t end = std::min(k0 + depth, (k / dim + 1) * dim);
        const T w = scratch.weights[k / dim * kTileRows + row];
        for (; k < end; ++k) to[k] = w * values[k];
      }
      Product::put(scratch, made, row, 0, depth);
    }
  };
  Strip strip{0, tile.rows, 0, nullptr};
  Product::multiply(&strip, 1, inner, map.width, tile.operator_packed, false, scratch.a, scratch.c, produce);
  for (int64_t row = 0; row < tile.rows; ++row) {
    if (!map.is_itself(tile.pairs[row])) continue;
    T* wide = scratch.c + row * Product::width(map.width);
    const T weight = scratch.weights[map.heads * kTileRows + row];  // 1, in parts of the row's size
    for (int64_t c = 0; c < map.width; ++c) wide[c] += weight * tile.own_row[c];
  }
  reduce(map, tile.pairs, tile.rows, scratch, Product::width(map.width), Product::kScalesRows ? sizes : nullptr,
         [](int64_t i) { return i; });
}

}  // namespace ffattr::cpu::FFATTR_ISA

// Attention-level norms by the quadratic form a^T G a, for a block of queries and keys.
#pragma once

#include "row_gemm.h"

namespace ffattr::cpu::FFATTR_ISA {

// Weights g of a query, to keys in columns column .. column + count: those of a head, or of the residual as one more.
template <class T>
inline void gram_weights(const GramMap<T>& map, int64_t g, int64_t query, int64_t column, int64_t count, double* to) {
  if (g < map.heads) {
    std::copy_n(map.alpha + (g * map.queries + query) * map.columns + column, count, to);
  } else {
    const int64_t own = map.position[query] - column;
    std::fill_n(to, count, 0.0);
    if (own >= 0 && own < count) to[own] = 1;
  }
}

template <class T>
inline void write_norm(const GramMap<T>& map, int64_t query, int64_t column, double square) {
  const T scale = map.row_scale == nullptr ? T{1} : map.row_scale[query];
  // Rounding can leave a vanishing square below zero; a NaN stays one.
  map.out[query * map.columns + column] = static_cast<T>(std::sqrt(square < 0 ? 0 : square)) * scale;
}

// Few heads: keys are the lanes, so nothing is summed across them, and an entry off the diagonal counts for its mirror
// image too.
template <class T>
void gram_lanes(const GramMap<T>& map, const GramBlock& block, double* scratch) {
  constexpr int lanes = kLanes<double>, unroll = 4;  // four vectors hide the latency of one
  double *weights = scratch, *triangle = scratch + map.size * kGramKeys;
  std::fill_n(weights, map.size * kGramKeys, 0.0);  // lanes without a key stay so
  for (int64_t m = 0; m < kGramKeys; ++m) {
    const double* gram = map.gram + (block.first_key + m) * map.size * map.size;
    double* to = triangle + m;
    for (int64_t g = 0; g < map.size; ++g)
      for (int64_t k = g; k < map.size; ++k, to += kGramKeys)
        *to = m < block.keys ? gram[g * map.size + k] * (k > g ? 2 : 1) : 0;
  }
  for (int64_t query = block.first_query; query < block.first_query + block.queries; ++query) {
    for (int64_t g = 0; g < map.size; ++g)
      gram_weights(map, g, query, block.first_column, block.keys, weights + g * kGramKeys);
    double squares[kGramKeys];
    for (int64_t part = 0; part < block.keys; part += unroll * lanes) {
      Vector<double> square[unroll] = {};
      const double* gram = triangle + part;
      for (int64_t g = 0; g < map.size; ++g) {
        Vector<double> inner[unroll] = {};
        for (int64_t k = g; k < map.size; ++k, gram += kGramKeys) {
          const double* weight = weights + k * kGramKeys + part;
#pragma GCC unroll 4
          for (int u = 0; u < unroll; ++u) inner[u] += load(gram + u * lanes) * load(weight + u * lanes);
        }
        const double* weight = weights + g * kGramKeys + part;
#pragma GCC unroll 4
        for (int u = 0; u < unroll; ++u) square[u] += inner[u] * load(weight + u * lanes);
      }
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u) store(squares + part + u * lanes, square[u]);
    }
    for (int64_t m = 0; m < block.keys; ++m) write_norm(map, query, block.first_column + m, squares[m]);
  }
}

// Many heads: a product with the matrix of one key, whose rows are then multiplied with their weights.
template <class T>
void gram_product(const GramMap<T>& map, const GramBlock& block, double* scratch) {
  const int64_t width = panels_width<double>(map.size);
  double *weights = scratch, *rows = weights + kTileRows * map.size;
  double *a = rows + kTileRows * padded_columns<double>(map.size), *packed = a + kTileRows * kRowStride<double>;
  pack_rows(map.gram + block.first_key * map.size * map.size, map.size, 0, map.size, map.size, map.size, packed);
  for (int64_t g = 0; g < map.size; ++g)
    for (int64_t i = 0; i < block.queries; ++i)
      gram_weights(map, g, block.first_query + i, block.first_column, 1, weights + i * map.size + g);
  std::fill_n(a, kTileRows * kRowStride<double>, 0.0);
  Strip strip{0, block.queries, 0, nullptr};
  NativeProduct<double>::multiply(&strip, 1, map.size, map.size, packed, false, a, rows,
                                  [&](int64_t k0, int64_t depth) {
                                    for (int64_t i = 0; i < block.queries; ++i)
                                      std::copy_n(weights + i * map.size + k0, depth, a + i * kRowStride<double>);
                                  });
  for (int64_t i = 0; i < block.queries; ++i) {
    double square = 0;
    for (int64_t g = 0; g < map.size; ++g) square += rows[i * width + g] * weights[i * map.size + g];
    write_norm(map, block.first_query + i, block.first_column, square);
  }
}

}  // namespace ffattr::cpu::FFATTR_ISA

// Attention-level norms by the quadratic form a^T G a. Keys are the lanes, so nothing is summed across them.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ffattr::cpu::FFATTR_ISA {

template <class T>
void gram_row(const GramRow<T>& row) {
  constexpr int lanes = kLanes<double>, parts = kGramKeys / lanes;
  const T scale = row.row_scale == nullptr ? T{1} : row.row_scale[row.query];
  T* out = row.out + row.query * row.keys;
  for (int64_t m = 0; m < row.keys; m += kGramKeys) {
    const int64_t count = std::min(kGramKeys, row.keys - m);
    for (int64_t g = 0; g < row.size; ++g) {
      double* weight = row.weights + g * kGramKeys;
      std::fill_n(weight, kGramKeys, 0.0);
      if (g < row.heads)
        std::copy_n(row.alpha + (g * row.queries + row.query) * row.keys + m, count, weight);
      else if (row.position >= m && row.position < m + count)
        weight[row.position - m] = 1;
    }
    double squares[kGramKeys];
    for (int part = 0; part < parts; part += 4) {  // four vectors hide the latency of one
      Vector<double> square[4] = {};
      for (int64_t g = 0; g < row.size; ++g) {
        Vector<double> inner[4] = {};
        for (int64_t k = g; k < row.size; ++k) {
          const double* gram = row.gram + (g * row.size + k) * row.stride + m + part * lanes;
          const double* weight = row.weights + k * kGramKeys + part * lanes;
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) inner[u] += load(gram + u * lanes) * load(weight + u * lanes);
        }
        const double* weight = row.weights + g * kGramKeys + part * lanes;
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) square[u] += inner[u] * load(weight + u * lanes);
      }
      for (int u = 0; u < 4; ++u) store(squares + (part + u) * lanes, square[u]);
    }
    // Rounding can leave a vanishing square below zero; a NaN stays one.
    for (int64_t i = 0; i < count; ++i) out[m + i] = static_cast<T>(std::sqrt(squares[i] < 0 ? 0 : squares[i])) * scale;
  }
}

}  // namespace ffattr::cpu::FFATTR_ISA

// C[rows, columns] = A[rows, depth] @ B[depth, columns] for a tile of rows whose A is made on the fly, in cache,
// and whose C is consumed in cache: neither is ever in memory as a whole (the blocking of Goto & van de Geijn 2008,
// with a producer where they pack A). B is packed once: depth blocks, in them column panels, in them rows.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ffattr::cpu::FFATTR_ISA {

// Two vectors wide: 12 accumulators of 16 registers, or 24 of 32.
constexpr int kPanelRows = FFATTR_VECTOR_BYTES == 64 ? 12 : 6;
template <class T>
constexpr int kPanelColumns = 2 * kLanes<T>;
static_assert(kTileRows % kTileStep == 0 && kTileStep % kPanelRows == 0);

template <class T>
inline int64_t panels_width(int64_t columns) {
  return (columns + kPanelColumns<T> - 1) / kPanelColumns<T> * kPanelColumns<T>;
}

// Row k of B into its packed place; columns beyond the end become zeros.
template <class T>
void pack_row(const T* row, int64_t k, int64_t depth, int64_t columns, T* packed) {
  const int64_t block = k / kDepthBlock<T> * kDepthBlock<T>, block_depth = std::min(kDepthBlock<T>, depth - block);
  T* to = packed + block * panels_width<T>(columns) + (k - block) * kPanelColumns<T>;
  for (int64_t panel = 0; panel < columns; panel += kPanelColumns<T>, to += block_depth * kPanelColumns<T>)
    for (int64_t c = 0; c < kPanelColumns<T>; ++c) to[c] = panel + c < columns ? row[panel + c] : T{0};
}

template <class T>
inline void micro_kernel(int64_t depth, const T* __restrict a, const T* __restrict b, T* __restrict c, int64_t width,
                         bool accumulate) {
  Vector<T> sum[kPanelRows][2] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> b0 = load(b + k * kPanelColumns<T>), b1 = load(b + k * kPanelColumns<T> + kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < kPanelRows; ++r) {
      const Vector<T> x = broadcast(a[r * kRowStride<T> + k]);
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kPanelRows; ++r) {
    T* to = c + r * width;
    if (accumulate) {
      sum[r][0] += load(to);
      sum[r][1] += load(to + kLanes<T>);
    }
    store(to, sum[r][0]);
    store(to + kLanes<T>, sum[r][1]);
  }
}

// c[rows, panels_width] = A @ B. `produce(k0, depth)` writes A[:, k0 : k0 + depth] of the tile's rows into
// `a`, rows kRowStride apart; the rows up to the next multiple of kPanelRows are multiplied too.
template <class T, class Produce>
inline void multiply(int64_t rows, int64_t depth, int64_t columns, const T* packed, const T* a, T* c,
                     const Produce& produce) {
  const int64_t width = panels_width<T>(columns);
  for (int64_t k0 = 0; k0 < depth; k0 += kDepthBlock<T>) {
    const int64_t block_depth = std::min(kDepthBlock<T>, depth - k0);
    produce(k0, block_depth);
    for (int64_t panel = 0; panel < width; panel += kPanelColumns<T>) {
      const T* b = packed + k0 * width + panel * block_depth;
      for (int64_t row = 0; row < rows; row += kPanelRows)
        micro_kernel(block_depth, a + row * kRowStride<T>, b, c + row * width + panel, width, k0 > 0);
    }
  }
}

}  // namespace ffattr::cpu::FFATTR_ISA

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

// Rows first .. first + rows of B, given `stride` apart, into their packed places; columns beyond the end become zeros.
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t first, int64_t rows, int64_t depth, int64_t columns, T* packed) {
  const int64_t width = panels_width<T>(columns);
  for (int64_t row = 0; row < rows;) {
    const int64_t block = (first + row) / kDepthBlock<T> * kDepthBlock<T>, k = first + row - block;
    const int64_t block_depth = std::min(kDepthBlock<T>, depth - block), some = std::min(rows - row, block_depth - k);
    for (int64_t panel = 0; panel < width; panel += kPanelColumns<T>) {
      T* to = packed + block * width + panel * block_depth + k * kPanelColumns<T>;
      const T* source = from + row * stride + panel;
      const int64_t real = std::min<int64_t>(kPanelColumns<T>, columns - panel);
      for (int64_t i = 0; i < some; ++i, to += kPanelColumns<T>, source += stride) {
        if (real == kPanelColumns<T>) {
          store(to, load(source));
          store(to + kLanes<T>, load(source + kLanes<T>));
        } else {
          std::fill(std::copy_n(source, real, to), to + kPanelColumns<T>, T{0});
        }
      }
    }
    row += some;
  }
}

// Rows of a tile with the same list of depths that are not zero: a share of a depth block.
struct Strip {
  int64_t first, rows;
  int64_t depth;         // of this block
  const uint16_t* list;  // [depth] of 0 .. the block's depth, or null: all of them
};

// Not inlined: among the loops around it the accumulators would not all stay in registers.
template <bool listed, class T>
__attribute__((noinline)) void micro_kernel(int64_t depth, [[maybe_unused]] const uint16_t* list, const T* __restrict a,
                                            const T* __restrict b, [[maybe_unused]] const T* next, T* __restrict c,
                                            int64_t width, bool accumulate) {
  Vector<T> sum[kPanelRows][2] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = b + (listed ? list[k] : k) * kPanelColumns<T>;
    if constexpr (listed) __builtin_prefetch(next + list[k] * kPanelColumns<T>);
    const Vector<T> b0 = load(row), b1 = load(row + kLanes<T>);
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

// The product in the numbers themselves. What tiles ask of a product, this one and those of bf16_gemm.h: where a row of
// A is made and what becomes of it, how B is packed, and the product of a tile.
template <class T>
struct NativeProduct {
  static constexpr bool kScalesRows = false;

  static int64_t width(int64_t columns) { return panels_width<T>(columns); }
  static void pack_rows(const T* from, int64_t stride, int64_t first, int64_t rows, int64_t depth, int64_t columns,
                        T* to) {
    cpu::FFATTR_ISA::pack_rows(from, stride, first, rows, depth, columns, to);
  }

  // Rows are made where they are read; `local` counts those that are made together.
  struct Rows {};
  static T* row(const Scratch<T>& scratch, Rows&, int64_t tile_row, int64_t) {
    return scratch.a + tile_row * kRowStride<T>;
  }
  static void put(const Scratch<T>&, const Rows&, int64_t, int64_t, int64_t) {}

  // c[rows, panels_width] = A @ B. `produce(k0, depth)` writes A[:, k0 : k0 + depth] of the tile's rows into `a`, rows
  // kRowStride apart, or for a strip the depths alone of which it leaves a list there; the rows up to the next multiple
  // of kPanelRows are multiplied too. With `triangular` terms beyond the diagonal of B are left out.
  template <class Produce>
  static void multiply(Strip* strips, int64_t count, int64_t depth, int64_t columns, const T* packed, bool triangular,
                       const T* a, T* c, const Produce& produce) {
    const int64_t width = panels_width<T>(columns);
    for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kDepthBlock<T>) {  // a product of no terms is zero
      const int64_t block_depth = std::min(kDepthBlock<T>, depth - k0);
      for (int64_t i = 0; i < count; ++i) strips[i].depth = block_depth, strips[i].list = nullptr;
      produce(k0, block_depth);
      for (int64_t panel = 0; panel < width; panel += kPanelColumns<T>) {
        const int64_t start = first_row(triangular, panel, depth, 1), skipped = std::max<int64_t>(start - k0, 0);
        if (skipped > 0 && skipped >= block_depth) continue;
        const T* b = packed + k0 * width + panel * block_depth;
        const T* next = b + block_depth * kPanelColumns<T>;
        const bool accumulate = start < k0;
        for (int64_t i = 0; i < count; ++i) {
          const Strip& strip = strips[i];
          for (int64_t row = strip.first; row < strip.first + strip.rows; row += kPanelRows) {
            const T* a_rows = a + row * kRowStride<T>;
            T* to = c + row * width + panel;
            if (strip.list == nullptr) {
              micro_kernel<false>(strip.depth - skipped, nullptr, a_rows + skipped, b + skipped * kPanelColumns<T>,
                                  next, to, width, accumulate);
            } else {
              const int64_t passed =
                  skipped == 0 ? 0 : std::lower_bound(strip.list, strip.list + strip.depth, skipped) - strip.list;
              micro_kernel<true>(strip.depth - passed, strip.list + passed, a_rows + passed, b, next, to, width,
                                 accumulate);
            }
          }
        }
      }
    }
  }
};

}  // namespace ffattr::cpu::FFATTR_ISA

// The product of row_gemm.h by a bfloat16 unit: of bfloat16 numbers, or of float32 ones as the sum of two bfloat16
// numbers each, high + low. Of the four products of those, low * low is below float32's last digits and left out.
#pragma once

#include "bf16_unit.h"
#include "mix.h"

namespace ffattr::cpu::FFATTR_ISA {

template <int parts>
struct Bf16Product {
  // Rows are scaled by a power of two before they are rounded: a tiny weight keeps its digits.
  static constexpr bool kScalesRows = true;
  // B of a block and a panel is 24 KiB, in one part or two: it and as many bytes of the rows that pass fill an L1
  // of 48. On a Sapphire Rapids core 256 deep in two parts was a fifth slower, 512 in one part an eighth.
  static constexpr int64_t kDepth = 384 / parts;
  static constexpr int64_t kStride = kDepth + 32;  // rows a power of two apart would share cache sets
  static constexpr int64_t kPart = kTileRows * kStride;
  static_assert(parts * kPart * sizeof(Bf16) <= kTileRows * kRowStride<float> * sizeof(float));
  static_assert(kTileRows % kUnitRows == 0 && kDepth % kUnitDepth == 0);

  static int64_t across(int64_t columns) { return padded(columns, kUnitColumns); }  // of B
  // Of C: a cache line more, for the same reason. With 1024 columns products are up to 1.4 times as fast by it.
  static int64_t width(int64_t columns) { return across(columns) + kUnitPadding; }
  static int64_t padded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

  // Rows are made here, and rounded into A by `put`.
  struct Rows {
    alignas(64) float row[kMixRows][kDepth];
  };
  static float* row(const Scratch<float>&, Rows& rows, int64_t, int64_t local) { return rows.row[local]; }

  static void put(const Scratch<float>& scratch, const Rows& rows, int64_t tile_row, int64_t local, int64_t depth) {
    Bf16* to = reinterpret_cast<Bf16*>(scratch.a) + tile_row * kStride;
    const float* from = rows.row[local];
    int64_t k = 0;
    const auto put_vector = [&](Vector<float> x) {
      if constexpr (parts == 2)
        store_parts(to + k, to + kPart + k, x);
      else
        store_high(to + k, x);
    };
    for (; k + kLanes<float> <= depth; k += kLanes<float>) put_vector(load(from + k));
    for (const int64_t end = padded(depth, kUnitDepth); k < end; k += kLanes<float>) {
      Vector<float> x{};
      for (int i = 0; i < kLanes<float> && k + i < depth; ++i) x[i] = from[k + i];
      put_vector(x);
    }
  }

  // Depth blocks, in them panels of 32 columns, in them parts, in them pairs of rows. `first` is even.
  static void pack_rows(const float* from, int64_t stride, int64_t first, int64_t rows, int64_t depth, int64_t columns,
                        float* to) {
    Bf16* packed = reinterpret_cast<Bf16*>(to);
    const int64_t across = Bf16Product::across(columns),
                  end = first + rows == depth ? padded(depth, kUnitDepth) : first + rows;
    for (int64_t k = first; k < end; k += 2) {
      const int64_t block = k / kDepth * kDepth, deep = padded(std::min(kDepth, depth - block), kUnitDepth);
      const float* even = from + (k - first) * stride;
      for (int64_t c = 0; c < across; c += kLanes<float>) {
        const int64_t panel = c / kUnitColumns * kUnitColumns;
        Bf16* place = packed + (block * across + panel * deep) * parts + (k - block) * kUnitColumns + (c - panel) * 2;
        const int64_t real = std::clamp<int64_t>(columns - c, 0, kLanes<float>);
        const Vector<float> x = some(even + c, k < depth ? real : 0);
        const Vector<float> y = some(even + stride + c, k + 1 < depth ? real : 0);
        const Words x_high = rounded(x), y_high = rounded(y);
        store_pairs(place, x_high, y_high);
        if constexpr (parts == 2)
          store_pairs(place + deep * kUnitColumns, rounded(remainder(x, x_high)), rounded(remainder(y, y_high)));
      }
    }
  }

  template <class Produce>
  static void multiply(Strip* strips, int64_t, int64_t depth, int64_t columns, const float* packed, bool triangular,
                       float* a_, float* c, const Produce& produce) {
    const Bf16* b = reinterpret_cast<const Bf16*>(packed);
    const Bf16* a = reinterpret_cast<const Bf16*>(a_);
    const int64_t across = Bf16Product::across(columns), stride = width(columns), rows = strips->rows;
    [[maybe_unused]] const Tiles tiles;
    for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kDepth) {  // a product of no terms is zero
      strips->depth = std::min(kDepth, depth - k0), strips->list = nullptr;
      produce(k0, strips->depth);
      const int64_t deep = padded(strips->depth, kUnitDepth);
      for (int64_t panel = 0; panel < across; panel += kUnitColumns) {
        const int64_t start = first_row(triangular, panel, depth, kUnitDepth),
                      skipped = std::max<int64_t>(start - k0, 0);
        const int64_t left = deep - skipped;
        if (skipped > 0 && left <= 0) continue;
        const Bf16* of_panel = b + (k0 * across + panel * deep) * parts;
        // The next panel comes from L3 or memory: a share of it in each step of depth that passes before it is read.
        const int64_t steps = std::max<int64_t>((rows + 2 * kUnitRows - 1) / (2 * kUnitRows) * (left / kUnitDepth), 1);
        const int64_t lines = (deep * parts + steps - 1) / steps;  // a row of a panel is a line in each part
        Ahead ahead{reinterpret_cast<const char*>(of_panel + deep * kUnitColumns * parts), lines};
        for (int64_t row = 0; row < rows; row += 2 * kUnitRows, ahead.from += 64 * lines * (left / kUnitDepth)) {
          const auto block = rows - row > kUnitRows ? unit_block<true, parts> : unit_block<false, parts>;
          block(left, a + row * kStride + skipped, kStride, kPart, of_panel + skipped * kUnitColumns,
                deep * kUnitColumns, c + row * stride + panel, stride, start < k0, ahead);
        }
      }
    }
  }

 private:
  static Vector<float> some(const float* from, int64_t count) {
    if (count == kLanes<float>) return load(from);
    Vector<float> x{};
    for (int64_t i = 0; i < count; ++i) x[i] = from[i];
    return x;
  }
};

}  // namespace ffattr::cpu::FFATTR_ISA

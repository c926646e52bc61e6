// The kernels of one bfloat16 unit, gathered in tables: what an isa_*.cpp file compiles.
#pragma once

#include "bf16_gemm.h"
#include "wide_tiles.h"

namespace ffattr::cpu::FFATTR_ISA {

// By one part, or two.
template <int parts>
const Kernels<float>& unit_table() {
  using Product = Bf16Product<parts>;
  static const Kernels<float> kernels{Product::pack_rows,
                                      direct_tile<float, Product>,
                                      operator_tile<float, Product>,
                                      apply_tile<float, Product>,
                                      nullptr,
                                      nullptr};
  return kernels;
}
template const Kernels<float>& unit_table<1>();
template const Kernels<float>& unit_table<2>();

// Whether a product by the unit is what it is by single multiplications: asked once, before anything relies on it.
bool unit_works() {
  constexpr int64_t depth = 70, columns = 40, rows = 37;
  std::vector<float> b(depth * columns), packed(96 * 64), c(kTileRows * (64 + kUnitPadding)),
      memory(kTileRows * kRowStride<float>);
  std::vector<float> a(rows * depth);
  const auto number = [](int64_t i) { return static_cast<float>((i * 7919 + 13) % 2003 - 1001) / 512; };
  for (int64_t i = 0; i < depth * columns; ++i) b[i] = number(i);
  for (int64_t i = 0; i < rows * depth; ++i) a[i] = number(3 * i + 1);
  using Product = Bf16Product<2>;
  Product::pack_rows(b.data(), columns, 0, depth, depth, columns, packed.data());
  const Scratch<float> scratch{memory.data(), c.data(), nullptr};
  auto made = std::make_unique<Product::Rows>();
  Strip strip{0, rows, 0, nullptr};
  Product::multiply(&strip, 1, depth, columns, packed.data(), false, scratch.a, scratch.c,
                    [&](int64_t k0, int64_t some) {
                      for (int64_t row = 0; row < rows; ++row) {
                        std::copy_n(a.data() + row * depth + k0, some, Product::row(scratch, *made, row, 0));
                        Product::put(scratch, *made, row, 0, some);
                      }
                    });
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double product = double{a[row * depth + k]} * b[k * columns + column];
        sum += product, size += std::abs(product);
      }
      if (!(std::abs(c[row * Product::width(columns) + column] - sum) <= 2e-5 * size)) return false;
    }
  return true;
}

}  // namespace ffattr::cpu::FFATTR_ISA

// The kernels of one instruction set, gathered in a table: what an isa_*.cpp file compiles.
#pragma once

#include "gram_tiles.h"
#include "wide_tiles.h"

namespace ffattr::cpu::FFATTR_ISA {

template <class T>
const Kernels<T>& table() {
  using Native = NativeProduct<T>;
  static const Kernels<T> kernels{pack_rows<T>,          direct_tile<T, Native>, operator_tile<T, Native>,
                                  apply_tile<T, Native>, gram_lanes<T>,          gram_product<T>};
  return kernels;
}
template const Kernels<float>& table();
template const Kernels<double>& table();

}  // namespace ffattr::cpu::FFATTR_ISA

// Operands of warp-wide products, 16 deep: how they are loaded from tiles in shared memory (layout.h) and multiplied.
// T is Bfloat16, Half or float; float is multiplied as three products of tf32, with nearly float's accuracy.
//
// A product's depth may be counted in any order as long as both operands agree. In float, a thread then holds columns
// 2 t and 2 t + 1 of a left operand, just as it does of a product, and a product becomes an operand without shuffles.
#pragma once

#include "instructions.h"
#include "layout.h"

namespace ffattr::cuda {

template <class T>
constexpr bool kIsFloat = sizeof(T) == 4;

// [16, 16]: of a left operand, and of a right one as two of 8 columns.
template <class T>
struct Left {
  uint32_t value[kIsFloat<T> ? 8 : 4];
};
template <class T>
struct Right {
  uint32_t value[2][kIsFloat<T> ? 4 : 2];
};
// A product [16, 16]: two of 8 columns, each with the rows g and g + 8.
struct Product {
  float value[2][4];
};

// Element (row, byte) and what lies beside it, in a tile of `row_bytes`.
__device__ __forceinline__ float element(uint32_t tile, int row, int byte, int row_bytes) {
  return load_shared(tile + swizzled(row, byte, row_bytes));
}

// Rows row .. row + 16 of a tile [rows, depth], at `column`.
template <class T>
__device__ __forceinline__ void load_left(Left<T>& to, uint32_t tile, int row, int column) {
  const int byte = column * static_cast<int>(sizeof(T));
  if constexpr (kIsFloat<T>) {
    const Lane lane = lane_of(threadIdx.x);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      to.value[i] = float_to_bits(
          element(tile, row + lane.g + i % 2 * 8, byte + 4 * (i / 4 * 8 + 2 * lane.t + i / 2 % 2), kRowBytes));
  } else {
    const int lane = threadIdx.x % 32;
    load_matrices(to.value, tile + swizzled(row + lane % 16, byte + lane / 16 * 16));
  }
}

// Rows row .. row + 16 of a tile [depth, columns], 16 columns from `column` on.
template <class T>
__device__ __forceinline__ void load_right(Right<T>& to, uint32_t tile, int row, int column, int row_bytes) {
  const int byte = column * static_cast<int>(sizeof(T));
  if constexpr (kIsFloat<T>) {
    const Lane lane = lane_of(threadIdx.x);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to.value[j][i] =
            float_to_bits(element(tile, row + i / 2 * 8 + 2 * lane.t + i % 2, byte + 4 * (8 * j + lane.g), row_bytes));
  } else {
    const int lane = threadIdx.x % 32;
    uint32_t four[4];
    load_matrices_transposed(four, tile + swizzled(row + lane % 16, byte + lane / 16 * 16, row_bytes));
#pragma unroll
    for (int i = 0; i < 4; ++i) to.value[i / 2][i % 2] = four[i];
  }
}

// The same places of a tile as a product has: rows row .. row + 16, 16 columns from `column` on.
template <class T>
__device__ __forceinline__ void load_factors(Product& to, uint32_t tile, int row, int column) {
  Left<T> left;
  load_left(left, tile, row, column);
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kIsFloat<T>) {
        to.value[j][2 * r] = bits_to_float(left.value[4 * j + r]);
        to.value[j][2 * r + 1] = bits_to_float(left.value[4 * j + 2 + r]);
      } else {
        const PairOf<T> pair = unpack<T>(left.value[2 * j + r]);
        to.value[j][2 * r] = pair.low;
        to.value[j][2 * r + 1] = pair.high;
      }
    }
}

template <class T>
__device__ __forceinline__ Left<T> as_left(const Product& from) {
  Left<T> to;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kIsFloat<T>) {
        to.value[4 * j + r] = float_to_bits(from.value[j][2 * r]);
        to.value[4 * j + 2 + r] = float_to_bits(from.value[j][2 * r + 1]);
      } else {
        to.value[2 * j + r] = pack<T>(from.value[j][2 * r], from.value[j][2 * r + 1]);
      }
    }
  return to;
}

// c [16, 8] += left @ right, where `right` is one half of a Right.
template <class T, int Words>
__device__ __forceinline__ void multiply(float (&c)[4], const Left<T>& left, const uint32_t (&right)[Words]) {
  if constexpr (kIsFloat<T>) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t a[4], a_rest[4], b[2], b_rest[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = to_tf32(bits_to_float(left.value[4 * k + i]));
        a_rest[i] = to_tf32(bits_to_float(left.value[4 * k + i]) - bits_to_float(a[i]));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b[i] = to_tf32(bits_to_float(right[2 * k + i]));
        b_rest[i] = to_tf32(bits_to_float(right[2 * k + i]) - bits_to_float(b[i]));
      }
      multiply_tf32(c, a_rest, b[0], b[1]);
      multiply_tf32(c, a, b_rest[0], b_rest[1]);
      multiply_tf32(c, a, b[0], b[1]);
    }
  } else {
    multiply(T{}, c, left.value, right[0], right[1]);
  }
}

}  // namespace ffattr::cuda

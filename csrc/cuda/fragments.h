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

// Where a thread's part of an operand begins in a tile: of `row` of a left one, whose rows are deep, and of the first
// 16 rows of a right one, whose rows are of its columns. Tiles begin at multiples of their rows, so that other columns
// are an exclusive or away: they and the swizzle change bits that nothing else has set.
template <class T>
__device__ __forceinline__ uint32_t left_place(uint32_t tile, int row, int row_bytes = kRowBytes) {
  const Lane lane = lane_of(threadIdx.x);
  if constexpr (kIsFloat<T>)
    return tile + swizzled(row + lane.g, 8 * lane.t, row_bytes);
  else
    return tile + swizzled(row + threadIdx.x % 16, threadIdx.x % 32 / 16 * 16, row_bytes);
}
template <class T>
__device__ __forceinline__ uint32_t right_place(uint32_t tile, int row_bytes) {
  const Lane lane = lane_of(threadIdx.x);
  if constexpr (kIsFloat<T>)
    return tile + swizzled(2 * lane.t, 4 * lane.g, row_bytes);
  else
    return tile + swizzled(threadIdx.x % 16, threadIdx.x % 32 / 16 * 16, row_bytes);
}

// 16 columns from `column` on, a multiple of 16 within a row.
template <class T>
__device__ __forceinline__ void load_left(Left<T>& to, uint32_t place, int column, int row_bytes = kRowBytes) {
  const uint32_t at = place ^ static_cast<uint32_t>(column * sizeof(T));
  if constexpr (kIsFloat<T>) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      to.value[i] = float_to_bits(load_shared((at ^ (i / 4 * 32 + i / 2 % 2 * 4)) + i % 2 * 8 * row_bytes));
  } else {
    load_matrices(to.value, at);
  }
}

// Rows row .. row + 16, 16 columns from `column` on, both multiples of 16.
template <class T>
__device__ __forceinline__ void load_right(Right<T>& to, uint32_t place, int row, int column, int row_bytes) {
  const uint32_t at = (place ^ static_cast<uint32_t>(column * sizeof(T))) + row * row_bytes;
  if constexpr (kIsFloat<T>) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)  // rows 2 t and 2 t + 1, whose swizzles differ in one bit
        to.value[j][i] = float_to_bits(load_shared((at ^ (32 * j) ^ (i % 2 * 16)) + (i / 2 * 8 + i % 2) * row_bytes));
  } else {
    uint32_t four[4];
    load_matrices_transposed(four, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) to.value[i / 2][i % 2] = four[i];
  }
}

// The same places of a tile as a product has: 16 columns from `column` on.
template <class T>
__device__ __forceinline__ void load_factors(Product& to, uint32_t place, int column) {
  Left<T> left;
  load_left(left, place, column);
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

// x as a number of tf32, which has 10 bits of fraction, and the rest, of which the product takes as many. (The
// instruction that rounds to tf32 is three on every GPU.)
__device__ __forceinline__ void split(uint32_t x, uint32_t& high, uint32_t& rest) {
  high = (x + 0x1000) & 0xFFFFE000;
  rest = float_to_bits(bits_to_float(x) - bits_to_float(high));
}

// c [16, 8] += left @ right, where `right` is one half of a Right.
template <class T, int Words>
__device__ __forceinline__ void multiply(float (&c)[4], const Left<T>& left, const uint32_t (&right)[Words]) {
  if constexpr (kIsFloat<T>) {
    float part[4] = {};  // tensor cores cut long sums off instead of rounding them
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t a[4], a_rest[4], b[2], b_rest[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) split(left.value[4 * k + i], a[i], a_rest[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) split(right[2 * k + i], b[i], b_rest[i]);
      multiply_tf32(part, a_rest, b[0], b[1]);
      multiply_tf32(part, a, b_rest[0], b_rest[1]);
      multiply_tf32(part, a, b[0], b[1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += part[i];
  } else {
    multiply(T{}, c, left.value, right[0], right[1]);
  }
}

}  // namespace ffattr::cuda

// Where things lie in shared memory, and which element of a product a thread holds.
#pragma once

#include "../elementary.h"

namespace ffattr::cuda {

// What a block of threads works on: pairs of a block of queries with neighbouring keys. All its rows meet the same
// `down`, the rows of one query the same slopes, the rows of one key the same features.
constexpr int kQueries = 64, kKeys = 2;

FFATTR_HD constexpr int64_t ceil_div(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }
FFATTR_HD constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// Tiles have rows of 128 bytes or a multiple. Their 16-byte chunks are permuted, as TMA does by itself, so that eight
// rows of the same column lie in different banks. Rows of 64 or 32 bytes do as well, of which 128 bytes hold several.
constexpr int kRowBytes = 128;
FFATTR_HD uint32_t swizzled(int row, int byte, int row_bytes = kRowBytes) {
  const int line = row_bytes < kRowBytes ? row * row_bytes / kRowBytes & (row_bytes / 16 - 1) : row & 7;
  return row * row_bytes + (byte ^ line << 4);
}

// Attention weights of a key as the left operand of a product, [64 queries, heads], in pieces of one row's bytes.
constexpr int kPieceBytes = kQueries * kRowBytes;
template <class T>
FFATTR_HD uint32_t weight_offset(int row, int head, int row_bytes) {
  const int heads = row_bytes / static_cast<int>(sizeof(T));
  return head / heads * kPieceBytes + swizzled(row, head % heads * static_cast<int>(sizeof(T)), row_bytes);
}
// Shorter rows where there is one piece; `heads` is a multiple of 16.
template <class T>
FFATTR_HD int weight_row_bytes(int heads) {
  const int bytes = heads * static_cast<int>(sizeof(T));
  return bytes <= 32 ? 32 : bytes <= 64 ? 64 : kRowBytes;
}
template <class T>
FFATTR_HD int weight_bytes(int heads, int row_bytes) {
  return round_up(heads * static_cast<int>(sizeof(T)), row_bytes) / row_bytes * kQueries * row_bytes;
}

// A thread's elements of a product [16, 8 j]: rows g and g + 8, columns 2 t and 2 t + 1 of every 8.
struct Lane {
  int g, t;
};
FFATTR_HD Lane lane_of(unsigned thread) { return {static_cast<int>(thread % 32 / 4), static_cast<int>(thread % 4)}; }

// In float8, a thread's left operand is 4 neighbours, of which it holds 2 and 2 eight apart as parts of a product.
// Instead of moving them, the neurons of `down` are put in this order, 32 by 32: place -> neuron.
FFATTR_HD constexpr int float8_neuron(int place) {
  const int quarter = place % 16 / 4, at = place % 4;
  return place / 16 * 16 + at / 2 * 8 + 2 * quarter + at % 2;
}

}  // namespace ffattr::cuda

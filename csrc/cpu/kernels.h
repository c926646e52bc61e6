// The border between the operators (one file each: checks, scratch memory, threads) and the kernels they call, which
// are compiled once for each instruction set: plain pointers in, one tile of work, no torch header.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ffattr::cpu {

// Most rows that one task multiplies, and what their number is a multiple of: whole panels of the micro-kernel for
// every instruction set. Of 72, 96 and 144 rows with blocks 256 and 384 deep, these were fastest on a Zen 3 core (512
// KiB of L2): a longer tile reads B less often, though its C no longer fits L2 whole.
constexpr int64_t kTileRows = 144;
constexpr int64_t kTileStep = 12;
// Depth of one block of a product: 24 KiB of a panel of B stays in L1 while the rows of a tile pass.
template <class T>
constexpr int64_t kDepthBlock = 1536 / sizeof(T);
// Rows a power of two apart would share cache sets: one more line keeps them apart.
template <class T>
constexpr int64_t kRowStride = kDepthBlock<T> + 64 / sizeof(T);
// Columns of B and of a product as stored: whole panels for every instruction set.
template <class T>
constexpr int64_t padded_columns(int64_t columns) {
  constexpr int64_t widest = 128 / sizeof(T);
  return (columns + widest - 1) / widest * widest;
}

struct Pair {
  int32_t query, key;
};

// alpha, position and the arguments named _TAIL in ffattr/ops.py; what both wide maps share.
template <class T>
struct WideMap {
  int64_t heads, queries, keys, width;
  const T* alpha;           // [H, N, M]
  const int64_t* position;  // [N]
  const T* residual;        // [M, H + 1, d]
  const T* residual_scale;  // [N] or null
  const T* gamma;           // [d] or null
  const T* norm_scale;      // [N] or null
  bool centre;
  T* out;  // [2 or 3, N, M]

  bool is_itself(Pair pair) const { return position[pair.query] == pair.key; }
};

// Scratch of one worker. `a` starts as zeros: rows beyond a tile's last are multiplied too.
template <class T>
struct Scratch {
  T* a;        // [kTileRows, kRowStride]
  T* c;        // [kTileRows, padded_columns]
  T* weights;  // [kTileRows, H + 1]
};

// ff_norms: up to kTileRows pairs.
template <class T>
struct DirectTile {
  const WideMap<T>* map;
  int64_t streams, neurons;
  const T* features;  // [S, M, H + 1, F]
  const T* slope;     // [S, N, F]
  const T* packed;    // down [F, d], packed
  const Pair* pairs;
  int64_t rows;
  Scratch<T> scratch;
};

// operator_norms, first half: rows `first` .. `first + rows` of J_n = (sum_s maps[s] * slope[s, n]) @ down, packed for
// the second half. Row `inner` is the query's own feed-forward row, written to `own_row` instead.
template <class T>
struct OperatorTile {
  int64_t streams, neurons, inner, width;
  const T* maps;          // [S, inner, F]
  int64_t stream_stride;  // between the streams of slope and own
  const T* slope;         // [F] of this query
  const T* own;           // [F] of this query
  const T* packed;        // down [F, d], packed
  int64_t first, rows;
  T* operator_packed;  // [inner, d], packed
  T* own_row;          // [d]
  Scratch<T> scratch;
};

// operator_norms, second half: up to kTileRows pairs of one query.
template <class T>
struct ApplyTile {
  const WideMap<T>* map;
  int64_t head_dim;
  const T* values;           // [M, H, dh]
  const T* operator_packed;  // [H * dh, d], packed
  const T* own_row;          // [d]
  const Pair* pairs;
  int64_t rows;
  Scratch<T> scratch;
};

// Keys that gram_norms treats at once, for every instruction set.
constexpr int64_t kGramKeys = 32;

// gram_norms: one query against all keys. `gram` is transposed, so that keys are the lanes of a vector.
template <class T>
struct GramRow {
  int64_t heads, queries, keys, size, query;
  const T* alpha;      // [H, N, M]
  int64_t position;    // of this query
  const double* gram;  // [G, G, stride], only k >= g read, those off the diagonal doubled
  int64_t stride;      // keys, rounded up to kGramKeys
  const T* row_scale;  // [N] or null
  T* out;              // [N, M]
  double* weights;     // scratch [G, kGramKeys]
};

template <class T>
struct Kernels {
  void (*pack_row)(const T* row, int64_t k, int64_t depth, int64_t columns, T* packed);
  void (*direct)(const DirectTile<T>&);
  void (*build_operator)(const OperatorTile<T>&);
  void (*apply_operator)(const ApplyTile<T>&);
  void (*gram)(const GramRow<T>&);
};

// The widest instruction set of this processor; FFATTR_CPU_ISA=baseline|avx2 asks for a narrower one.
enum class Isa { baseline, avx2, avx512 };
Isa isa();

template <class T>
const Kernels<T>& kernels();  // for that instruction set

}  // namespace ffattr::cpu

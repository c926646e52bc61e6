// The border between the operators (one file each: checks, scratch memory, threads) and the kernels they call, which
// are compiled once for each instruction set: plain pointers in, one tile of work, no torch header.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

// Whether the compiler and its assembler know AMX and AVX512-BF16 (GCC 11 with binutils 2.35, Clang 12), on Linux.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FFATTR_HAS_UNITS 1
#else
#define FFATTR_HAS_UNITS 0
#endif

namespace ffattr::cpu {

// Most rows that one task multiplies, and what their number is a multiple of: whole panels of the micro-kernel for
// every instruction set. Of 72, 96 and 144 rows with blocks 256 and 384 deep, these were fastest on a Zen 3 core (512
// KiB of L2): a longer tile reads B less often, though its C no longer fits L2 whole.
constexpr int64_t kTileRows = 144;
constexpr int64_t kTileStep = 12;
// Most queries of a tile in which each skips the neurons whose slope is zero.
constexpr int64_t kMostStrips = 6;
// Largest share of neurons with a slope for which the others are skipped, by vectors. On a Zen 3 core maps of 384 to
// 768 columns are made 3.4 to 6.7 times as fast at a share of 0.1, 2.2 to 3.2 at 0.25, 1.3 to 1.6 at 0.5, and as fast
// as by all neurons at 0.75; those of 128 columns 2.5 to 4.6, 1.8 to 2.6, 1.2 to 1.3, and as fast at 0.6.
constexpr double kSparse = 0.5;
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

// More columns of a unit's product, which its rows lie apart.
constexpr int64_t kUnitPadding = 16;

// A query, and a key of its sequence: both counted over all sequences.
struct Pair {
  int32_t query, key;
};

// What vectors are reduced to: ffattr/ops/reduction.py.
enum class Reduction { l2, l1, alti };

// alpha, position and the arguments from residual on (ffattr/ops/schemas.inc); what both wide maps share. All sequences
// together.
template <class T>
struct WideMap {
  int64_t heads, queries, columns, keys, width;
  const T* alpha;            // [H, N, M]
  const int64_t* position;   // [N]
  const int32_t* first_key;  // [N]: of the query's sequence, which is column 0 of alpha
  const T* residual;         // [K, H + 1, d]
  const T* residual_scale;   // [N] or null
  const T* gamma;            // [d] or null
  const T* norm_scale;       // [N] or null
  bool centre;
  Reduction reduction;
  const T* totals;    // [2 or 3, N, d] for ALTI, else null
  T* out;             // [2 or 3, N, M]
  bool feeds = true;  // whether there are neurons: else all feed-forward rows are zero

  int64_t column(Pair pair) const { return pair.key - first_key[pair.query]; }
  bool is_itself(Pair pair) const { return position[pair.query] == column(pair); }
};

// The first row of B, a multiple of `step`, from which on columns `column` and beyond have numbers where B is zero
// right of its diagonal; at least one step is left.
constexpr int64_t first_row(bool triangular, int64_t column, int64_t depth, int64_t step) {
  return triangular && depth > 0 ? std::min(column, depth - 1) / step * step : 0;
}

// Scratch of one worker. `a` starts as zeros: rows beyond a tile's last are multiplied too.
template <class T>
struct Scratch {
  T* a;        // [kTileRows, kRowStride]
  T* c;        // [kTileRows, padded_columns + kUnitPadding]
  T* weights;  // [H + 1, kTileRows]
};

// ff_norms: up to kTileRows pairs, those of a key together.
template <class T>
struct DirectTile {
  const WideMap<T>* map;
  int64_t streams, neurons;
  const T* features;  // [S, K, H + 1, F]
  const T* slope;     // [S, N, F]
  const T* packed;    // down [F, d], packed
  bool triangular;    // down is zero right of its diagonal
  const Pair* pairs;
  int64_t rows;
  // Where zeros of the slopes are skipped, which are those of a query: rows for each of its queries, from the first
  // one on; else 0.
  int64_t strip, first_query;
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
  bool triangular;        // down is zero right of its diagonal
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
  const T* values;           // [K, H, dh]
  const T* operator_packed;  // [H * dh, d], packed
  const T* own_row;          // [d]
  const Pair* pairs;
  int64_t rows;
  Scratch<T> scratch;
};

// gram_norms: its arguments (ffattr/ops/contract.py), all sequences together.
template <class T>
struct GramMap {
  int64_t heads, queries, columns, size;
  const T* alpha;           // [H, N, M]
  const int64_t* position;  // [N]
  const double* gram;       // [K, G, G]
  const T* row_scale;       // [N] or null
  T* out;                   // [N, M]
};

// Queries and keys that a task treats: up to kTileRows queries, and kGramKeys keys or, by product, one.
struct GramBlock {
  int64_t first_query, queries, first_key, keys, first_column;
};

// Keys side by side as lanes, for every instruction set; more sizes G than kGramLanes would push their matrices out of
// L2, and leave most lanes empty where keys are few.
constexpr int64_t kGramKeys = 32;
constexpr int64_t kGramLanes = 48;
constexpr int64_t gram_lanes_scratch(int64_t size) { return (size + size * (size + 1) / 2) * kGramKeys; }
constexpr int64_t gram_product_scratch(int64_t size) {
  return kTileRows * (size + padded_columns<double>(size) + kRowStride<double>)+size * padded_columns<double>(size);
}

template <class T>
struct Kernels {
  void (*pack_rows)(const T* from, int64_t stride, int64_t first, int64_t rows, int64_t depth, int64_t columns, T* to);
  void (*direct)(const DirectTile<T>&);
  void (*build_operator)(const OperatorTile<T>&);
  void (*apply_operator)(const ApplyTile<T>&);
  void (*gram_lanes)(const GramMap<T>&, const GramBlock&, double* scratch);
  void (*gram_product)(const GramMap<T>&, const GramBlock&, double* scratch);
};

// What this process runs, FFATTR_CPU_ISA's choice or the most that processor, compiler and operating system have
// together: the widest vectors, and a unit that multiplies bfloat16 numbers, or none.
enum class Vectors { baseline, avx2, avx512 };
enum class Unit { none, dots, tiles, emulated_dots, emulated_tiles };
struct Isa {
  Vectors vectors;
  Unit unit;
  const char* name;
  std::string why;  // not another one
};
const Isa& isa();

// How the numbers of a wide product are multiplied: as they are, as float32 in two parts, or rounded to bfloat16.
enum class Product { native, split, bf16 };
// The share of neurons with a slope (see kSparse) up to which vectors that skip the others are faster than a unit.
constexpr double sparse_share(Product product) {
  return product == Product::native ? kSparse : product == Product::split ? kSparse / 3 : kSparse / 6;
}
// What float32 operands use: in two parts on a matrix unit alone, which is more than three times as fast as vectors.
Product float32_product();

template <class T>
const Kernels<T>& kernels(Product product = Product::native);

}  // namespace ffattr::cpu

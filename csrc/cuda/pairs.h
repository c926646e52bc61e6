// What both kernels of ff_norms share: the pairs of a block of threads, their attention weights, and how norms end.
#pragma once

#include "instructions.h"
#include "layout.h"

namespace ffattr::cuda {

// Sequences of one launch. Those of a longer list take several launches, and no table in device memory.
constexpr int kSequences = 64;
struct Sequences {
  int count;
  int block[kSequences + 1], query[kSequences + 1], key[kSequences + 1];  // the first of each sequence
};

// The residual is one more head, which only a query's own key has. Where it would take another 16 heads, most pairs do
// without it: they are one launch, those that share a tile with such a pair are another one.
enum class Own { all, without, only };

struct Pairs {
  const float* alpha;           // [H, N, M]
  const int64_t* position;      // [N]
  const float* residual_scale;  // [N] or null
  const float* gamma;           // [d] or null
  const float* norm_scale;      // [N] or null
  const float* feature_bound;   // [K, H + 1] of float8, else null: the largest feature, summed over streams
  const float* slope_bound;     // [N] of float8, else null: the largest slope
  float* out;                   // [2 or 3, N, M], zeros
  int64_t queries, columns, keys;
  int neurons, width, heads;
  bool centre, triangular;
  Own own;
  Sequences sequences;

  // Heads that a product takes, and their number as loaded: in steps of 16.
  FFATTR_HD int rows() const { return heads + (own != Own::without); }
  FFATTR_HD int padded_rows() const { return round_up(rows(), 16); }

  // The first of `steps`, of `size` neurons each, in which `down` is not zero from `column` on, where it is zero right
  // of its diagonal; at least the last one is left.
  FFATTR_HD int first_step(int column, int size, int steps) const {
    return !triangular ? 0 : column / size < steps ? column / size : steps - 1;
  }
};

// What float8 rows are scaled to: their bound is met to bfloat16's rounding, and the type ends at 448.
constexpr float kLargest = 440;

// A tile of pairs.
struct Tile {
  int first, count;     // queries
  int first_key, keys;  // of the sequence
  int column;           // the first of its keys' columns

  __device__ bool has(int row, int at) const { return row < count && at < keys; }
};

// Tile number `index` of `columns` columns each; neighbours share their queries' slopes, which then stay in L2.
__device__ __forceinline__ Tile tile_of(const Pairs& p, unsigned index, int columns) {
  const auto per_block = static_cast<unsigned>((p.columns + columns - 1) / columns);
  const int block = static_cast<int>(index / per_block);
  int b = 0;
  while (b + 1 < p.sequences.count && p.sequences.block[b + 1] <= block) ++b;
  const int first = p.sequences.query[b] + (block - p.sequences.block[b]) * kQueries;
  const int left = p.sequences.query[b + 1] - first;
  return {first, left < kQueries ? left : kQueries, p.sequences.key[b], p.sequences.key[b + 1] - p.sequences.key[b],
          static_cast<int>(index % per_block) * columns};
}

__device__ __forceinline__ const float* weight_of(const Pairs& p, int query, int column) {
  return p.alpha + static_cast<int64_t>(query) * p.columns + column;
}

// Whether any pair of the tile has a weight, NaN included, and is this launch's to do.
__device__ inline bool wanted(const Pairs& p, const Tile& tile, int columns) {
  bool any = false, any_own = false;
  for (int i = threadIdx.x; i < tile.count * columns; i += blockDim.x) {
    const int query = tile.first + i / columns, column = tile.column + i % columns;
    if (column >= tile.keys) continue;
    any_own |= p.position[query] == column;
    const float* weight = weight_of(p, query, column);
    // What the query's own key alone decides needs no weights.
    for (int start = 0; start < p.heads && !any && p.own != Own::only;
         start += 8)  // loads that do not wait for each other
#pragma unroll
      for (int h = start; h < start + 8; ++h) any |= h < p.heads && weight[h * p.queries * p.columns] != 0;
  }
  if (p.own == Own::all) return __syncthreads_or(any || any_own);
  if ((__syncthreads_or(any_own) != 0) != (p.own == Own::only)) return false;
  return p.own == Own::only || __syncthreads_or(any);
}

// What is kept of a pair: what its weights were divided by, 0 if it has none, and sums over columns.
struct PairSums {
  float size, squares, total_squares, total, weighted_squares, weighted, gamma_squares;
};

// Weights of a tile of kKeys columns as left operands, and `sums` of all its pairs; for the first 128 threads.
template <class T>
__device__ void load_weights(const Pairs& p, const Tile& tile, uint8_t* weights, int row_bytes, PairSums* sums) {
  if (threadIdx.x >= kKeys * kQueries) return;
  const int slot = threadIdx.x / kQueries, row = threadIdx.x % kQueries, column = tile.column + slot;
  const bool there = tile.has(row, column);
  const int query = tile.first + (there ? row : 0);
  const int64_t pitch = p.queries * p.columns;
  const float* from = weight_of(p, query, there ? column : 0);
  const float* bound = nullptr;
  if (p.feature_bound != nullptr && there)
    bound = p.feature_bound + static_cast<int64_t>(tile.first_key + column) * (p.heads + 1);
  const float own = there && p.own != Own::without && p.position[query] == column ? 1 : 0;

  float largest = own, bounded = own != 0 && bound != nullptr ? bound[p.heads] : 0;
  bool any = own != 0;
  constexpr int kBatch = 8;  // loads that do not wait for each other
  for (int start = 0; there && start < p.heads; start += kBatch) {
    float batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) batch[i] = start + i < p.heads ? from[(start + i) * pitch] : 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      any |= batch[i] != 0;
      largest = fmaxf(largest, fabsf(batch[i]));
      if (bound != nullptr && start + i < p.heads) bounded += fabsf(batch[i]) * bound[start + i];
    }
  }
  float size = largest;
  // Not so small that the residual, which is divided by it too, would overflow when it is squared.
  if (bound != nullptr) size = fmaxf(bounded * (p.slope_bound[query] / kLargest), largest * 1e-12f);
  if (!any)
    size = 0;
  else if (!(size > 0))
    size = 1;  // weights that are not numbers, or features that are all zero
  uint8_t* const to = weights + slot * weight_bytes<T>(p.padded_rows(), row_bytes);
  for (int start = 0; start < p.padded_rows(); start += kBatch) {
    float batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) batch[i] = any && start + i < p.heads ? from[(start + i) * pitch] : 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int h = start + i;
      const float weight = h == p.heads ? own : batch[i];
      *reinterpret_cast<T*>(to + weight_offset<T>(row, h, row_bytes)) = from_float<T>(any ? weight / size : 0.f);
    }
  }
  sums[threadIdx.x] = {size, 0, 0, 0, 0, 0, 0};
}

// What `o` of a row is multiplied by before the residual is added.
__device__ __forceinline__ float row_factor(const Pairs& p, const Tile& tile, int row) {
  return p.residual_scale != nullptr && row < tile.count ? 1 / p.residual_scale[tile.first + row] : 1;
}

// Over the four threads that share a row.
__device__ __forceinline__ float across(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// From a block of columns of `o`: its squares. `at(j, i)` is the thread's element in column 8 j + 2 t + i.
template <int Columns, class At>
__device__ __forceinline__ void add_squares(PairSums& sums, int t, const At& at) {
  float squares = 0;
#pragma unroll
  for (int j = 0; j < Columns / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) squares += at(j, i) * at(j, i);
  squares = across(squares);
  if (t == 0) sums.squares += squares;
}

// From the same columns of `y = o + r`, of which `first` is the first: all that later scopes need. With the gain g and
// the mean m of y, sum g^2 (y - m)^2 = sum g^2 y^2 - 2 m sum g^2 y + m^2 sum g^2.
template <int Columns, class At>
__device__ __forceinline__ void add_total(PairSums& sums, int t, const Pairs& p, int first, const At& at) {
  float total_squares = 0, total = 0, weighted_squares = 0, weighted = 0, gamma_squares = 0;
#pragma unroll
  for (int j = 0; j < Columns / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + 8 * j + 2 * t + i;
      const float y = at(j, i);
      const float gain = column >= p.width ? 0 : p.gamma == nullptr ? 1 : p.gamma[column], scaled = gain * y;
      total_squares += y * y;
      total += y;
      weighted_squares += scaled * scaled;
      weighted += gain * scaled;
      gamma_squares += gain * gain;
    }
  total_squares = across(total_squares), total = across(total), weighted_squares = across(weighted_squares);
  weighted = across(weighted), gamma_squares = across(gamma_squares);
  if (t != 0) return;
  sums.total_squares += total_squares;
  sums.total += total;
  sums.weighted_squares += weighted_squares;
  sums.weighted += weighted;
  sums.gamma_squares += gamma_squares;
}

// Norms of a pair; those without weights stay zero.
__device__ inline void store_norms(const Pairs& p, int query, int column, const PairSums& s) {
  if (s.size == 0) return;
  float* to = p.out + static_cast<int64_t>(query) * p.columns + column;
  const int64_t scope = p.queries * p.columns;
  const float total_size = p.residual_scale == nullptr ? s.size : s.size * fabsf(p.residual_scale[query]);
  to[0] = sqrtf(s.squares) * s.size;
  to[scope] = sqrtf(s.total_squares) * total_size;
  if (p.norm_scale == nullptr) return;
  float square = s.weighted_squares;
  if (p.centre) {
    const float mean = s.total / p.width;
    square += mean * (mean * s.gamma_squares - 2 * s.weighted);
    if (square < 0) square = 0;  // rounding; a NaN stays one
  }
  to[2 * scope] = sqrtf(square) * total_size * p.norm_scale[query];
}

}  // namespace ffattr::cuda

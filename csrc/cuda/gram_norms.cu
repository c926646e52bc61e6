// gram_norms (contract: ffattr/ops/contract.py) on GPUs: a quadratic form in float64 for each pair, no d-wide work.
//
// Lanes are queries, a warp has one key: they share every entry of its Gram matrix, which is one load for all of them.
// The matrix is read as it lies, each entry once for kLanes * kEach queries, the upper half by blocks of kRows rows.
// Attention weights are read along the keys, in whole sectors, and turned around in shared memory.
//
// A pair reads 4 H bytes of weights and takes H^2 / 2 + (kRows / 2 + 1) H products. On an H100, with 16.7e12 of them
// and 3.3e12 bytes a second, the two are equal at 34 heads: with fewer, memory is the limit. A conversion to float64
// costs four products, and one is made for each kRows products.
#include "../gram_arguments.h"
#include "instructions.h"
#include "operators.h"

namespace ffattr::cuda {
namespace {

constexpr const char* kOp = "gram_norms";
constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps;
constexpr int kRows = 4, kEach = 4;            // rows of the matrix and queries that a thread has at a time
constexpr int kBlockQueries = kLanes * kEach;  // of a block of threads
constexpr int kSumPitch = kBlockQueries + 2;   // threads that read neighbouring sums meet different banks
constexpr int kTogether = 16;                  // neighbouring blocks of queries that share their keys' matrices in L2
constexpr int kMostShared = 84 << 10;          // of a block, if it can be: two for each SM

struct Gram {
  const float* alpha;       // [H, N, M]
  const int64_t* position;  // [N]
  const double* gram;       // [K, G, G]
  const float* row_scale;   // [N] or null
  float* out;               // [N, M], zeros
  int64_t queries, columns;
  int heads, size;
  Sequences sequences;
  unsigned query_blocks, key_blocks, together;
};

// In shared memory, with Keys keys for a block: weights [H][Keys][pitch], then sums [kWarps][kSumPitch]. Threads
// that write neighbouring weights have neighbouring keys, whose queries begin in different banks.
template <int Keys>
constexpr int kPitch = kBlockQueries + 32 / Keys;
template <int Keys>
int shared_bytes(int64_t heads) {
  return static_cast<int>(ceil_div(heads * Keys * kPitch<Keys> * 4, 16) * 16) + kWarps * kSumPitch * 8;
}

struct PairBlock {
  int first, count;     // queries
  int first_key, keys;  // of the sequence
  int column;           // the first of its keys' columns
};

template <int Keys>
__device__ __forceinline__ PairBlock block_of(const Gram& p) {
  const unsigned group = blockIdx.x / (p.together * p.key_blocks), rest = blockIdx.x % (p.together * p.key_blocks);
  const unsigned left = p.query_blocks - group * p.together, together = left < p.together ? left : p.together;
  const int block = static_cast<int>(group * p.together + rest % together);
  int b = 0;
  while (b + 1 < p.sequences.count && p.sequences.block[b + 1] <= block) ++b;
  const int first = p.sequences.query[b] + (block - p.sequences.block[b]) * kBlockQueries;
  const int queries = p.sequences.query[b + 1] - first;
  return {first, queries < kBlockQueries ? queries : kBlockQueries, p.sequences.key[b],
          p.sequences.key[b + 1] - p.sequences.key[b], static_cast<int>(rest / together) * Keys};
}

// inner[r][q] += sum of the entries `from` <= k < `to` of row r times their weights.
__device__ __forceinline__ void add_products(double (&inner)[kRows][kEach], const double* const (&rows)[kRows],
                                             const float* weights, int pitch, int from, int to) {
#pragma unroll 2
  for (int k = from; k < to; ++k) {
    double entry[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) entry[r] = rows[r][k];
#pragma unroll
    for (int q = 0; q < kEach; ++q) {
      const auto weight = static_cast<double>(weights[k * pitch + q * kLanes]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) inner[r][q] += entry[r] * weight;
    }
  }
}

// The squares of this thread's queries by the blocks of rows first, first + stride, ...
__device__ __forceinline__ void add_squares(double (&squares)[kEach], const Gram& p, const double* gram,
                                            const float* weights, int pitch, int first, int stride) {
  for (int g = first; g < p.heads; g += stride) {
    const int end = g + kRows < p.heads ? g + kRows : p.heads;
    const double* rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = gram + static_cast<int64_t>(g + r < end ? g + r : g) * p.size;
    double inner[kRows][kEach] = {};
    add_products(inner, rows, weights, pitch, end, p.heads);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int q = 0; q < kEach; ++q) inner[r][q] *= 2;  // their mirror images
    add_products(inner, rows, weights, pitch, g, end);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (g + r < end)
#pragma unroll
        for (int q = 0; q < kEach; ++q)
          squares[q] += inner[r][q] * static_cast<double>(weights[(g + r) * pitch + q * kLanes]);
  }
}

template <int Keys>
__global__ void __launch_bounds__(kThreads) gram_forms(const __grid_constant__ Gram p) {
  constexpr int per_key = kWarps / Keys, pitch = kPitch<Keys>, head_pitch = Keys * pitch;
  constexpr int pairs = kBlockQueries * Keys / kThreads > 0 ? kBlockQueries * Keys / kThreads
                                                            : 1;  // of a thread, in what it loads and stores
  const PairBlock block = block_of<Keys>(p);
  auto* const weights = reinterpret_cast<float*>(dynamic_shared());
  auto* const sums = reinterpret_cast<double*>(dynamic_shared() + (p.heads * head_pitch * 4 + 15) / 16 * 16);
  const int thread = static_cast<int>(threadIdx.x), own_key = thread % Keys, own_query = thread / Keys;
  const int64_t plane = p.queries * p.columns;
  const auto query_of = [&](int i) { return own_query + i * (kThreads / Keys); };
  const auto at = [&](int query) { return (block.first + query) * p.columns + block.column + own_key; };
  const bool known = block.column + own_key < block.keys;

  bool weighted[pairs] = {}, any = false;
#pragma unroll 4
  for (int h = 0; h < p.heads; ++h)
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int query = query_of(i);
      const float weight = known && query < block.count ? p.alpha[h * plane + at(query)] : 0.f;
      weighted[i] |= weight != 0;
      if (query < kBlockQueries) weights[h * head_pitch + own_key * pitch + query] = weight;
    }
#pragma unroll
  for (int i = 0; i < pairs; ++i) any |= weighted[i];
  any = __syncthreads_or(any);

  if (any) {  // not beyond a causal diagonal
    const int warp = thread / kLanes, lane = thread % kLanes, key = warp / per_key;
    double squares[kEach] = {};
    if (block.column + key < block.keys) {
      const int64_t row = block.first_key + block.column + key;
      add_squares(squares, p, p.gram + row * p.size * p.size, weights + key * pitch + lane, pitch * Keys,
                  warp % per_key * kRows, per_key * kRows);
    }
#pragma unroll
    for (int q = 0; q < kEach; ++q) sums[warp * kSumPitch + q * kLanes + lane] = squares[q];
    __syncthreads();
  }
  if (!known) return;
#pragma unroll
  for (int i = 0; i < pairs; ++i) {
    const int query = query_of(i);
    if (query >= block.count) continue;
    const bool own = p.size > p.heads && p.position[block.first + query] == block.column + own_key;
    if (!weighted[i] && !own) continue;
    double square = 0;
    for (int part = 0; any && part < per_key; ++part) square += sums[(own_key * per_key + part) * kSumPitch + query];
    if (own) {
      const int64_t row = block.first_key + block.column + own_key;
      const double* last = p.gram + (row * p.size + p.heads) * p.size;
      double mixed = 0;
      for (int h = 0; h < p.heads; ++h) mixed += last[h] * weights[h * head_pitch + own_key * pitch + query];
      square += 2 * mixed + last[p.heads];
    }
    // Rounding can leave a vanishing square below zero; a NaN stays one.
    const auto norm = static_cast<float>(sqrt(square < 0 ? 0. : square));
    p.out[at(query)] = p.row_scale == nullptr ? norm : norm * p.row_scale[block.first + query];
  }
}

template <int Keys>
void launch_keys(Gram& p) {
  const int bytes = shared_bytes<Keys>(p.heads);
  if constexpr (Keys > 1)
    if (bytes > kMostShared) return launch_keys<Keys / 2>(p);
  const int64_t key_blocks = ceil_div(p.columns, Keys);
  p.key_blocks = static_cast<unsigned>(key_blocks);
  launch(kOp, {p.query_blocks * key_blocks, kThreads, bytes, 1}, gram_forms<Keys>, p);
}

Tensor gram_norms(const Tensor& alpha, const Tensor& position, const Tensor& gram,
                  const std::optional<Tensor>& row_scale, const std::optional<Tensor>& sequences) {
  FFATTR_CHECK(alpha.scalar_type() == ScalarType::Float, kOp, ": alpha has dtype ", dtype_text(alpha.scalar_type()),
               ", the CUDA kernel takes float32; use backend=\"torch\"");
  const GramArguments given(kOp, alpha, position, gram, row_scale, sequences);
  check_same_device(
      kOp,
      {{"alpha", given.alpha}, {"position", given.position}, {"gram", given.gram}, {"row_scale", given.row_scale}});
  check_sizes(kOp, {given.heads, given.queries, given.columns, given.keys});
  const OnDeviceOf guard(given.alpha);
  const Tensor out = torch::stable::new_zeros(given.alpha, {given.queries, given.columns});
  Gram p{};
  p.alpha = data<float>(given.alpha), p.position = data<int64_t>(given.position), p.gram = data<double>(given.gram);
  p.row_scale = data_or_null<float>(given.row_scale), p.out = mutable_data<float>(out);
  p.queries = given.queries, p.columns = given.columns;
  p.heads = static_cast<int>(given.heads), p.size = static_cast<int>(given.size);
  each_launch(given.sequences, kBlockQueries, [&](const Sequences& some, int64_t blocks) {
    p.sequences = some;
    p.query_blocks = static_cast<unsigned>(blocks),
    p.together = p.query_blocks < kTogether ? p.query_blocks : kTogether;
    launch_keys<8>(p);
  });
  return out;
}

}  // namespace
}  // namespace ffattr::cuda

FFATTR_CUDA_OPERATOR(gram_norms)

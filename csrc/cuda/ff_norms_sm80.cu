// ff_norms (contract: ffattr/ops/contract.py) by warp-wide products, for sm_80 and newer.
//
// Four warps have 64 queries and 2 keys; each warp 32 queries, one key and 128 columns of `o` (64 in
// float32), in registers:
//
//   for a block of columns of `down`:
//     for a step of 128 bytes of neurons:               # in shared memory: down, slopes, features; one step ahead if
//                                                       # there is room for two
//       for 16 of them:
//         p = sum over streams (weights @ features[key]) * slopes      # in registers
//         o += p @ down                                                # meanwhile the next p is made
//     squares of o; o += weights @ residual[key]; sums of that         # pairs.h
//
// A warp reads 4 KiB of `down` for 32 rows of p: with 16 rows shared memory would be the limit.
#include "ff_norms.h"
#include "fragments.h"
#include "launch.h"

namespace ffattr::cuda {
namespace {

constexpr int kThreads = 128, kWarpRows = 32;
constexpr int kReserved = 1024;  // shared memory that the system takes of every block

template <class T>
struct Operands {
  const T *features, *slope, *down, *residual;
  int64_t feature_pitch, width_pitch;
};

// What one stage of the pipeline holds: a step of neurons, or for a block of columns the residuals of some heads.
template <class T, int Streams>
struct Stage {
  static constexpr int neurons = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int down_row = 256, columns = down_row / static_cast<int>(sizeof(T));
  static constexpr int slope = neurons * down_row, features = slope + Streams * kQueries * kRowBytes;

  FFATTR_HD static int features_of(int stream, int key, int heads) {
    return features + (stream * kKeys + key) * heads * kRowBytes;
  }
  FFATTR_HD static int residual_heads(int heads) {
    constexpr int most = 64;
    return heads < most ? heads : most;
  }
  FFATTR_HD static int residual_of(int key, int heads) { return key * residual_heads(heads) * down_row; }
  FFATTR_HD static int bytes(int heads) {
    const int step = features_of(Streams, 0, heads), residual = residual_of(kKeys, heads);
    return step > residual ? step : residual;
  }
  static int shared_bytes(int heads, int stages) {
    return stages * bytes(heads) + kKeys * weight_bytes<T>(heads, weight_row_bytes<T>(heads)) +
           kKeys * kQueries * static_cast<int>(sizeof(PairSums));
  }
};

// Copies [rows, RowBytes] from rows `pitch` apart, zeros from row `rows_there` and element `there` on.
template <int RowBytes, class T>
__device__ __forceinline__ void copy_tile(uint32_t to, int rows, const T* from, int64_t pitch, int rows_there,
                                          int there) {
  constexpr int kChunks = RowBytes / 16, kStep = kThreads / kChunks;  // rows that all threads copy at once
  const int chunk = threadIdx.x % kChunks, column = chunk * 16 / static_cast<int>(sizeof(T));
  int row = threadIdx.x / kChunks;
  from += row * pitch + column;
  if (column >= there) rows_there = 0;
#pragma unroll 1
  for (; row < rows; row += kStep, from += kStep * pitch)
    copy_async(to + swizzled(row, chunk * 16, RowBytes), from, row < rows_there);
}

template <class T, int Streams>
__global__ void __launch_bounds__(kThreads)
    direct(const __grid_constant__ Pairs p, const Operands<T> from, const int stages) {
  using S = Stage<T, Streams>;
  const Tile tile = tile_of(p, blockIdx.x, kKeys);
  if (!wanted(p, tile, kKeys)) return;

  const int heads = p.padded_rows();
  uint8_t* const weights = dynamic_shared() + stages * S::bytes(heads);
  const uint32_t ring = shared_address(dynamic_shared());
  const int weight_row = weight_row_bytes<T>(heads), key_weights = weight_bytes<T>(heads, weight_row);
  PairSums* const sums = reinterpret_cast<PairSums*>(weights + kKeys * key_weights);
  load_weights<T>(p, tile, weights, weight_row, sums);

  const int steps = (p.neurons + S::neurons - 1) / S::neurons, turns = (p.width + S::columns - 1) / S::columns;
  const int all_steps = steps + (heads + S::residual_heads(heads) - 1) / S::residual_heads(heads);
  const auto first_of = [&](int turn) { return p.first_step(turn * S::columns, S::neurons, steps); };
  const auto load = [&](uint32_t to, int turn, int step) {
    const int f = step * S::neurons, column = turn * S::columns;
    if (step < steps) {
      copy_tile<S::down_row>(to, S::neurons, from.down + f * from.width_pitch + column, from.width_pitch, p.neurons - f,
                             p.width - column);
      for (int s = 0; s < Streams; ++s)
        copy_tile<kRowBytes>(to + S::slope + s * kQueries * kRowBytes, kQueries,
                             from.slope + (s * p.queries + tile.first) * from.feature_pitch + f, from.feature_pitch,
                             tile.count, p.neurons - f);
    }
#pragma unroll 1
    for (int key = 0; key < kKeys; ++key) {
      const int64_t slab = tile.first_key + tile.column + key;
      const int rows = tile.column + key < tile.keys ? p.rows() : 0;
      const int head = (step - steps) * S::residual_heads(heads);
      if (step >= steps)
        copy_tile<S::down_row>(to + S::residual_of(key, heads), S::residual_heads(heads),
                               from.residual + (slab * (p.heads + 1) + head) * from.width_pitch + column,
                               from.width_pitch, rows - head, p.width - column);
      else
        for (int s = 0; s < Streams; ++s)
          copy_tile<kRowBytes>(to + S::features_of(s, key, heads), heads,
                               from.features + (s * p.keys + slab) * (p.heads + 1) * from.feature_pitch + f,
                               from.feature_pitch, rows, p.neurons - f);
    }
    copy_commit();
  };

  const int warp = uniform(threadIdx.x / 32), slot = warp % kKeys, first_row = warp / kKeys * kWarpRows;
  const Lane lane = lane_of(threadIdx.x);
  // Where a thread's parts of operands begin, in a stage that begins at 0; those of rows 16 on are `half` on.
  constexpr int half_bytes = 16 * kRowBytes;
  const uint32_t own_weights = left_place<T>(shared_address(weights + slot * key_weights), first_row, weight_row);
  const uint32_t own_slopes = left_place<T>(S::slope, first_row), of_rows = right_place<T>(0, kRowBytes);
  const uint32_t of_columns = right_place<T>(0, S::down_row);
  const auto load_weights_of = [&](Left<T>& to, int half, int head) {
    constexpr int per_piece = kRowBytes / static_cast<int>(sizeof(T));
    load_left(to, own_weights + head / per_piece * kPieceBytes + half * 16 * weight_row, head % per_piece, weight_row);
  };
  // 32 rows of p for the 16 neurons from `f` of the stage on.
  const auto make_p = [&](Left<T>(&to)[2], uint32_t at, int f) {
    Product p_of[2] = {};
#pragma unroll
    for (int s = 0; s < Streams; ++s) {
      Product z[2] = {};
#pragma unroll 1
      for (int h = 0; h < heads; h += 16) {
        Right<T> features;
        load_right(features, at + S::features_of(s, slot, heads) + of_rows, h, f, kRowBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Left<T> left;
          load_weights_of(left, half, h);
#pragma unroll
          for (int j = 0; j < 2; ++j) multiply(z[half].value[j], left, features.value[j]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Product slope;
        load_factors<T>(slope, at + own_slopes + s * kQueries * kRowBytes + half * half_bytes, f);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          p_of[half].value[i / 4][i % 4] += z[half].value[i / 4][i % 4] * slope.value[i / 4][i % 4];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) to[half] = as_left<T>(p_of[half]);
  };

  float o[2][S::columns / 8][4];  // of 16 rows each
  const auto add_product = [&](const Left<T>(&left)[2], uint32_t at, int row) {
#pragma unroll
    for (int c = 0; c < S::columns; c += 16) {
      Right<T> right;
      load_right(right, at + of_columns, row, c, S::down_row);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 2; ++j) multiply(o[half][c / 8 + j], left[half], right.value[j]);
    }
  };
  // Calls visit(element, row) for the thread's rows; element(j, k) is that in column 8 j + 2 t + k.
  const auto each_row = [&](const auto& visit) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      visit([&](int j, int k) -> float& { return o[i / 2][j][i % 2 * 2 + k]; },
            first_row + i / 2 * 16 + i % 2 * 8 + lane.g);
  };
  const auto leave_feed_forward = [&] {
    each_row([&](const auto& element, int row) {
      add_squares<S::columns>(sums[slot * kQueries + row], lane.t, element);
      // o / scale + r: to scale the weights would round them once more.
      const float inverse = row_factor(p, tile, row);
#pragma unroll
      for (int i = 0; i < S::columns / 4; ++i) element(i / 2, i % 2) *= inverse;
    });
  };
  const auto add_residual = [&](uint32_t at, int head) {
#pragma unroll 1
    for (int h = 0; h < S::residual_heads(heads) && head + h < heads; h += 16) {
      Left<T> left[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) load_weights_of(left[half], half, head + h);
      add_product(left, at + S::residual_of(slot, heads), h);
    }
  };

  const bool ahead = stages == 2;
  if (ahead) load(ring, 0, 0);
  int next_turn = 0, next_step = 0, stage = 0;
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
    for (int i = 0; i < S::columns; ++i) o[i / (S::columns / 2)][i / 4 % (S::columns / 8)][i % 4] = 0;
    for (int step = first_of(turn); step < all_steps; ++step) {
      if (!ahead) {
        load(ring, turn, step);
        copy_wait<0>();
      } else {
        if (++next_step == all_steps) next_step = first_of(++next_turn);
        if (next_turn < turns)
          load(ring + (stage ^ 1) * S::bytes(heads), next_turn, next_step);
        else
          copy_commit();
        copy_wait<1>();
      }
      __syncthreads();
      const uint32_t at = ring + stage * S::bytes(heads);
      if (step < steps) {
        constexpr int kUnrolled = Streams == 1 ? 2 : 1;  // what fits 255 registers
        Left<T> left[2], next[2];
        make_p(left, at, 0);
#pragma unroll kUnrolled
        for (int f = 0; f < S::neurons; f += 16) {
          if (f + 16 < S::neurons) make_p(next, at, f + 16);
          add_product(left, at, f);
#pragma unroll
          for (int half = 0; half < 2; ++half) left[half] = next[half];
        }
      } else {
        if (step == steps) leave_feed_forward();
        add_residual(at, (step - steps) * S::residual_heads(heads));
        if (step + 1 == all_steps)
          each_row([&](const auto& element, int row) {
            add_total<S::columns>(sums[slot * kQueries + row], lane.t, p, turn * S::columns, element);
          });
      }
      __syncthreads();
      if (ahead) stage ^= 1;
    }
  }

  // Every pair is a thread's again, as in load_weights.
  const int slot_of = threadIdx.x / kQueries, row = threadIdx.x % kQueries, column = tile.column + slot_of;
  if (tile.has(row, column)) store_norms(p, tile.first + row, column, sums[threadIdx.x]);
}

template <class T>
void launch_typed(const Pairs& p, const WideOperands& from, int64_t blocks) {
  const Operands<T> operands{static_cast<const T*>(from.features),
                             static_cast<const T*>(from.slope),
                             static_cast<const T*>(from.down),
                             static_cast<const T*>(from.residual),
                             from.feature_pitch,
                             from.width_pitch};
  with_streams(from.streams, [&]<int Streams>() {
    using S = Stage<T, Streams>;
    // Two blocks on a multiprocessor hide each other's waits: better than two stages in a block that is alone.
    const int heads = p.padded_rows();
    const auto fits = [&](int stages, int blocks) {
      return blocks * (S::shared_bytes(heads, stages) + kReserved) <= shared_per_multiprocessor() &&
             S::shared_bytes(heads, stages) <= shared_limit();
    };
    const int stages = fits(2, 2) ? 2 : fits(1, 2) ? 1 : fits(2, 1) ? 2 : 1;
    launch("ff_norms", {blocks * ceil_div(p.columns, kKeys), kThreads, S::shared_bytes(heads, stages), 1},
           direct<T, Streams>, p, operands, stages);
  });
}

}  // namespace

void launch_direct_sm80(const Pairs& pairs, const WideOperands& from, int64_t blocks) {
  switch (from.type) {
    case Wide::bfloat16:
      return launch_typed<Bfloat16>(pairs, from, blocks);
    case Wide::half:
      return launch_typed<Half>(pairs, from, blocks);
    default:
      return launch_typed<float>(pairs, from, blocks);
  }
}

}  // namespace ffattr::cuda

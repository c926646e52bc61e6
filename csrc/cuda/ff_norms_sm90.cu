// ff_norms (contract: ffattr/ops/contract.py) on Hopper, by products of warpgroups.
//
// A cluster of two blocks has 64 queries and 4 keys; each of a block's two consumers, warpgroups, has one key and 256
// columns of `o` in registers, 192 where the width is better filled by those, 128 in float8. A producer keeps a ring of
// stages full by TMA: `down` and slopes, which both blocks want, are fetched once for the cluster, half by each, and
// each block fetches its keys' features. Of L2, a step of 64 neurons then asks 32 KiB of `down` for 4 keys instead of
// one.
//
//   producer                      consumer
//     for a block of columns:       for a block of columns:
//       for a step of neurons:        z = weights @ features                       the first neurons'
//         wait until empty            for a step, for 64 neurons of it (32 if gated):
//         fetch                         p = z * slopes                             from registers to registers
//       fetch the residual              z = weights @ features;  o += p @ down     in flight together, the next z's
//                                       empty
//                                     squares of o; o += weights @ residual; sums  see pairs.h
//
// While one consumer makes p, the products of the other one run: they take turns. z is made whether or not a step
// follows (then of what lies there, for nothing): a condition would have the compiler wait for every single product.
// Gates and ups of a gated block alternate in memory, 32 by 32, so that one product makes both.
//
// In float8 the matrix unit adds products with some 14 bits: those of a step are summed apart and then added in
// float32.
#include <cstdlib>
#include <cstring>

#include "ff_norms_sm90.h"

#include "fragments.h"

namespace ffattr::cuda {
namespace {

// A slab of p, from z and the slopes of the neurons from `f` on; `slopes` is where the thread's begin in the stage.
template <class T, int Streams, int Columns>
__device__ __forceinline__ void make_p(
    uint32_t (&to)[Stage<T, Streams, Columns>::packed],
    const float (&z)[Stage<T, Streams, Columns>::slab / Stage<T, Streams, Columns>::piece][32], uint32_t slopes,
    int f) {
  using S = Stage<T, Streams, Columns>;
  constexpr int kGroups = S::slab / 16;
  Product p[kGroups] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int s = 0; s < Streams; ++s) {
      const int at = f + 16 * group, column = at % S::piece + 32 * s;
      Product slope;
      load_factors<typename Operand16<T>::type>(slope, slopes + at / S::piece * kBoxBytes, column);
      const float* const from = z[16 * group / S::piece] + column / 2;
#pragma unroll
      for (int i = 0; i < 8; ++i) p[group].value[i / 4][i % 4] += from[i] * slope.value[i / 4][i % 4];
    }
  if constexpr (S::float8) {
#pragma unroll
    for (int i = 0; i < kGroups * 2; ++i) {  // see float8_neuron
      const Product& of = p[i / 2];
      const int r = i % 2;
      to[i] = pack_float8(of.value[0][2 * r], of.value[0][2 * r + 1], of.value[1][2 * r], of.value[1][2 * r + 1]);
    }
  } else {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Left<T> left = as_left<T>(p[group]);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[4 * group + i] = left.value[i];
    }
  }
}

template <class T, int Streams, int Columns>
__device__ __forceinline__ void consume(const Pairs& p, const float* down_scale, const Tile& tile, int stages,
                                        uint32_t tiles, uint32_t full, uint32_t empty, uint32_t weights, PairSums* sums,
                                        int slot) {
  using S = Stage<T, Streams, Columns>;
  using Narrow = typename Operand16<T>::type;
  const int heads = p.padded_rows(), steps = static_cast<int>(ceil_div(p.neurons, S::neurons));
  const Lane lane = lane_of(threadIdx.x);
  const int first_row = threadIdx.x / 32 % 4 * 16 + lane.g;
  // Descriptors count bytes in sixteenths, in their lowest bits.
  const uint64_t left = operand(weights, 16, 1024);
  const auto left_of = [&](int head) { return left + ((head / 64 * kPieceBytes + head % 64 * 2) >> 4); };
  const uint32_t own_slopes = left_place<Narrow>(S::slope, threadIdx.x / 32 % 4 * 16);

  // Those of the first 16 heads stay in registers: shared memory has enough to do.
  Left<Narrow> first_heads;
  load_left(first_heads, left_place<Narrow>(weights, threadIdx.x / 32 % 4 * 16), 0);

  float o[S::columns / 2], z[S::slab / S::piece][32];
  uint32_t packed[S::packed];
  float part[S::float8 ? S::columns / 2 : 1];  // of `o`, from one step
  const auto make_z = [&](uint32_t at, int f) {
    multiply_fence();
#pragma unroll
    for (int i = 0; i < S::slab / S::piece; ++i) {
      const uint64_t right = operand(at + S::features_of(f / S::piece + i, slot, heads), 16, 1024);
      multiply_registers(Narrow{}, z[i], first_heads.value, right, 0);
#pragma unroll 1
      for (int head = 16; head < heads; head += 16) {
        multiply_fence();
        multiply_shared(Narrow{}, z[i], left_of(head), right + (head * kRowBytes >> 4), 1);
      }
    }
  };
  const auto add_product = [&](uint32_t at, int f) {
    const uint64_t right = S::float8 ? operand(at, 16, 1024) : operand(at, kBoxBytes, 1024);
    if constexpr (S::float8) {
#pragma unroll
      for (int k = 0; k < S::slab; k += 32)
        multiply_registers(T{}, part, packed + k / 8, right + ((f + k) >> 4), f + k > 0);
    } else {
#pragma unroll
      for (int k = 0; k < S::slab; k += 16)
        multiply_registers(T{}, o, packed + k / 4, right + ((f + k) * kRowBytes >> 4), 1);
    }
  };
  const auto release = [&](const Place& place) {
    // Every warp: another one of its warpgroup may still be reading slopes.
    if (threadIdx.x % 32 < kBlocks) barrier_arrive(empty + 8 * place.stage, threadIdx.x % 32);
  };

  Place place;
  if (slot == 1) meet_later(1, 256);  // the first turn is the other one's
  for (int column = 0; column < p.width; column += S::columns) {
#pragma unroll
    for (int i = 0; i < S::columns / 2; ++i) o[i] = 0;
    barrier_wait(full + 8 * place.stage, place.parity);
    make_z(tiles + place.stage * S::bytes(heads), 0);
    multiply_commit();
    multiply_wait();
    for (int i = 0; i < S::slab / S::piece; ++i) finished(z[i]);
    for (int step = p.first_step(column, S::neurons, steps); step < steps; ++step) {
      const Place here = place;
      const uint32_t at = tiles + here.stage * S::bytes(heads);
      place.advance(stages);
      const uint32_t next = tiles + place.stage * S::bytes(heads);
#pragma unroll
      for (int f = 0; f < S::neurons; f += S::slab) {
        const bool last = f + S::slab == S::neurons;
        make_p<T, Streams, Columns>(packed, z, at + own_slopes, f);
        if (last) barrier_wait(full + 8 * place.stage, place.parity);
        meet(1 + slot, 256);
        // z first: the other consumer's products hide its issue. For float8 that would take more registers.
        if (S::float8) {
          multiply_fence();
          add_product(at, f);
        }
        make_z(last ? next : at, last ? 0 : f + S::slab);
        if (!S::float8) add_product(at, f);
        multiply_commit();
        meet_later(2 - slot, 256);
        multiply_wait();
        for (int i = 0; i < S::slab / S::piece; ++i) finished(z[i]);
      }
      release(here);
      if constexpr (S::float8) {
        finished(part);
#pragma unroll
        for (int i = 0; i < S::columns / 2; ++i) o[i] += part[i];
      }
    }

    finished(o);
    const uint32_t at = tiles + place.stage * S::bytes(heads);
    if constexpr (S::float8) {
#pragma unroll
      for (int i = 0; i < S::columns / 2; ++i) {
        const int c = column + i / 4 * 8 + 2 * lane.t + i % 2;
        o[i] *= c < p.width ? down_scale[c] : 0;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      const auto element = [&](int j, int k) -> float& { return o[4 * j + 2 * r + k]; };
      add_squares<S::columns>(sums[row], lane.t, element);
      // o / scale + r: to scale the weights would round them once more.
      const float inverse = row_factor(p, tile, row);
#pragma unroll
      for (int i = 0; i < S::columns / 4; ++i) element(i / 2, i % 2) *= inverse;
    }
    const uint64_t right = operand(at + S::residual_of(slot, 0, heads), heads * kRowBytes, 1024);
    multiply_fence();
    multiply_shared(Narrow{}, o, left, right, 1);
#pragma unroll 1
    for (int head = 16; head < heads; head += 16) {
      multiply_fence();
      multiply_shared(Narrow{}, o, left_of(head), right + (head * kRowBytes >> 4), 1);
    }
    multiply_commit();
    multiply_wait();
    finished(o);
    release(place);
    place.advance(stages);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      add_total<S::columns>(sums[first_row + 8 * r], lane.t, p, column,
                            [&](int j, int k) { return o[4 * j + 2 * r + k]; });
  }
  if (slot == 0) meet(1, 256);  // nobody leaves a turn behind
  for (int r = 0; r < 2; ++r)
    if (lane.t == 0 && tile.has(first_row + 8 * r, tile.column + slot))
      store_norms(p, tile.first + first_row + 8 * r, tile.column + slot, sums[first_row + 8 * r]);
}

template <class T, int Streams, int Columns>
__global__ void __launch_bounds__(kThreads, 1)
    direct(const __grid_constant__ Pairs p, const __grid_constant__ Maps maps, const int stages) {
  using S = Stage<T, Streams, Columns>;
  using Narrow = typename Operand16<T>::type;
  // Both blocks of a cluster decide alike: they wait for each other below.
  Tile tile = tile_of(p, blockIdx.x / kBlocks, kKeys * kBlocks);
  if (!wanted(p, tile, kKeys * kBlocks)) return;
  tile.column += static_cast<int>(cluster_rank()) * kKeys;

  const int heads = p.padded_rows();
  uint8_t* const weights = dynamic_shared() + stages * S::bytes(heads);
  PairSums* const sums = reinterpret_cast<PairSums*>(weights + kKeys * weight_bytes<Narrow>(heads, kRowBytes));
  const uint32_t tiles = shared_address(dynamic_shared()), full = shared_address(sums + kKeys * kQueries);
  const uint32_t empty = full + 8 * stages;
  load_weights<Narrow>(p, tile, weights, kRowBytes, sums);
  fence_shared();
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4 * kConsumers * kBlocks);
    }
    fence_barrier_init();
  }
  cluster_sync();

  const int group = uniform(threadIdx.x / 128);
  if (group == kConsumers) {
    give_registers<40>();
    if (threadIdx.x % 128 == 0) produce<T, Streams, Columns>(p, maps, tile, stages, tiles, full, empty);
  } else {
    take_registers<232>();
    consume<T, Streams, Columns>(p, maps.down_scale, tile, stages, tiles, full, empty,
                                 shared_address(weights + group * weight_bytes<Narrow>(heads, kRowBytes)),
                                 sums + group * kQueries, group);
  }
  cluster_sync();  // a block's shared memory must outlive what the other sends there
}

template <class T, int Streams, int Columns>
void launch_typed(const Pairs& p, const WideOperands& from, int64_t blocks) {
  using S = Stage<T, Streams, Columns>;
  const auto u = [](int64_t size) { return static_cast<uint64_t>(size); };
  const uint32_t heads = static_cast<uint32_t>(p.padded_rows());
  const uint64_t feature_row = u(from.feature_pitch) * 2, width_row = u(from.width_pitch) * 2,
                 down_row = u(from.down_pitch) * sizeof(T), slabs = u(p.heads + 1);
  const uint64_t rows = S::float8 ? u(p.width) : u(p.neurons);
  const uint64_t numbers = Streams == 1 ? u(p.neurons) : u(from.feature_pitch);
  const Maps maps{tensor_map(from.features, 2, {numbers, u(p.rows()), u(p.keys)}, {feature_row, slabs * feature_row},
                             {64, heads, 1}),
                  tensor_map(from.slope, 2, {numbers, u(p.queries), 1}, {feature_row, u(p.queries) * feature_row},
                             {64, kQueries / kBlocks, 1}),
                  tensor_map(from.down, sizeof(T), {S::float8 ? u(from.down_pitch) : u(p.width), rows, 1},
                             {down_row, rows * down_row}, {S::neurons, 64, 1}),
                  tensor_map(from.residual, 2, {u(p.width), u(p.rows()), u(p.keys)}, {width_row, slabs * width_row},
                             {64, heads, 1}),
                  from.down_scale};
  const int stages = stages_of<T, Streams, Columns>(p.padded_rows());
  const int shared = stages * S::bytes(p.padded_rows()) + rest_bytes<T>(p.padded_rows());
  launch("ff_norms", {blocks * ceil_div(p.columns, kKeys * kBlocks) * kBlocks, kThreads, shared, kBlocks},
         direct<T, Streams, Columns>, p, maps, stages);
}

// Calls visit<T, Streams, Columns>(): with 192 columns where those leave less of the last block of columns unused.
template <class Visitor>
auto with_type(int width, Wide type, int streams, const Visitor& visit) {
  return with_streams(streams, [&]<int Streams>() {
    const auto with_columns = [&]<class T>() {
      return round_up(width, 192) < round_up(width, 256) ? visit.template operator()<T, Streams, 192>()
                                                         : visit.template operator()<T, Streams, 256>();
    };
    return type == Wide::bfloat16 ? with_columns.template operator()<Bfloat16>()
           : type == Wide::half   ? with_columns.template operator()<Half>()
                                  : visit.template operator()<Float8, Streams, 128>();
  });
}

}  // namespace

void launch_direct_sm90(const Pairs& pairs, const WideOperands& from, int64_t blocks) {
  with_type(pairs.width, from.type, from.streams,
            [&]<class T, int Streams, int Columns>() { launch_typed<T, Streams, Columns>(pairs, from, blocks); });
}

bool fits_sm90(const Pairs& pairs, Wide type, int streams) {
  // FFATTR_CUDA_SM90=0 leaves Hopper to the other kernel, for comparisons.
  const char* wanted = std::getenv("FFATTR_CUDA_SM90");
  if (capability() != 90 || type == Wide::float32 || (wanted != nullptr && std::strcmp(wanted, "0") == 0)) return false;
  return with_type(pairs.width, type, streams, [&]<class T, int Streams, int Columns>() {
    return stages_of<T, Streams, Columns>(pairs.padded_rows()) >= 2;
  });
}

}  // namespace ffattr::cuda

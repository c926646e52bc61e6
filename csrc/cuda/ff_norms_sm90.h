// The ring of stages of ff_norms on Hopper (ff_norms_sm90.cu): what a stage holds, and the producer that fills it.
#pragma once

#include "ff_norms.h"
#include "hopper.h"
#include "launch.h"

namespace ffattr::cuda {

constexpr int kBlocks = 2, kThreads = 384, kConsumers = 2, kBoxBytes = 64 * kRowBytes;
constexpr int kBarrierBytes = 1024;  // two barriers for each stage

struct Maps {
  TensorMap features, slope, down, residual;
  const float* down_scale;
};

// `Columns` of `o` at a time: 256 or 192 of two bytes, 128 of float8.
template <class T, int Streams, int Columns>
struct Stage {
  static constexpr bool float8 = sizeof(T) == 1;
  static constexpr int columns = Columns, boxes = columns / 64;
  static constexpr int neurons = kRowBytes / static_cast<int>(sizeof(T));
  // Slopes and features come in pieces of 64 numbers: of 64 neurons, or the gates of 32 and then their ups.
  static constexpr int piece = 64 / Streams, pieces = neurons / piece;
  // Neurons of one z, and registers of p made of them. Two streams of 64 fit beside the sums of float8 alone.
  static constexpr int slab = float8 ? 64 : piece, packed = slab * static_cast<int>(sizeof(T)) / 8;
  static constexpr int slope = boxes * kBoxBytes, features = slope + pieces * kBoxBytes;

  FFATTR_HD static int features_of(int piece, int key, int heads) {
    return features + (piece * kKeys + key) * heads * kRowBytes;
  }
  FFATTR_HD static int step_bytes(int heads) { return features_of(pieces, 0, heads); }
  FFATTR_HD static int residual_of(int key, int box, int heads) { return (key * boxes + box) * heads * kRowBytes; }
  FFATTR_HD static int residual_bytes(int heads) { return residual_of(kKeys, 0, heads); }
  FFATTR_HD static int bytes(int heads) {
    const int step = step_bytes(heads), residual = residual_bytes(heads);
    return round_up(step > residual ? step : residual, 1024);
  }
};

template <class T>
struct Operand16 {  // of weights, features, slopes and residual
  using type = T;
};
template <>
struct Operand16<Float8> {
  using type = Bfloat16;
};

// What lies beside the stages.
template <class T>
int rest_bytes(int heads) {
  return kKeys * weight_bytes<typename Operand16<T>::type>(heads, kRowBytes) +
         kKeys * kQueries * static_cast<int>(sizeof(PairSums)) + kBarrierBytes;
}
template <class T, int Streams, int Columns>
int stages_of(int heads) {
  const int stages = (shared_limit() - rest_bytes<T>(heads)) / Stage<T, Streams, Columns>::bytes(heads);
  return stages < 8 ? stages : 8;
}

// A place in the ring.
struct Place {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

template <class T, int Streams, int Columns>
__device__ __forceinline__ void produce(const Pairs& p, const Maps& maps, const Tile& tile, int stages, uint32_t tiles,
                                        uint32_t full, uint32_t empty) {
  using S = Stage<T, Streams, Columns>;
  const int heads = p.padded_rows(), steps = static_cast<int>(ceil_div(p.neurons, S::neurons));
  const int rank = static_cast<int>(cluster_rank());
  constexpr uint16_t kBoth = 3;
  const auto slab_of = [&](int key) {  // of keys beyond the last: any
    const int64_t slab = tile.first_key + tile.column + key;
    return static_cast<int>(slab < p.keys ? slab : p.keys - 1);
  };
  Place place;
#pragma unroll 1
  for (int column = 0; column < p.width; column += S::columns)
#pragma unroll 1
    for (int step = p.first_step(column, S::neurons, steps); step <= steps; ++step, place.advance(stages)) {
      const uint32_t to = tiles + place.stage * S::bytes(heads), barrier = full + 8 * place.stage;
      barrier_wait(empty + 8 * place.stage, place.parity ^ 1);
      if (step == steps) {
        barrier_expect(barrier, S::residual_bytes(heads));
        for (int key = 0; key < kKeys; ++key)
          for (int box = 0; box < S::boxes; ++box)
            load_box(to + S::residual_of(key, box, heads), &maps.residual, barrier, column + 64 * box, 0, slab_of(key));
        continue;
      }
      const int f = step * S::neurons;
      barrier_expect(barrier, S::step_bytes(heads));
      for (int box = rank; box < S::boxes; box += kBlocks) {
        const int x = S::float8 ? f : column + 64 * box, y = S::float8 ? column + 64 * box : f;
        load_box_to_all(to + box * kBoxBytes, &maps.down, barrier, kBoth, x, y, 0);
      }
      for (int piece = 0; piece < S::pieces; ++piece) {
        const int half = rank * kQueries / kBlocks, x = Streams * f + 64 * piece;
        load_box_to_all(to + S::slope + piece * kBoxBytes + half * kRowBytes, &maps.slope, barrier, kBoth, x,
                        tile.first + half, 0);
        for (int key = 0; key < kKeys; ++key)
          load_box(to + S::features_of(piece, key, heads), &maps.features, barrier, x, 0, slab_of(key));
      }
    }
}

}  // namespace ffattr::cuda

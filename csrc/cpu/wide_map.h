// Host side of the two wide maps: their shared arguments, the pairs worth computing, and the workers' scratch memory.
#pragma once

#include "../wide_arguments.h"
#include "kernels.h"
#include "parallel.h"
#include "sequences.h"

namespace ffattr::cpu {

// The arguments of a wide map, and its whole result, one sequence after the other.
struct CpuArguments : WideArguments {
  template <class... Given>
  CpuArguments(const char* op, const Given&... given) : WideArguments(op, given...) {
    FFATTR_CHECK(wide == dtype, op, ": residual has dtype ", dtype_text(wide), ", expected ", dtype_text(dtype));
  }

  // `run(map, sequence)` writes the pairs of one sequence, whose places begin with zeros.
  template <class T, class Run>
  Tensor each_sequence(const Run& run) const {
    return cpu::each_sequence(sequences, alpha, {scopes(), queries, columns}, [&](const Sequence& sequence) {
      const Tensor own_alpha = torch::stable::contiguous(sequence.of_pairs(alpha));
      const Tensor own_position = sequence.of_queries(position), own_residual = sequence.of_keys(residual);
      const std::optional<Tensor> own_residual_scale = sequence.of_queries(residual_scale);
      const std::optional<Tensor> own_norm_scale = sequence.of_queries(norm_scale);
      const Tensor out = torch::stable::new_zeros(alpha, {scopes(), sequence.queries, sequence.keys});
      run(WideMap<T>{heads, sequence.queries, sequence.keys, width, data<T>(own_alpha), data<int64_t>(own_position),
                     data<T>(own_residual), data_or_null<T>(own_residual_scale), data_or_null<T>(gamma),
                     data_or_null<T>(own_norm_scale), centre, mutable_data<T>(out)},
          sequence);
      return out;
    });
  }
};

enum class Order { keys_outermost, queries_outermost };

// The pairs with any weight; all others stay the zeros that `out` begins with. NaN counts as a weight.
template <class T>
std::vector<Pair> active_pairs(const WideMap<T>& map, Order order) {
  std::vector<uint8_t> active(map.queries * map.keys, 0);
  for (int64_t h = 0; h < map.heads; ++h)
    for (int64_t i = 0; i < map.queries * map.keys; ++i) active[i] |= map.alpha[h * map.queries * map.keys + i] != T{0};
  for (int64_t n = 0; n < map.queries; ++n)
    if (map.position[n] >= 0 && map.position[n] < map.keys) active[n * map.keys + map.position[n]] = 1;

  std::vector<Pair> pairs;
  const bool by_key = order == Order::keys_outermost;
  const int64_t outer = by_key ? map.keys : map.queries, inner = by_key ? map.queries : map.keys;
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      const Pair pair{static_cast<int32_t>(by_key ? j : i), static_cast<int32_t>(by_key ? i : j)};
      if (active[pair.query * map.keys + pair.key]) pairs.push_back(pair);
    }
  return pairs;
}

// Scratch of every worker; `a` is zero because rows beyond a tile's last are multiplied too.
template <class T>
class ScratchPool {
 public:
  ScratchPool(int64_t workers, int64_t heads, int64_t width)
      : c_size_(kTileRows * padded_columns<T>(width)),
        w_size_(kTileRows * (heads + 1)),
        a_(workers * kASize),
        c_(workers * c_size_),
        w_(workers * w_size_) {
    std::fill_n(a_.get(), workers * kASize, T{0});
  }
  Scratch<T> of(int64_t worker) const {
    return {a_.get() + worker * kASize, c_.get() + worker * c_size_, w_.get() + worker * w_size_};
  }

 private:
  static constexpr int64_t kASize = kTileRows * kRowStride<T>;
  int64_t c_size_, w_size_;
  Buffer<T> a_, c_, w_;
};

// Packs all of `matrix` [depth, columns] on all threads.
template <class T>
Buffer<T> packed(const T* matrix, int64_t depth, int64_t columns) {
  Buffer<T> to(depth * padded_columns<T>(columns));
  parallel_tasks(depth,
                 [&](int64_t k, int64_t) { kernels<T>().pack_row(matrix + k * columns, k, depth, columns, to.get()); });
  return to;
}

// Rows of a task when `rows` are to be shared out: long tiles read B less often, but every thread wants a few.
inline int64_t tile_rows(int64_t rows) {
  const int64_t tasks = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t share = ceil_div(rows, tasks * kTileStep) * kTileStep;
  return std::clamp(share, kTileStep, kTileRows);
}

}  // namespace ffattr::cpu

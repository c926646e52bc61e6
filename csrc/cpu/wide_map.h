// Host side of the two wide maps: their shared arguments, the pairs worth computing, and the workers' scratch memory.
#pragma once

#include "../wide_arguments.h"
#include "kernels.h"
#include "parallel.h"

#include <cstring>

namespace ffattr::cpu {

// bfloat16 numbers are computed with as float32; a product rounds to them again.
inline Tensor in_float32(const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::BFloat16) return tensor;
  const Tensor to = torch::stable::new_empty(tensor, sizes_of(tensor), ScalarType::Float);
  const uint16_t* from = data<uint16_t>(tensor);
  float* numbers = mutable_data<float>(to);
  torch::stable::parallel_for(0, tensor.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(numbers + i, &bits, sizeof bits);
    }
  });
  return to;
}

// The share of slopes [S, N, F] that are not zero in every stream.
template <class T>
double density(const T* slope, int64_t streams, int64_t size) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    bool active = false;
    for (int64_t s = 0; s < streams; ++s) active |= slope[s * size + i] != T{0};
    count += active;
  }
  return static_cast<double>(count) / static_cast<double>(std::max<int64_t>(size, 1));
}

// The arguments of a wide map.
struct CpuArguments : WideArguments {
  std::vector<int32_t> first_keys;  // of every query
  bool narrow = false;              // whether what is multiplied by `down` is rounded to bfloat16

  template <class... Given>
  CpuArguments(const char* op, const Given&... given) : WideArguments(op, given...), first_keys(queries) {
    FFATTR_CHECK(wide == dtype || (wide == ScalarType::BFloat16 && dtype == ScalarType::Float), op,
                 ": residual has dtype ", dtype_text(wide), ", expected ", dtype_text(dtype));
    this->residual = in_float32(this->residual);
    for (const Sequence& sequence : sequences)
      std::fill_n(first_keys.begin() + sequence.first_query, sequence.queries,
                  static_cast<int32_t>(sequence.first_key));
  }

  // `down` [F, d] as numbers to compute with: given like the other wide operands, or in bfloat16 beside float32 ones.
  Tensor take_down(const char* op, const Tensor& given, int64_t neurons) {
    narrow = given.scalar_type() == ScalarType::BFloat16 && dtype == ScalarType::Float;
    check_tensor(op, "down", given, {neurons, width}, narrow ? ScalarType::BFloat16 : wide);
    return in_float32(torch::stable::contiguous(given));
  }

  // How these operands are multiplied, and whether neurons without a slope are skipped, which vectors alone can.
  // Columns that do not fill a unit's are left to vectors, too.
  template <class T>
  std::pair<Product, bool> product(const T* slope, int64_t streams, int64_t size) const {
    Product all = dtype == ScalarType::Double ? Product::native : narrow ? Product::bf16 : float32_product();
    if (width < 32) all = Product::native;
    const bool sparse = density(slope, streams, size) <= sparse_share(all);
    return {sparse ? Product::native : all, sparse};
  }

  // The result begins with zeros: pairs without weight, and the padding, are left as they are.
  Tensor zeros() const { return torch::stable::new_zeros(alpha, {scopes(), queries, columns}); }

  template <class T>
  WideMap<T> map(const Tensor& out) const {
    return {heads,
            queries,
            columns,
            keys,
            width,
            data<T>(alpha),
            data<int64_t>(position),
            first_keys.data(),
            data<T>(residual),
            data_or_null<T>(residual_scale),
            data_or_null<T>(gamma),
            data_or_null<T>(norm_scale),
            centre,
            reduction == "l1"     ? Reduction::l1
            : reduction == "alti" ? Reduction::alti
                                  : Reduction::l2,
            data_or_null<T>(totals),
            mutable_data<T>(out)};
  }
};

// The pairs with any weight, in an order of one's own; all others stay the zeros that the result begins with.
template <class T>
class ActivePairs {
 public:
  // Of one sequence at a time: `block` appends those of its queries and keys first .. end, counted from its first ones.
  ActivePairs(const WideMap<T>& map, const Sequence& sequence, std::vector<Pair>& pairs)
      : sequence_(sequence), pairs_(pairs), active_(sequence.queries * sequence.keys, 0) {
    for (int64_t h = 0; h < map.heads; ++h)
      for (int64_t n = 0; n < sequence.queries; ++n) {
        const T* alpha = map.alpha + (h * map.queries + sequence.first_query + n) * map.columns;
        uint8_t* row = active_.data() + n * sequence.keys;
        for (int64_t m = 0; m < sequence.keys; ++m) row[m] |= alpha[m] != T{0};  // NaN counts as a weight
      }
    for (int64_t n = 0; n < sequence.queries; ++n) {
      const int64_t position = map.position[sequence.first_query + n];
      if (position >= 0 && position < sequence.keys) active_[n * sequence.keys + position] = 1;
    }
    // Neither twice the memory for want of a guess, nor a copy for each of many short sequences.
    const size_t needed = pairs.size() + std::count(active_.begin(), active_.end(), 1);
    if (needed > pairs.capacity()) pairs.reserve(std::max(needed, std::min(2 * pairs.capacity(), size_t{1} << 20)));
  }

  void by_key(int64_t query, int64_t query_end, int64_t key, int64_t key_end) {
    for (int64_t m = key; m < key_end; ++m)
      for (int64_t n = query; n < query_end; ++n) add(n, m);
  }
  void by_query(int64_t query, int64_t query_end, int64_t key, int64_t key_end) {
    for (int64_t n = query; n < query_end; ++n)
      for (int64_t m = key; m < key_end; ++m) add(n, m);
  }

 private:
  void add(int64_t n, int64_t m) {
    if (active_[n * sequence_.keys + m])
      pairs_.push_back(
          {static_cast<int32_t>(sequence_.first_query + n), static_cast<int32_t>(sequence_.first_key + m)});
  }

  const Sequence& sequence_;
  std::vector<Pair>& pairs_;
  std::vector<uint8_t> active_;
};

// Scratch of every worker; `a` is zero because rows beyond a tile's last are multiplied too.
template <class T>
class ScratchPool {
 public:
  ScratchPool(int64_t workers, int64_t heads, int64_t width)
      : c_size_(kTileRows * (padded_columns<T>(width) + kUnitPadding)),
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

// Room for a packed matrix by any product: one part is half of it, two are all.
template <class T>
int64_t packed_size(int64_t depth, int64_t columns) {
  return ceil_div(depth, 32) * 32 * padded_columns<T>(columns);
}

// Packs all of `matrix` [depth, columns] on all threads, a few rows at a time: what they write lies together.
template <class T>
Buffer<T> packed(const T* matrix, int64_t depth, int64_t columns, Product product) {
  constexpr int64_t rows = 16;
  Buffer<T> to(packed_size<T>(depth, columns));
  parallel_tasks(ceil_div(depth, rows), [&](int64_t task, int64_t) {
    const int64_t k = task * rows;
    kernels<T>(product).pack_rows(matrix + k * columns, columns, k, std::min(rows, depth - k), depth, columns,
                                  to.get());
  });
  return to;
}

// Rows of a task when `rows` are to be shared out: long tiles read B less often, but every thread wants a few.
inline int64_t tile_rows(int64_t rows) {
  const int64_t tasks = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t share = ceil_div(rows, tasks * kTileStep) * kTileStep;
  return std::clamp(share, kTileStep, kTileRows);
}

}  // namespace ffattr::cpu

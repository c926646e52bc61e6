// gram_norms (contract: ffattr/ops.py): attention-level scopes without any d-wide work for a pair.
#include "../gram_arguments.h"
#include "kernels.h"
#include "parallel.h"
#include "sequences.h"

namespace ffattr::cpu {
namespace {

// gram [M, G, G] to [G, G, stride]: keys become neighbours; an entry off the diagonal counts for its mirror image too.
Buffer<double> keys_last(const double* gram, int64_t keys, int64_t size, int64_t stride) {
  Buffer<double> to(size * size * stride);
  parallel_tasks(size, [&](int64_t g, int64_t) {
    for (int64_t k = g; k < size; ++k) {
      double* row = to.get() + (g * size + k) * stride;
      for (int64_t m = 0; m < keys; ++m) row[m] = gram[(m * size + g) * size + k] * (k > g ? 2 : 1);
      std::fill(row + keys, row + stride, 0.0);
    }
  });
  return to;
}

// One sequence: alpha [H, N, M], position [N], gram [M, G, G], row_scale [N] or nothing.
template <class T>
Tensor quadratic(const Tensor& alpha, const Tensor& position, const Tensor& gram,
                 const std::optional<Tensor>& row_scale) {
  const int64_t heads = alpha.size(0), queries = alpha.size(1), keys = alpha.size(2), size = gram.size(1);
  const int64_t stride = ceil_div(keys, kGramKeys) * kGramKeys;
  const Buffer<double> gram_keys_last = keys_last(data<double>(gram), keys, size, stride);
  const Buffer<double> weights(workers(queries) * size * kGramKeys);
  const Tensor out = torch::stable::new_empty(alpha, {queries, keys});
  parallel_tasks(queries, [&](int64_t query, int64_t worker) {
    kernels<T>().gram({heads, queries, keys, size, query, data<T>(alpha), data<int64_t>(position)[query],
                       gram_keys_last.get(), stride, data_or_null<T>(row_scale), mutable_data<T>(out),
                       weights.get() + worker * size * kGramKeys});
  });
  return out;
}

Tensor gram_norms(const Tensor& alpha, const Tensor& position, const Tensor& gram,
                  const std::optional<Tensor>& row_scale, const std::optional<Tensor>& sequences) {
  const GramArguments given("gram_norms", alpha, position, gram, row_scale, sequences);
  return each_sequence(given.sequences, given.alpha, {given.queries, given.columns}, [&](const Sequence& sequence) {
    const Tensor own_alpha = torch::stable::contiguous(sequence.of_pairs(given.alpha));
    const Tensor own_position = sequence.of_queries(given.position), own_gram = sequence.of_keys(given.gram);
    const std::optional<Tensor> own_scale = sequence.of_queries(given.row_scale);
    return FFATTR_DISPATCH_FLOATING(own_alpha,
                                    [&] { return quadratic<scalar_t>(own_alpha, own_position, own_gram, own_scale); });
  });
}

}  // namespace
}  // namespace ffattr::cpu

STABLE_TORCH_LIBRARY_IMPL(ffattr, CPU, m) { m.impl("gram_norms", TORCH_BOX(&ffattr::cpu::gram_norms)); }

// gram_norms (contract: ffattr/ops.py): attention-level scopes without any d-wide work for a pair.
#include "../common.h"
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

Tensor gram_norms(const Tensor& alpha_, const Tensor& position_, const Tensor& gram_,
                  const std::optional<Tensor>& row_scale_, const std::optional<Tensor>& sequences_) {
  using torch::stable::contiguous;
  constexpr const char* op = "gram_norms";
  const Tensor alpha = contiguous(alpha_), position = contiguous(position_), gram = contiguous(gram_);
  const std::optional<Tensor> row_scale = ffattr::contiguous(row_scale_);
  FFATTR_CHECK(alpha.dim() == 3 && gram.dim() == 3, op, ": alpha has to be [H, N, M], gram [M, G, G]");
  check_floating(op, "alpha", alpha);
  const int64_t heads = alpha.size(0), queries = alpha.size(1), columns = alpha.size(2), size = gram.size(1);
  const int64_t keys = sequences_.has_value() ? gram.size(0) : columns;
  FFATTR_CHECK(size == heads || size == heads + 1, op, ": gram is for ", size, " heads, expected ", heads,
               " or, with the residual, ", heads + 1);
  const std::vector<Sequence> sequences = sequences_of(op, sequences_, alpha, keys);
  check_tensor(op, "position", position, {queries}, ScalarType::Long);
  check_tensor(op, "gram", gram, {keys, size, size}, ScalarType::Double);
  check_tensor(op, "row_scale", row_scale, {queries}, alpha.scalar_type());
  return each_sequence(sequences, alpha, {queries, columns}, [&](const Sequence& sequence) {
    const Tensor own_alpha = contiguous(sequence.of_pairs(alpha));
    const Tensor own_position = sequence.of_queries(position), own_gram = sequence.of_keys(gram);
    const std::optional<Tensor> own_scale = sequence.of_queries(row_scale);
    return FFATTR_DISPATCH_FLOATING(alpha,
                                    [&] { return quadratic<scalar_t>(own_alpha, own_position, own_gram, own_scale); });
  });
}

}  // namespace
}  // namespace ffattr::cpu

STABLE_TORCH_LIBRARY_IMPL(ffattr, CPU, m) { m.impl("gram_norms", TORCH_BOX(&ffattr::cpu::gram_norms)); }

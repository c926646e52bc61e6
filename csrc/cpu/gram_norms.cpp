// gram_norms (contract: ffattr/ops/contract.py): attention-level scopes without any d-wide work for a pair.
#include "../gram_arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace ffattr::cpu {
namespace {

// Keys of one sequence, and queries of it that meet them.
std::vector<GramBlock> blocks_of(const std::vector<Sequence>& sequences, int64_t keys) {
  std::vector<GramBlock> blocks;
  for (const Sequence& sequence : sequences)
    for (int64_t m = 0; m < sequence.keys; m += keys)
      for (int64_t n = 0; n < sequence.queries; n += kTileRows)
        blocks.push_back({sequence.first_query + n, std::min(kTileRows, sequence.queries - n), sequence.first_key + m,
                          std::min(keys, sequence.keys - m), m});
  return blocks;
}

template <class T>
Tensor quadratic(const GramArguments& given) {
  const Tensor out = torch::stable::new_zeros(given.alpha, {given.queries, given.columns});
  const int64_t size = given.gram.size(1);
  const bool by_product = size > kGramLanes;
  const std::vector<GramBlock> blocks = blocks_of(given.sequences, by_product ? 1 : kGramKeys);
  const int64_t tasks = static_cast<int64_t>(blocks.size());
  const int64_t scratch_size = by_product ? gram_product_scratch(size) : gram_lanes_scratch(size);
  const Buffer<double> scratch(workers(tasks) * scratch_size);
  const GramMap<T> map{given.alpha.size(0),
                       given.queries,
                       given.columns,
                       size,
                       data<T>(given.alpha),
                       data<int64_t>(given.position),
                       data<double>(given.gram),
                       data_or_null<T>(given.row_scale),
                       mutable_data<T>(out)};
  const auto kernel = by_product ? kernels<T>().gram_product : kernels<T>().gram_lanes;
  parallel_tasks(
      tasks, [&](int64_t task, int64_t worker) { kernel(map, blocks[task], scratch.get() + worker * scratch_size); });
  return out;
}

Tensor gram_norms(const Tensor& alpha, const Tensor& position, const Tensor& gram,
                  const std::optional<Tensor>& row_scale, const std::optional<Tensor>& sequences) {
  const GramArguments given("gram_norms", alpha, position, gram, row_scale, sequences);
  return FFATTR_DISPATCH_FLOATING(given.alpha, [&] { return quadratic<scalar_t>(given); });
}

}  // namespace
}  // namespace ffattr::cpu

STABLE_TORCH_LIBRARY_IMPL(ffattr, CPU, m) { m.impl("gram_norms", TORCH_BOX(&ffattr::cpu::gram_norms)); }

// ff_norms (contract: ffattr/ops/contract.py), direct: every pair is a row of one long product with `down`.
#include "wide_map.h"

namespace ffattr::cpu {
namespace {

// Pairs first .. first + rows, and for those of queries with many zero slopes what DirectTile says.
struct Cut {
  int64_t first, rows, strip, first_query;
};

// Tiles as long as there is work for all threads, whatever queries they hold, across sequences too.
template <class T>
std::vector<Cut> dense_cuts(const WideMap<T>& map, const std::vector<Sequence>& sequences, std::vector<Pair>& pairs) {
  // Keys outermost: neighbouring rows read the same features, which then stay in L1.
  for (const Sequence& sequence : sequences)
    ActivePairs<T>(map, sequence, pairs).by_key(0, sequence.queries, 0, sequence.keys);
  const int64_t total = static_cast<int64_t>(pairs.size()), rows = tile_rows(total);
  std::vector<Cut> cuts;
  for (int64_t first = 0; first < total; first += rows) cuts.push_back({first, std::min(rows, total - first), 0, 0});
  return cuts;
}

// Tiles of a few queries, each of which skips its own zeros, and as many keys as fit.
template <class T>
std::vector<Cut> sparse_cuts(const WideMap<T>& map, const std::vector<Sequence>& sequences, std::vector<Pair>& pairs) {
  std::vector<Cut> cuts;
  for (const Sequence& sequence : sequences) {
    ActivePairs<T> active(map, sequence, pairs);
    const int64_t groups = std::max<int64_t>(1, ceil_div(sequence.queries, kMostStrips));
    const int64_t queries = std::max<int64_t>(1, ceil_div(sequence.queries, groups));
    const int64_t keys = kTileRows / queries / kTileStep * kTileStep;
    for (int64_t n = 0; n < sequence.queries; n += queries)
      for (int64_t m = 0; m < sequence.keys; m += keys) {
        const int64_t first = static_cast<int64_t>(pairs.size());
        active.by_key(n, std::min(n + queries, sequence.queries), m, std::min(m + keys, sequence.keys));
        const int64_t rows = static_cast<int64_t>(pairs.size()) - first;
        if (rows > 0) cuts.push_back({first, rows, keys, sequence.first_query + n});
      }
  }
  return cuts;
}

template <class T>
Tensor direct(const CpuArguments& arguments, const Tensor& features, const Tensor& slope, const Tensor& down,
              bool triangular) {
  const int64_t streams = features.size(0), neurons = features.size(3);
  const Tensor out = arguments.zeros();
  WideMap<T> map = arguments.map<T>(out);
  map.feeds = neurons > 0;
  std::vector<Pair> pairs;
  const auto [product, few] = arguments.product(data<T>(slope), streams, map.queries * neurons);
  const bool sparse = few && map.feeds;
  const std::vector<Cut> cuts = (sparse ? sparse_cuts<T> : dense_cuts<T>)(map, arguments.sequences, pairs);
  const int64_t tasks = static_cast<int64_t>(cuts.size());
  if (tasks == 0) return out;
  const Buffer<T> down_packed = packed(data<T>(down), neurons, map.width, product);
  const ScratchPool<T> scratch(workers(tasks), map.heads, map.width);
  parallel_tasks(tasks, [&](int64_t task, int64_t worker) {
    const Cut& cut = cuts[task];
    kernels<T>(product).direct({&map, streams, neurons, data<T>(features), data<T>(slope), down_packed.get(),
                                triangular, pairs.data() + cut.first, cut.rows, cut.strip, cut.first_query,
                                scratch.of(worker)});
  });
  return out;
}

Tensor ff_norms(const Tensor& alpha, const Tensor& position, const Tensor& features_, const Tensor& slope_,
                const Tensor& down_, const std::optional<Tensor>& down_scale, const Tensor& residual,
                const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& gamma,
                const std::optional<Tensor>& norm_scale, bool centre, const std::optional<Tensor>& sequences,
                std::string reduction, const std::optional<Tensor>& totals, bool triangular) {
  constexpr const char* op = "ff_norms";
  FFATTR_CHECK(!down_scale.has_value(), op, ": down_scale belongs to float8, which the CPU kernels do not have");
  CpuArguments arguments(op, alpha, position, residual, residual_scale, gamma, norm_scale, centre, sequences, reduction,
                         totals);
  FFATTR_CHECK(features_.dim() == 4, op, ": features has to be [S, M, H + 1, F]");
  Tensor features = torch::stable::contiguous(features_), slope = torch::stable::contiguous(slope_);
  const int64_t streams = features.size(0), neurons = features.size(3);
  check_tensor(op, "features", features, {streams, arguments.keys, arguments.heads + 1, neurons}, arguments.wide);
  check_tensor(op, "slope", slope, {streams, arguments.queries, neurons}, arguments.wide);
  const Tensor down = arguments.take_down(op, down_, neurons);
  features = in_float32(features), slope = in_float32(slope);
  return FFATTR_DISPATCH_FLOATING(alpha,
                                  [&] { return direct<scalar_t>(arguments, features, slope, down, triangular); });
}

}  // namespace
}  // namespace ffattr::cpu

STABLE_TORCH_LIBRARY_IMPL(ffattr, CPU, m) { m.impl("ff_norms", TORCH_BOX(&ffattr::cpu::ff_norms)); }

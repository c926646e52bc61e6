// operator_norms (contract: ffattr/ops/contract.py): the layer at one query token as a matrix, applied to all its keys.
#include "wide_map.h"

namespace ffattr::cpu {
namespace {

// Matrices in memory at once: a few for every worker keep all busy in both halves, and stay a few MiB.
constexpr int64_t kOperatorsPerWorker = 2;

template <class T>
Tensor through_operator(const CpuArguments& arguments, const Tensor& values, const Tensor& maps, const Tensor& own,
                        const Tensor& slope, const Tensor& down, bool triangular) {
  const int64_t streams = maps.size(0), inner = maps.size(1), neurons = maps.size(2);
  const Tensor out = arguments.zeros();
  const WideMap<T> map = arguments.map<T>(out);
  std::vector<Pair> pairs;
  for (const Sequence& sequence : arguments.sequences)
    ActivePairs<T>(map, sequence, pairs).by_query(0, sequence.queries, 0, sequence.keys);
  std::vector<int64_t> start(map.queries + 1, 0);  // pairs of query n: start[n] .. start[n + 1]
  for (const Pair& pair : pairs) ++start[pair.query + 1];
  for (int64_t n = 0; n < map.queries; ++n) start[n + 1] += start[n];

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t batch = std::min(kOperatorsPerWorker * threads, std::max<int64_t>(map.queries, 1));
  const int64_t operator_size = packed_size<T>(inner, map.width);
  const Product product = arguments.product(data<T>(slope), streams, map.queries * neurons).first;
  const Buffer<T> down_packed = packed(data<T>(down), neurons, map.width, product);
  const Buffer<T> operators(batch * operator_size), own_rows(batch * map.width);
  const ScratchPool<T> scratch(threads, map.heads, map.width);

  const int64_t build_tiles = ceil_div(inner + 1, kTileRows), apply_tiles = ceil_div(map.columns, kTileRows);
  for (int64_t first = 0; first < map.queries; first += batch) {
    const int64_t count = std::min(batch, map.queries - first);
    parallel_tasks(count * build_tiles, [&](int64_t task, int64_t worker) {
      const int64_t slot = task / build_tiles, query = first + slot, row = task % build_tiles * kTileRows;
      if (start[query] == start[query + 1]) return;
      kernels<T>(product).build_operator(
          {streams, neurons, inner, map.width, data<T>(maps), map.queries * neurons, data<T>(slope) + query * neurons,
           data<T>(own) + query * neurons, down_packed.get(), triangular, row, std::min(kTileRows, inner + 1 - row),
           operators.get() + slot * operator_size, own_rows.get() + slot * map.width, scratch.of(worker)});
    });
    parallel_tasks(count * apply_tiles, [&](int64_t task, int64_t worker) {
      // Queries innermost: they read the same keys, which then come from memory once.
      const int64_t slot = task % count, query = first + slot;
      const int64_t pair = start[query] + task / count * kTileRows;
      if (pair >= start[query + 1]) return;
      kernels<T>(product).apply_operator({&map, values.size(2), data<T>(values), operators.get() + slot * operator_size,
                                          own_rows.get() + slot * map.width, pairs.data() + pair,
                                          std::min(kTileRows, start[query + 1] - pair), scratch.of(worker)});
    });
  }
  return out;
}

Tensor operator_norms(const Tensor& alpha, const Tensor& position, const Tensor& values_, const Tensor& maps_,
                      const Tensor& own_, const Tensor& slope_, const Tensor& down_, const Tensor& residual,
                      const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& gamma,
                      const std::optional<Tensor>& norm_scale, bool centre, const std::optional<Tensor>& sequences,
                      std::string reduction, const std::optional<Tensor>& totals, bool triangular) {
  using torch::stable::contiguous;
  constexpr const char* op = "operator_norms";
  CpuArguments arguments(op, alpha, position, residual, residual_scale, gamma, norm_scale, centre, sequences, reduction,
                         totals);
  FFATTR_CHECK(values_.dim() == 3 && maps_.dim() == 3, op, ": values has to be [M, H, dh], maps [S, H * dh, F]");
  Tensor values = contiguous(values_), maps = contiguous(maps_), own = contiguous(own_);
  Tensor slope = contiguous(slope_);
  const int64_t streams = maps.size(0), neurons = maps.size(2), head_dim = values.size(2);
  const auto [keys, heads, dtype] = std::tuple{arguments.keys, arguments.heads, arguments.wide};
  check_tensor(op, "values", values, {keys, heads, head_dim}, dtype);
  check_tensor(op, "maps", maps, {streams, heads * head_dim, neurons}, dtype);
  check_tensor(op, "own", own, {streams, arguments.queries, neurons}, dtype);
  check_tensor(op, "slope", slope, {streams, arguments.queries, neurons}, dtype);
  const Tensor down = arguments.take_down(op, down_, neurons);
  for (Tensor* tensor : {&values, &maps, &own, &slope}) *tensor = in_float32(*tensor);
  return FFATTR_DISPATCH_FLOATING(
      alpha, [&] { return through_operator<scalar_t>(arguments, values, maps, own, slope, down, triangular); });
}

}  // namespace
}  // namespace ffattr::cpu

STABLE_TORCH_LIBRARY_IMPL(ffattr, CPU, m) { m.impl("operator_norms", TORCH_BOX(&ffattr::cpu::operator_norms)); }

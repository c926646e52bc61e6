// ff_norms (contract: ffattr/ops.py), direct: every pair is a row of one long product with `down`.
#include "wide_map.h"

namespace ffattr::cpu {
namespace {

// One sequence: features [S, M, H + 1, F], slope [S, N, F].
template <class T>
void direct(const WideMap<T>& map, const Tensor& features, const Tensor& slope, const T* down_packed) {
  const int64_t neurons = features.size(3);
  // Keys outermost: neighbouring rows read the same features, which then stay in L1.
  const std::vector<Pair> pairs = active_pairs(map, Order::keys_outermost);
  const int64_t total = static_cast<int64_t>(pairs.size()), rows = tile_rows(total), tasks = ceil_div(total, rows);
  const ScratchPool<T> scratch(workers(tasks), map.heads, map.width);
  parallel_tasks(tasks, [&](int64_t task, int64_t worker) {
    const int64_t first = task * rows;
    kernels<T>().direct({&map, features.size(0), neurons, data<T>(features), data<T>(slope), down_packed,
                         pairs.data() + first, std::min(rows, total - first), scratch.of(worker)});
  });
}

Tensor ff_norms(const Tensor& alpha, const Tensor& position, const Tensor& features_, const Tensor& slope_,
                const Tensor& down_, const std::optional<Tensor>& down_scale, const Tensor& residual,
                const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& gamma,
                const std::optional<Tensor>& norm_scale, bool centre, const std::optional<Tensor>& sequences) {
  constexpr const char* op = "ff_norms";
  FFATTR_CHECK(!down_scale.has_value(), op, ": down_scale belongs to float8, which the CPU kernels do not have");
  const CpuArguments arguments(op, alpha, position, residual, residual_scale, gamma, norm_scale, centre, sequences);
  FFATTR_CHECK(features_.dim() == 4, op, ": features has to be [S, M, H + 1, F]");
  const Tensor features = torch::stable::contiguous(features_), slope = torch::stable::contiguous(slope_);
  const Tensor down = torch::stable::contiguous(down_);
  const int64_t streams = features.size(0), neurons = features.size(3);
  check_tensor(op, "features", features, {streams, arguments.keys, arguments.heads + 1, neurons}, arguments.dtype);
  check_tensor(op, "slope", slope, {streams, arguments.queries, neurons}, arguments.dtype);
  check_tensor(op, "down", down, {neurons, arguments.width}, arguments.dtype);
  return FFATTR_DISPATCH_FLOATING(alpha, [&] {
    const Buffer<scalar_t> down_packed = packed(data<scalar_t>(down), neurons, arguments.width);
    return arguments.each_sequence<scalar_t>([&](const WideMap<scalar_t>& map, const Sequence& sequence) {
      direct(map, sequence.of_keys(features, 1), sequence.of_queries(slope, 1), down_packed.get());
    });
  });
}

}  // namespace
}  // namespace ffattr::cpu

STABLE_TORCH_LIBRARY_IMPL(ffattr, CPU, m) { m.impl("ff_norms", TORCH_BOX(&ffattr::cpu::ff_norms)); }

// ig_slope (contract: ffattr/ops/contract.py): Integrated Gradients as one factor for each token and neuron, in
// registers.
//
// Loops over neurons have constant length and no branches, so that the compiler turns them into vector code (it needs
// -O3 and, to make masks of selections, -fno-trapping-math).
#include <algorithm>
#include <cstring>
#include <string>

#include "../path_factors.h"
#include "../quadrature.h"
#include "../slope_arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace ffattr::cpu {
namespace {

constexpr int kLanes = 32;          // neurons at a time: four AVX2 vectors hide the latency of one
constexpr int64_t kTask = 1 << 14;  // neurons of one task, about

// Of vectors that outlive it.
template <class T>
struct Nodes {
  const T *a, *w;
  int64_t count;

  explicit Nodes(const Points<T>& points)
      : a(points.a.data()), w(points.weight.data()), count(static_cast<int64_t>(points.a.size())) {}
  T point(int64_t k) const { return a[k]; }
  T weight(int64_t k) const { return w[k]; }
};

template <class T>
struct Slopes {
  int64_t streams, rows, neurons;
  const T* z;     // [S, N, F]
  const T* base;  // [S, N or 1, F] or null
  int64_t base_rows;
  const T* row_scale;  // [N] or null
  T* out;              // [S, N, F]
  bool is_exact;
  Nodes<T> nodes;
};

// Rows first <= n < last.
template <class Activation, bool gated, class T>
FFATTR_HD void rows(const Slopes<T>& task, int64_t first, int64_t last) {
  constexpr int streams = gated ? 2 : 1;
  alignas(64) T z[2][kLanes] = {}, b[2][kLanes] = {}, out[2][kLanes] = {};
  for (int64_t n = first; n < last; ++n) {
    const T scale = task.row_scale == nullptr ? T(1) : task.row_scale[n];
    for (int64_t f = 0; f < task.neurons; f += kLanes) {
      const size_t bytes = std::min<int64_t>(kLanes, task.neurons - f) * sizeof(T);
      for (int s = 0; s < streams; ++s) {
        std::memcpy(z[s], task.z + (s * task.rows + n) * task.neurons + f, bytes);
        if (task.base != nullptr) {
          const int64_t row = task.base_rows == 1 ? 0 : n;
          std::memcpy(b[s], task.base + (s * task.base_rows + row) * task.neurons + f, bytes);
        }
      }
      path_factors<Activation, gated>(task.is_exact, task.base != nullptr, task.nodes, z, b, out);
      for (int s = 0; s < streams; ++s) {
        for (int i = 0; i < kLanes; ++i) out[s][i] *= scale;
        std::memcpy(task.out + (s * task.rows + n) * task.neurons + f, out[s], bytes);
      }
    }
  }
}

// Everything above is inlined here, and compiled for the instruction set of the function it is inlined into.
template <class Activation, bool gated, class T>
void rows_baseline(const Slopes<T>& task, int64_t first, int64_t last) {
  rows<Activation, gated>(task, first, last);
}

#if defined(__x86_64__)
template <class Activation, bool gated, class T>
__attribute__((target("avx2,fma"))) void rows_avx2(const Slopes<T>& task, int64_t first, int64_t last) {
  rows<Activation, gated>(task, first, last);
}
#endif

template <class Activation, bool gated, class T>
void run(const Slopes<T>& task) {
  auto* kernel = rows_baseline<Activation, gated, T>;
#if defined(__x86_64__)
  if constexpr (sizeof(T) == sizeof(float))  // in double the standard library's functions take the time
    if (isa().vectors != Vectors::baseline) kernel = rows_avx2<Activation, gated, T>;
#endif
  const int64_t per_task = std::max<int64_t>(1, kTask / std::max<int64_t>(1, task.neurons));
  parallel_tasks(ceil_div(task.rows, per_task), [&](int64_t index, int64_t) {
    kernel(task, index * per_task, std::min(task.rows, (index + 1) * per_task));
  });
}

Tensor ig_slope(const Tensor& z_, const std::optional<Tensor>& base, const std::optional<Tensor>& row_scale,
                std::string activation, std::string rule, int64_t steps) {
  constexpr const char* op = "ig_slope";
  check_floating(op, "z", z_);
  const SlopeArguments given(op, z_, base, row_scale, z_.scalar_type());
  const Tensor out = torch::stable::new_empty(given.z, {given.streams, given.rows, given.neurons});
  FFATTR_DISPATCH_FLOATING(given.z, [&] {
    const Points<scalar_t> of_rule = points_of<scalar_t>(rule, steps);
    const bool is_exact = of_rule.a.empty();
    const Points<scalar_t> points = is_exact ? near_points<scalar_t>() : of_rule;
    const Slopes<scalar_t> task{given.streams,
                                given.rows,
                                given.neurons,
                                data<scalar_t>(given.z),
                                data_or_null<scalar_t>(given.base),
                                given.base_rows,
                                data_or_null<scalar_t>(given.row_scale),
                                mutable_data<scalar_t>(out),
                                is_exact,
                                Nodes(points)};
    const bool known = with_activation(activation, [&](auto chosen) {
      using Activation = decltype(chosen);
      given.streams == 2 ? run<Activation, true>(task) : run<Activation, false>(task);
    });
    FFATTR_CHECK(known, op, ": unknown activation '", activation, "', expected one of ", kActivationNames);
  });
  return out;
}

}  // namespace
}  // namespace ffattr::cpu

STABLE_TORCH_LIBRARY_IMPL(ffattr, CPU, m) { m.impl("ig_slope", TORCH_BOX(&ffattr::cpu::ig_slope)); }

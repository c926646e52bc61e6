// ig_slope (contract: ffattr/ops.py): Integrated Gradients as one factor for each token and neuron, in registers.
//
// Loops over neurons have constant length and no branches, so that the compiler turns them into vector code (it needs
// -O3 and, to make masks of selections, -fno-trapping-math).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../activations.h"
#include "../common.h"
#include "kernels.h"
#include "parallel.h"

namespace ffattr::cpu {
namespace {

constexpr int kLanes = 32;          // neurons at a time: four AVX2 vectors hide the latency of one
constexpr double kNear = 1;         // a path no longer than this is integrated: a quotient of differences would cancel
constexpr int64_t kTask = 1 << 14;  // neurons of one task, about

template <class T>
struct Points {
  std::vector<T> a, weight;
};

// Nodes and weights on [0, 1] by Newton's method on the Legendre polynomial.
void gauss_legendre(int64_t count, std::vector<double>& a, std::vector<double>& weight) {
  double total = 0;
  for (int64_t i = count; i > 0; --i) {
    double x = std::cos(3.141592653589793 * (i - 0.25) / (count + 0.5)), slope = 1;
    for (int iteration = 0; iteration < 8; ++iteration) {
      double previous = 1, current = x;
      for (int64_t k = 2; k <= count; ++k) {
        const double next = ((2 * k - 1) * x * current - (k - 1) * previous) / k;
        previous = current;
        current = next;
      }
      slope = count * (x * current - previous) / (x * x - 1);
      x -= current / slope;
    }
    a.push_back((x + 1) / 2);
    weight.push_back(1 / ((1 - x * x) * slope * slope));
    total += weight.back();
  }
  for (double& w : weight) w /= total;
}

// As ffattr.ig.nodes; no points for the exact rule.
template <class T>
Points<T> points_of(const std::string& rule, int64_t steps) {
  const bool gauss = rule == "gauss-legendre", trapezoid = rule == "trapezoid";
  FFATTR_CHECK(rule == "exact" || rule == "right" || rule == "left" || rule == "midpoint" || trapezoid || gauss,
               "ig_slope: unknown Integrated-Gradients rule '", rule,
               "', expected one of exact, right, left, midpoint, trapezoid, gauss-legendre");
  if (rule == "exact") return {};
  FFATTR_CHECK(steps >= (trapezoid ? 2 : 1), "ig_slope: the ", rule,
               " rule needs a number of steps >= ", trapezoid ? 2 : 1, ", got ", steps);
  std::vector<double> a, weight;
  if (gauss) {
    gauss_legendre(steps, a, weight);
  } else {
    const double offset = rule == "right" ? 1 : rule == "midpoint" ? 0.5 : 0;
    const double intervals = static_cast<double>(trapezoid ? steps - 1 : steps);
    for (int64_t k = 0; k < steps; ++k) {
      a.push_back((k + offset) / intervals);
      weight.push_back((trapezoid && (k == 0 || k == steps - 1) ? 0.5 : 1) / intervals);
    }
  }
  return {{a.begin(), a.end()}, {weight.begin(), weight.end()}};
}

template <class T>
struct Slopes {
  int64_t streams, rows, neurons;
  const T* z;     // [S, N, F]
  const T* base;  // [S, N or 1, F] or null
  int64_t base_rows;
  const T* row_scale;             // [N] or null
  T* out;                         // [S, N, F]
  const T *a, *weight;            // [steps]
  int64_t steps;                  // 0: exact
  const T *near_a, *near_weight;  // [near_steps]: the short path of the exact rule
  int64_t near_steps;
};

template <class Activation, bool gated, class T>
FFATTR_HD void quadrature(const T* a, const T* weight, int64_t steps, const T (&z)[2][kLanes], const T (&b)[2][kLanes],
                          T (&out)[2][kLanes]) {
  T first[kLanes] = {}, second[kLanes] = {};
  for (int64_t k = 0; k < steps; ++k) {
    const T at = a[k], w = weight[k];
    for (int i = 0; i < kLanes; ++i) {
      const T u = b[0][i] + at * (z[0][i] - b[0][i]);
      if constexpr (gated) {
        first[i] += w * (Activation::derivative(u) * (b[1][i] + at * (z[1][i] - b[1][i])));
        second[i] += w * Activation::value(u);
      } else {
        first[i] += w * Activation::derivative(u);
      }
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    out[0][i] = first[i];
    if constexpr (gated) out[1][i] = second[i];
  }
}

template <class Activation, bool gated, class T>
FFATTR_HD void exact(const T (&z)[2][kLanes], T (&out)[2][kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (gated) {
      const Pair2<T> factors = Activation::gated(z[0][i]);
      out[0][i] = factors.second * z[1][i];
      out[1][i] = factors.first;
    } else {
      out[0][i] = Activation::slope(z[0][i]);
    }
  }
}

template <class Activation, bool gated, class T>
FFATTR_HD void exact_from(const Slopes<T>& task, const T (&z)[2][kLanes], const T (&b)[2][kLanes],
                          T (&out)[2][kLanes]) {
  T near[2][kLanes];
  if constexpr (!Activation::polynomial)
    quadrature<Activation, gated>(task.near_a, task.near_weight, task.near_steps, z, b, near);
  for (int i = 0; i < kLanes; ++i) {
    Pair2<T> far;
    if constexpr (gated)
      far = Activation::path(z[0][i], z[1][i], b[0][i], b[1][i]);
    else
      far.first = Activation::rise(z[0][i], b[0][i]);
    const bool short_path = !Activation::polynomial && magnitude(z[0][i] - b[0][i]) <= T(kNear);
    out[0][i] = short_path ? near[0][i] : far.first;
    if constexpr (gated) out[1][i] = short_path ? near[1][i] : far.second;
  }
}

// Rows first <= n < last.
template <class Activation, bool gated, class T>
FFATTR_HD void rows(const Slopes<T>& task, int64_t first, int64_t last) {
  constexpr int streams = gated ? 2 : 1;
  alignas(64) T z[2][kLanes] = {}, b[2][kLanes] = {}, out[2][kLanes];
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
      if (task.steps > 0)
        quadrature<Activation, gated>(task.a, task.weight, task.steps, z, b, out);
      else if (task.base == nullptr)
        exact<Activation, gated>(z, out);
      else
        exact_from<Activation, gated>(task, z, b, out);
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
    if (isa() != Isa::baseline) kernel = rows_avx2<Activation, gated, T>;
#endif
  const int64_t per_task = std::max<int64_t>(1, kTask / std::max<int64_t>(1, task.neurons));
  parallel_tasks(ceil_div(task.rows, per_task), [&](int64_t index, int64_t) {
    kernel(task, index * per_task, std::min(task.rows, (index + 1) * per_task));
  });
}

Tensor ig_slope(const Tensor& z_, const std::optional<Tensor>& base_, const std::optional<Tensor>& row_scale_,
                std::string activation, std::string rule, int64_t steps) {
  constexpr const char* op = "ig_slope";
  const Tensor z = torch::stable::contiguous(z_);
  const std::optional<Tensor> base = ffattr::contiguous(base_), row_scale = ffattr::contiguous(row_scale_);
  FFATTR_CHECK(z.dim() == 3 && (z.size(0) == 1 || z.size(0) == 2), op, ": z has shape ", shape_text(sizes_of(z)),
               ", expected [S, N, F] with S = 1 (dense) or 2 (gate, up)");
  check_floating(op, "z", z);
  const int64_t streams = z.size(0), count = z.size(1), neurons = z.size(2);
  const int64_t base_rows = base.has_value() && base->dim() == 3 && base->size(1) == 1 ? 1 : count;
  check_tensor(op, "base", base, {streams, base_rows, neurons}, z.scalar_type());
  check_tensor(op, "row_scale", row_scale, {count}, z.scalar_type());
  const Tensor out = torch::stable::new_empty(z, {streams, count, neurons});
  FFATTR_DISPATCH_FLOATING(z, [&] {
    const Points<scalar_t> points = points_of<scalar_t>(rule, steps);
    const Points<scalar_t> near = points_of<scalar_t>("gauss-legendre", sizeof(scalar_t) == sizeof(float) ? 6 : 12);
    const Slopes<scalar_t> task{streams,
                                count,
                                neurons,
                                data<scalar_t>(z),
                                data_or_null<scalar_t>(base),
                                base_rows,
                                data_or_null<scalar_t>(row_scale),
                                mutable_data<scalar_t>(out),
                                points.a.data(),
                                points.weight.data(),
                                static_cast<int64_t>(points.a.size()),
                                near.a.data(),
                                near.weight.data(),
                                static_cast<int64_t>(near.a.size())};
    const bool known = with_activation(activation, [&](auto chosen) {
      using Activation = decltype(chosen);
      streams == 2 ? run<Activation, true>(task) : run<Activation, false>(task);
    });
    FFATTR_CHECK(known, op, ": unknown activation '", activation, "', expected one of ", kActivationNames);
  });
  return out;
}

}  // namespace
}  // namespace ffattr::cpu

STABLE_TORCH_LIBRARY_IMPL(ffattr, CPU, m) { m.impl("ig_slope", TORCH_BOX(&ffattr::cpu::ig_slope)); }

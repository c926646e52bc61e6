// ig_slope (contract: ffattr/ops/contract.py) on GPUs: each pre-activation is read once, each factor written once, and
// whatever a rule evaluates between the two stays in registers, in float.
//
// A kernel for each activation, dense and gated. What else differs is the same for a whole launch, so that branching on
// it costs an instruction or two for eight neurons: the dtype, the rule, and where a path starts.
#include <algorithm>

#include "../path_factors.h"
#include "../quadrature.h"
#include "../slope_arguments.h"
#include "instructions.h"
#include "operators.h"

namespace ffattr::cuda {
namespace {

constexpr const char* kOp = "ig_slope";
constexpr int kThreads = 128;
constexpr int kLanes = 8;    // neurons of a thread: 16 bytes of a half type
constexpr int kNodes = 256;  // that a launch takes along; more are read from device memory

enum class Type { float32, bfloat16, half };

struct Nodes {
  int count;
  const float* more;  // [2, count] or null
  float a[kNodes], w[kNodes];

  FFATTR_HD float point(int64_t k) const { return more == nullptr ? a[k] : more[k]; }
  FFATTR_HD float weight(int64_t k) const { return more == nullptr ? w[k] : more[count + k]; }
};

struct Slopes {
  const void *z, *base;   // [S, N, F]; [S, N or 1, F] or null
  const void* row_scale;  // [N] or null
  void* out;              // [S, N, F]
  int64_t rows, base_rows;
  int neurons;
  // A block has `across` threads for a part of a row, which is one of `parts`, and does so for `down` rows.
  int across, parts, down;
  Type type;
  bool scale_is_float, vectors, is_exact;
  Nodes nodes;
};

struct alignas(16) Chunk {
  uint32_t words[4];
};
struct Raw {
  Chunk chunks[2];  // the second only of float
};

// The neurons of a thread: first, first + step, ... of a row. Neighbours, or apart so that a warp's are neighbours.
struct Place {
  int64_t row;
  int first, step;
};

template <class Visitor>
__device__ __forceinline__ void with_type(Type type, const Visitor& visitor) {
  if (type == Type::float32)
    visitor(float{});
  else if (type == Type::bfloat16)
    visitor(Bfloat16{});
  else
    visitor(Half{});
}

__device__ __forceinline__ Raw load_vector(const void* from, int64_t at, Type type) {
  Raw to{};
  if (type == Type::float32) {
    const auto* chunks = reinterpret_cast<const Chunk*>(static_cast<const float*>(from) + at);
    to.chunks[0] = chunks[0], to.chunks[1] = chunks[1];
  } else {
    to.chunks[0] = *reinterpret_cast<const Chunk*>(static_cast<const uint16_t*>(from) + at);
  }
  return to;
}

template <class T>
__device__ __forceinline__ void unpack_vector(T, const Raw& from, float (&to)[kLanes]) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (sizeof(T) == sizeof(float)) {
      to[i] = bits_to_float(from.chunks[i / 4].words[i % 4]);
    } else {
      const PairOf<T> pair = unpack<T>(from.chunks[0].words[i / 2]);
      to[i] = i % 2 == 0 ? pair.low : pair.high;
    }
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* to, const float (&from)[kLanes]) {
  Raw raw{};
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (sizeof(T) == sizeof(float))
      raw.chunks[i / 4].words[i % 4] = float_to_bits(from[i]);
    else if (i % 2 == 0)
      raw.chunks[0].words[i / 2] = pack<T>(from[i], from[i + 1]);
  }
  auto* chunks = reinterpret_cast<Chunk*>(to);
  chunks[0] = raw.chunks[0];
  if constexpr (sizeof(T) == sizeof(float)) chunks[1] = raw.chunks[1];
}

// All streams of z and of the base; the loads of vectors are under way before the first of them is waited for.
template <int streams>
__device__ __forceinline__ void load(const Slopes& p, const Place& place, float (&z)[2][kLanes],
                                     float (&b)[2][kLanes]) {
  const int64_t base_row = p.base_rows == 1 ? 0 : place.row;
  const auto z_at = [&](int s) { return (s * p.rows + place.row) * p.neurons + place.first; };
  const auto base_at = [&](int s) { return (s * p.base_rows + base_row) * p.neurons + place.first; };
  if (p.vectors) {
    Raw raw_z[streams]{}, raw_b[streams]{};
    for (int s = 0; s < streams; ++s) {
      raw_z[s] = load_vector(p.z, z_at(s), p.type);
      if (p.base != nullptr) raw_b[s] = load_vector(p.base, base_at(s), p.type);
    }
    with_type(p.type, [&](auto type) {
      for (int s = 0; s < streams; ++s) unpack_vector(type, raw_z[s], z[s]), unpack_vector(type, raw_b[s], b[s]);
    });
  } else {
    with_type(p.type, [&](auto type) {
      using T = decltype(type);
      for (int s = 0; s < streams; ++s) {
        const T* from = static_cast<const T*>(p.z) + z_at(s);
        const T* start = p.base == nullptr ? nullptr : static_cast<const T*>(p.base) + base_at(s);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          const bool there = place.first + i * place.step < p.neurons;
          z[s][i] = there ? to_float(from[i * place.step]) : 0.f;
          b[s][i] = there && start != nullptr ? to_float(start[i * place.step]) : 0.f;
        }
      }
    });
  }
}

template <class T>
__device__ __forceinline__ void store(const Slopes& p, const Place& place, int64_t at, const float (&from)[kLanes]) {
  T* to = static_cast<T*>(p.out) + at;
  if (p.vectors) return store_vector(to, from);
#pragma unroll
  for (int i = 0; i < kLanes; ++i)
    if (place.first + i * place.step < p.neurons) to[i * place.step] = from_float<T>(from[i]);
}

template <class Activation, bool gated>
__global__ void __launch_bounds__(kThreads) factors(const __grid_constant__ Slopes p) {
  constexpr int streams = gated ? 2 : 1;
  const int across = static_cast<int>(threadIdx.x) % p.across, down = static_cast<int>(threadIdx.x) / p.across;
  const int part = static_cast<int>(blockIdx.x % p.parts) * p.across;
  Place place;
  place.row = static_cast<int64_t>(blockIdx.x / p.parts) * p.down + down;
  place.first = p.vectors ? (part + across) * kLanes : part * kLanes + across;
  place.step = p.vectors ? 1 : p.across;
  if (down >= p.down || place.row >= p.rows || place.first >= p.neurons) return;

  float z[2][kLanes], b[2][kLanes], out[2][kLanes] = {};
  load<streams>(p, place, z, b);
  path_factors<Activation, gated>(p.is_exact, p.base != nullptr, p.nodes, z, b, out);
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    float scale = 1;
    if (p.row_scale != nullptr)
      scale = p.scale_is_float ? static_cast<const float*>(p.row_scale)[place.row]
                               : to_float(static_cast<const T*>(p.row_scale)[place.row]);
    for (int s = 0; s < streams; ++s) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) out[s][i] *= scale;
      store<T>(p, place, (s * p.rows + place.row) * p.neurons + place.first, out[s]);
    }
  });
}

// Points and weights of the rule; where there are many, `table` keeps them.
Nodes nodes_of(const Points<float>& points, const Tensor& z, std::optional<Tensor>& table) {
  Nodes nodes{};
  const size_t count = points.a.size();
  nodes.count = static_cast<int>(count);
  if (count <= kNodes) {
    std::copy(points.a.begin(), points.a.end(), nodes.a);
    std::copy(points.weight.begin(), points.weight.end(), nodes.w);
    return nodes;
  }
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor here = torch::stable::new_empty(z, {2, nodes.count}, ScalarType::Float, std::nullopt, cpu);
  std::copy(points.a.begin(), points.a.end(), mutable_data<float>(here));
  std::copy(points.weight.begin(), points.weight.end(), mutable_data<float>(here) + count);
  table = torch::stable::to(here, z.device());
  nodes.more = data<float>(*table);
  return nodes;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Chunk) == 0; }

Tensor ig_slope(const Tensor& z_, const std::optional<Tensor>& base, const std::optional<Tensor>& row_scale,
                std::string activation, std::string rule, int64_t steps) {
  const ScalarType dtype = z_.scalar_type();
  FFATTR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
               ": z has dtype ", dtype_text(dtype),
               ", the CUDA kernel computes in float32 and takes float32, bfloat16 or float16",
               dtype == ScalarType::Double ? "; use backend=\"torch\"" : "");
  const SlopeArguments given(kOp, z_, base, row_scale, ScalarType::Float);
  check_same_device(kOp, {{"z", given.z}, {"base", given.base}, {"row_scale", given.row_scale}});
  check_sizes(kOp, {given.rows, given.neurons, steps});
  const Points<float> points = points_of<float>(rule, steps);
  const OnDeviceOf guard(given.z);
  const Tensor out = torch::stable::new_empty(given.z, {given.streams, given.rows, given.neurons});

  Slopes p{};
  p.z = given.z.const_data_ptr(), p.out = out.mutable_data_ptr();
  p.base = data_or_null<void>(given.base), p.row_scale = data_or_null<void>(given.row_scale);
  p.rows = given.rows, p.base_rows = given.base_rows, p.neurons = static_cast<int>(given.neurons);
  p.type = dtype == ScalarType::Float ? Type::float32 : dtype == ScalarType::Half ? Type::half : Type::bfloat16;
  p.scale_is_float = given.row_scale.has_value() && given.row_scale->scalar_type() == ScalarType::Float;
  p.vectors = p.neurons % kLanes == 0 && is_aligned(p.z) && is_aligned(p.base) && is_aligned(p.out);
  p.is_exact = points.a.empty();
  std::optional<Tensor> table;
  p.nodes = nodes_of(p.is_exact ? near_points<float>() : points, given.z, table);
  const int64_t threads = ceil_div(given.neurons, kLanes);  // for a row
  p.across = static_cast<int>(std::clamp<int64_t>(threads, 1, kThreads));
  p.parts = static_cast<int>(ceil_div(threads, p.across));
  p.down = kThreads / p.across;
  const int64_t blocks = p.parts * ceil_div(given.rows, p.down);
  const bool known = with_activation(activation, [&](auto chosen) {
    using Activation = decltype(chosen);
    launch(kOp, {blocks, kThreads, 0, 1}, given.streams == 2 ? factors<Activation, true> : factors<Activation, false>,
           p);
  });
  FFATTR_CHECK(known, kOp, ": unknown activation '", activation, "', expected one of ", kActivationNames);
  return out;
}

}  // namespace
}  // namespace ffattr::cuda

FFATTR_CUDA_OPERATOR(ig_slope)

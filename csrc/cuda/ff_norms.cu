// ff_norms (contract: ffattr/ops/contract.py) on GPUs: its checks, what float8 needs beforehand, and the choice of the
// kernel.
#include "ff_norms.h"

#include "../wide_arguments.h"
#include "operators.h"

namespace ffattr::cuda {

#ifdef FFATTR_NO_SM90  // built for other GPUs alone
bool fits_sm90(const Pairs&, Wide, int) { return false; }
void launch_direct_sm90(const Pairs&, const WideOperands&, int64_t) {}
#endif

namespace {

constexpr const char* kOp = "ff_norms";
constexpr int64_t kMostHeads = 128;

Wide wide_of(const Tensor& residual, bool float8) {
  const ScalarType dtype = residual.scalar_type();
  FFATTR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
               ": residual has dtype ", dtype_text(dtype), ", expected float32, bfloat16 or float16");
  FFATTR_CHECK(!float8 || dtype == ScalarType::BFloat16, kOp, ": residual has dtype ", dtype_text(dtype),
               ", expected bfloat16 beside a float8 down");
  if (float8) return Wide::float8;
  return dtype == ScalarType::Float ? Wide::float32 : dtype == ScalarType::Half ? Wide::half : Wide::bfloat16;
}

struct alignas(16) Chunk {
  uint32_t pairs[4];
};

// Of x [S, R, 8 chunks] for every R: the sum (or maximum) over streams of the largest magnitude. A warp for each.
__global__ void largest_magnitudes(const Chunk* x, float* to, int streams, int64_t rows, int chunks, bool sum) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  float bound = 0;
  for (int s = 0; s < streams; ++s) {
    float largest = 0;
    for (int i = threadIdx.x % 32; row < rows && i < chunks; i += 32) {
      const Chunk chunk = x[(s * rows + row) * chunks + i];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const PairOf<Bfloat16> pair = unpack<Bfloat16>(chunk.pairs[k]);
        largest = fmaxf(largest, fmaxf(fabsf(pair.low), fabsf(pair.high)));
      }
    }
    for (int distance = 16; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    bound = sum ? bound + largest : fmaxf(bound, largest);
  }
  if (row < rows && threadIdx.x % 32 == 0) to[row] = bound;
}

Tensor bounds_of(const Tensor& x, const Tensor& alpha, bool sum) {
  const int64_t streams = x.size(0), width = x.size(-1), rows = x.numel() / (streams * width);
  const Tensor to = torch::stable::new_empty(alpha, {rows});
  launch(kOp, {ceil_div(rows, 4), 128, 0, 1}, largest_magnitudes, data<Chunk>(x), mutable_data<float>(to),
         static_cast<int>(streams), rows, static_cast<int>(width / 8), sum);
  return to;
}

// down [F, d] to [d, pitch], neurons as float8_neuron orders them, zeros beyond the last. Four for each thread.
__global__ void transpose_float8(const Float8* down, uint32_t* to, int neurons, int width, int pitch) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t column = thread % width;
  const int64_t quad = thread / width;
  if (quad >= pitch / 4) return;
  uint32_t four = 0;
  for (int i = 0; i < 4; ++i) {
    const int place = static_cast<int>(quad) * 4 + i, neuron = place / 32 * 32 + float8_neuron(place % 32);
    if (neuron < neurons)
      four |= static_cast<uint32_t>(down[static_cast<int64_t>(neuron) * width + column].bits) << 8 * i;
  }
  to[column * (pitch / 4) + quad] = four;
}

Tensor transposed_float8(const Tensor& down) {
  const int64_t neurons = down.size(0), width = down.size(1), pitch = ceil_div(neurons, 32) * 32;
  const Tensor to = torch::stable::new_empty(down, {width, pitch});
  launch(kOp, {ceil_div(width * (pitch / 4), 256), 256, 0, 1}, transpose_float8, data<Float8>(down),
         mutable_data<uint32_t>(to), static_cast<int>(neurons), static_cast<int>(width), static_cast<int>(pitch));
  return to;
}

// Rows of gates [R] and then of ups [R] to rows that have both, of 32 neurons each, zeros beyond the last. 16 bytes for
// each thread.
__global__ void interleave_streams(const Chunk* x, Chunk* to, int64_t rows, int chunks, int padded) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = thread / (2 * padded);
  if (row >= rows) return;
  const int place = static_cast<int>(thread % (2 * padded)), stream = place / 4 % 2, from = place / 8 * 4 + place % 4;
  to[thread] = from < chunks ? x[(stream * rows + row) * chunks + from] : Chunk{};
}

// `x` has two bytes for a number, and rows as with_aligned_rows makes them.
Tensor interleaved(const Tensor& x) {
  std::vector<int64_t> sizes = sizes_of(x);
  const int64_t rows = x.numel() / (2 * sizes.back()), chunks = sizes.back() / 8, padded = ceil_div(chunks, 4) * 4;
  sizes.erase(sizes.begin());
  sizes.back() = 2 * 8 * padded;
  const Tensor to = torch::stable::new_empty(x, sizes);
  launch(kOp, {ceil_div(rows * 2 * padded, 256), 256, 0, 1}, interleave_streams, data<Chunk>(x),
         mutable_data<Chunk>(to), rows, static_cast<int>(chunks), static_cast<int>(padded));
  return to;
}

// With rows that begin at multiples of 16 bytes, as copies to shared memory want them; few tensors have others.
Tensor with_aligned_rows(const Tensor& tensor) {
  const int64_t unit = tensor.scalar_type() == ScalarType::Float ? 4 : 8, width = tensor.size(-1);
  if (width % unit != 0) return torch::stable::pad(tensor, {0, unit - width % unit});
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

Tensor ff_norms(const Tensor& alpha_, const Tensor& position, const Tensor& features_, const Tensor& slope_,
                const Tensor& down_, const std::optional<Tensor>& down_scale_, const Tensor& residual_,
                const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& gamma,
                const std::optional<Tensor>& norm_scale, bool centre, const std::optional<Tensor>& sequences,
                std::string reduction, const std::optional<Tensor>& totals, bool triangular) {
  FFATTR_CHECK(alpha_.scalar_type() == ScalarType::Float, kOp, ": alpha has dtype ", dtype_text(alpha_.scalar_type()),
               ", the CUDA kernels take float32; use backend=\"torch\"");
  const WideArguments given(kOp, alpha_, position, residual_, residual_scale, gamma, norm_scale, centre, sequences,
                            reduction, totals);
  FFATTR_CHECK(given.reduction == "l2", kOp, ": reduction is '", given.reduction,
               "', the CUDA kernels have 'l2' alone; use backend=\"triton\" or \"torch\"");
  FFATTR_CHECK(given.heads <= kMostHeads, kOp, ": alpha has ", given.heads, " heads, expected at most ", kMostHeads);
  FFATTR_CHECK(features_.dim() == 4, kOp, ": features has to be [S, M, H + 1, F]");
  Tensor features = torch::stable::contiguous(features_), slope = torch::stable::contiguous(slope_);
  Tensor down = torch::stable::contiguous(down_), residual = given.residual;
  const std::optional<Tensor> down_scale = contiguous(down_scale_);
  const int64_t streams = features.size(0), neurons = features.size(3);
  FFATTR_CHECK((streams == 1 || streams == 2) && neurons > 0, kOp, ": features has shape ",
               shape_text(sizes_of(features)), ", expected [1 or 2, M, H + 1, F] with at least one neuron");
  const bool float8 = down_scale.has_value();
  const Wide type = wide_of(residual, float8);
  check_tensor(kOp, "features", features, {streams, given.keys, given.heads + 1, neurons}, given.wide);
  check_tensor(kOp, "slope", slope, {streams, given.queries, neurons}, given.wide);
  check_tensor(kOp, "down", down, {neurons, given.width}, float8 ? ScalarType::Float8_e4m3fn : given.wide);
  check_tensor(kOp, "down_scale", down_scale, {given.width}, ScalarType::Float);
  check_same_device(kOp, {{"alpha", given.alpha},
                          {"position", given.position},
                          {"features", features},
                          {"slope", slope},
                          {"down", down},
                          {"down_scale", down_scale},
                          {"residual", residual},
                          {"residual_scale", given.residual_scale},
                          {"gamma", given.gamma},
                          {"norm_scale", given.norm_scale}});
  check_sizes(kOp, {given.queries, given.columns, given.keys * (given.heads + 1), neurons, given.width});
  const OnDeviceOf guard(given.alpha);
  const Tensor out = torch::stable::new_zeros(given.alpha, {given.scopes(), given.queries, given.columns});
  if (out.numel() == 0 || given.keys == 0 || given.width == 0) return out;

  Pairs pairs{};
  pairs.queries = given.queries, pairs.columns = given.columns, pairs.keys = given.keys;
  pairs.neurons = static_cast<int>(neurons), pairs.width = static_cast<int>(given.width);
  pairs.heads = static_cast<int>(given.heads), pairs.centre = centre, pairs.triangular = triangular;
  pairs.own = Own::all;
  const bool own_is_free = pairs.padded_rows() == round_up(pairs.heads, 16);
  // One kernel for both launches: a tile of the one is two of the other.
  const bool sm90 = fits_sm90(pairs, type, static_cast<int>(streams));
  FFATTR_CHECK(sm90 || !float8, kOp, ": there is no CUDA kernel for float8 with ", given.heads, " heads and ", streams,
               " streams on compute capability ", capability() / 10, ".", capability() % 10,
               "; pass dtype=torch.bfloat16 or use backend=\"triton\"");

  features = with_aligned_rows(features), slope = with_aligned_rows(slope), residual = with_aligned_rows(residual);
  std::optional<Tensor> feature_bound, slope_bound;
  if (float8) {
    feature_bound = bounds_of(features, given.alpha, true);
    slope_bound = bounds_of(slope, given.alpha, false);
    down = transposed_float8(down);
  } else {
    down = with_aligned_rows(down);
  }
  if (sm90 && streams == 2) features = interleaved(features), slope = interleaved(slope);
  pairs.alpha = data<float>(given.alpha);
  pairs.position = data<int64_t>(given.position);
  pairs.residual_scale = data_or_null<float>(given.residual_scale);
  pairs.gamma = data_or_null<float>(given.gamma);
  pairs.norm_scale = data_or_null<float>(given.norm_scale);
  pairs.feature_bound = data_or_null<float>(feature_bound);
  pairs.slope_bound = data_or_null<float>(slope_bound);
  pairs.out = mutable_data<float>(out);
  const WideOperands operands{features.const_data_ptr(), slope.const_data_ptr(),
                              down.const_data_ptr(),     residual.const_data_ptr(),
                              features.size(-1),         down.size(1),
                              residual.size(2),          data_or_null<float>(down_scale),
                              static_cast<int>(streams), type};
  each_launch(given.sequences, kQueries, [&](const Sequences& some, int64_t blocks) {
    pairs.sequences = some;
    for (const Own own : {Own::all, Own::without, Own::only}) {
      if ((own == Own::all) != own_is_free) continue;
      pairs.own = own;
      if (pairs.rows() == 0) continue;  // no heads, and none that the residual would be
      sm90 ? launch_direct_sm90(pairs, operands, blocks) : launch_direct_sm80(pairs, operands, blocks);
    }
  });
  return out;
}

}  // namespace
}  // namespace ffattr::cuda

FFATTR_CUDA_OPERATOR(ff_norms)

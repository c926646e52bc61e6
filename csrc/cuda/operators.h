// Host side of the CUDA operators: checks, devices, and sequences as kernels take them.
#pragma once

#include "../sequences.h"
#include "launch.h"
#include "pairs.h"

// Registers ffattr::cuda::NAME as the operator ffattr_cuda::NAME (declared in csrc/library.cpp).
#ifdef __CUDACC__
#define FFATTR_CUDA_OPERATOR(NAME) \
  STABLE_TORCH_LIBRARY_IMPL(ffattr_cuda, CUDA, m) { m.impl(#NAME, TORCH_BOX(&ffattr::cuda::NAME)); }
#else
#define FFATTR_CUDA_OPERATOR(NAME) \
  STABLE_TORCH_LIBRARY_IMPL(ffattr_cuda, CPU, m) { m.impl(#NAME, TORCH_BOX(&ffattr::cuda::NAME)); }
#endif

namespace ffattr::cuda {

// Makes the device of an operator's arguments the current one, for PyTorch and for the runtime of this library.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    guard_.emplace(tensor.get_device_index());
    use_device(tensor.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

struct Named {
  const char* name;
  std::optional<Tensor> tensor;
};

// All on the device of the first: a kernel would read whatever lies at a pointer of another one.
inline void check_same_device(const char* op, const std::vector<Named>& all) {
  const Tensor& first = *all.front().tensor;
  for (const Named& one : all)
    FFATTR_CHECK(!one.tensor.has_value() || (one.tensor->is_cuda() == first.is_cuda() &&
                                             one.tensor->get_device_index() == first.get_device_index()),
                 op, ": ", one.name, " is on another device than ", all.front().name);
}

// Calls run(sequences, blocks of `unit` queries) for up to kSequences at a time.
template <class Run>
void each_launch(const std::vector<Sequence>& all, int unit, const Run& run) {
  for (size_t start = 0; start < all.size(); start += kSequences) {
    Sequences some{};
    for (size_t i = start; i < all.size() && some.count < kSequences; ++i) {
      const int b = some.count++;
      some.query[b] = static_cast<int>(all[i].first_query), some.key[b] = static_cast<int>(all[i].first_key);
      some.query[b + 1] = static_cast<int>(all[i].first_query + all[i].queries);
      some.key[b + 1] = static_cast<int>(all[i].first_key + all[i].keys);
      some.block[b + 1] = some.block[b] + static_cast<int>(ceil_div(all[i].queries, unit));
    }
    run(some, some.block[some.count]);
  }
}

// Sizes that kernels count in 32 bits: each for itself; products of them are counted in 64.
inline void check_sizes(const char* op, const std::vector<int64_t>& sizes) {
  for (const int64_t size : sizes)
    FFATTR_CHECK(size < 1 << 30, op, ": a size of ", size, " is more than kernels count; pass blocks of it");
}

}  // namespace ffattr::cuda

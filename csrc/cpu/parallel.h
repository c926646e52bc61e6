// Threads and scratch memory of the CPU kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "../common.h"

namespace ffattr::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised, cache-line aligned memory that is freed with its owner.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* pointer) const { ::operator delete(pointer, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

// Runs `work(task, worker)` for every task on PyTorch's own threads (torch.set_num_threads holds). Tasks are taken from
// a shared counter as workers get free, so that unequal ones (a causal map's) balance; `worker` < workers() owns
// scratch.
inline int64_t workers(int64_t tasks) {
  return std::max<int64_t>(1, std::min<int64_t>(tasks, torch::stable::get_num_threads()));
}

template <class Work>
void parallel_tasks(int64_t tasks, const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers(tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++; task < tasks; task = next++) work(task, worker);
  });
}

}  // namespace ffattr::cpu

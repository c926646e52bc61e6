// Several sequences on a CPU: one run for each.
#pragma once

#include "../sequences.h"

namespace ffattr::cpu {

// The result [..., N, M] of `shape`, from the [..., queries, keys] that `run(sequence)` returns; zero in the padding.
template <class Run>
Tensor each_sequence(const std::vector<Sequence>& sequences, const Tensor& alpha, const std::vector<int64_t>& shape,
                     const Run& run) {
  if (sequences.size() == 1 && sequences[0].keys == alpha.size(2)) return run(sequences[0]);
  const Tensor out = torch::stable::new_zeros(alpha, shape);
  for (const Sequence& sequence : sequences) {
    if (sequence.queries == 0 || sequence.keys == 0) continue;
    Tensor to = sequence.of_pairs(out);
    torch::stable::copy_(to, run(sequence));
  }
  return out;
}

}  // namespace ffattr::cpu

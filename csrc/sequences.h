// The argument `sequences` of the maps (ffattr/ops/contract.py), with its checks.
#pragma once

#include "common.h"

namespace ffattr {

// Consecutive queries, and the consecutive keys that they meet: columns 0 .. keys of their rows of alpha.
struct Sequence {
  int64_t first_query, queries, first_key, keys;

  Tensor of_queries(const Tensor& tensor, int64_t axis = 0) const {
    return narrowed(tensor, axis, first_query, queries);
  }
  std::optional<Tensor> of_queries(const std::optional<Tensor>& tensor) const {
    return tensor.has_value() ? std::optional<Tensor>(of_queries(*tensor)) : std::nullopt;
  }
  Tensor of_keys(const Tensor& tensor, int64_t axis = 0) const { return narrowed(tensor, axis, first_key, keys); }
  // This sequence's pairs of alpha or of a result [..., N, M]: a view.
  Tensor of_pairs(Tensor tensor) const {
    Tensor rows = torch::stable::narrow(tensor, -2, first_query, queries);
    return torch::stable::narrow(rows, -1, 0, keys);
  }
};

// `keys`: rows of the key-wise arguments. Without `sequences` it is not read: one sequence has a key for each column.
inline std::vector<Sequence> sequences_of(const char* op, const std::optional<Tensor>& sequences, const Tensor& alpha,
                                          int64_t keys) {
  const int64_t queries = alpha.size(1), columns = alpha.size(2);
  if (!sequences.has_value()) return {{0, queries, 0, columns}};
  const std::vector<int64_t> sizes = sizes_of(*sequences);
  FFATTR_CHECK(sizes.size() == 2 && sizes[0] >= 1 && sizes[1] == 2, op, ": sequences has shape ", shape_text(sizes),
               ", expected [B + 1, 2]");
  check_tensor(op, "sequences", *sequences, sizes, ScalarType::Long);
  FFATTR_CHECK(sequences->is_cpu(), op, ": sequences is on a GPU, expected on the CPU");
  const Tensor table = torch::stable::contiguous(*sequences);
  const int64_t count = sizes[0] - 1, *bounds = data<int64_t>(table), *last = bounds + 2 * count;
  FFATTR_CHECK(bounds[0] == 0 && bounds[1] == 0 && last[0] == queries && last[1] == keys, op, ": sequences goes from ",
               shape_text({bounds[0], bounds[1]}), " to ", shape_text({last[0], last[1]}), ", expected from [0, 0] to ",
               shape_text({queries, keys}), ", the numbers of queries and keys");
  std::vector<Sequence> all;
  for (int64_t b = 0; b < count; ++b, bounds += 2) {
    const Sequence next{bounds[0], bounds[2] - bounds[0], bounds[1], bounds[3] - bounds[1]};
    FFATTR_CHECK(next.queries >= 0 && next.keys >= 0, op, ": sequences decreases from ",
                 shape_text({bounds[0], bounds[1]}), " in row ", b, " to ", shape_text({bounds[2], bounds[3]}));
    FFATTR_CHECK(next.keys <= columns, op, ": sequences has ", next.keys, " keys in sequence ", b, ", but alpha only ",
                 columns, " columns");
    all.push_back(next);
  }
  return all;
}

}  // namespace ffattr

// The arguments of gram_norms, for every device.
#pragma once

#include "sequences.h"

namespace ffattr {

// Checked and contiguous.
struct GramArguments {
  Tensor alpha, position, gram;
  std::optional<Tensor> row_scale;
  std::vector<Sequence> sequences;
  int64_t heads, queries, columns, keys, size;  // keys of all sequences together; a Gram matrix is [size, size]

  GramArguments(const char* op, const Tensor& alpha_, const Tensor& position_, const Tensor& gram_,
                const std::optional<Tensor>& row_scale_, const std::optional<Tensor>& sequences_)
      : alpha(torch::stable::contiguous(alpha_)),
        position(torch::stable::contiguous(position_)),
        gram(torch::stable::contiguous(gram_)),
        row_scale(contiguous(row_scale_)) {
    FFATTR_CHECK(alpha.dim() == 3 && gram.dim() == 3, op, ": alpha has to be [H, N, M], gram [M, G, G]");
    check_floating(op, "alpha", alpha);
    heads = alpha.size(0), queries = alpha.size(1), columns = alpha.size(2), size = gram.size(1);
    keys = sequences_.has_value() ? gram.size(0) : columns;
    FFATTR_CHECK(size == heads || size == heads + 1, op, ": gram is for ", size, " heads, expected ", heads,
                 " or, with the residual, ", heads + 1);
    sequences = sequences_of(op, sequences_, alpha, keys);
    check_tensor(op, "position", position, {queries}, ScalarType::Long);
    check_tensor(op, "gram", gram, {keys, size, size}, ScalarType::Double);
    check_tensor(op, "row_scale", row_scale, {queries}, alpha.scalar_type());
  }
};

}  // namespace ffattr

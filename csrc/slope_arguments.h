// The tensors of ig_slope, for every device.
#pragma once

#include "common.h"

namespace ffattr {

// Contiguous, and checked but for the dtype of z.
struct SlopeArguments {
  Tensor z;                               // [S, N, F]
  std::optional<Tensor> base, row_scale;  // [S, N or 1, F], [N]
  int64_t streams, rows, neurons, base_rows;

  // `scale_dtype`: another one that row_scale may have.
  SlopeArguments(const char* op, const Tensor& z_, const std::optional<Tensor>& base_,
                 const std::optional<Tensor>& row_scale_, ScalarType scale_dtype)
      : z(torch::stable::contiguous(z_)), base(contiguous(base_)), row_scale(contiguous(row_scale_)) {
    FFATTR_CHECK(z.dim() == 3 && (z.size(0) == 1 || z.size(0) == 2), op, ": z has shape ", shape_text(sizes_of(z)),
                 ", expected [S, N, F] with S = 1 (dense) or 2 (gate, up)");
    streams = z.size(0), rows = z.size(1), neurons = z.size(2);
    base_rows = base.has_value() && base->dim() == 3 && base->size(1) == 1 ? 1 : rows;
    check_tensor(op, "base", base, {streams, base_rows, neurons}, z.scalar_type());
    const bool as_z = row_scale.has_value() && row_scale->scalar_type() == z.scalar_type();
    check_tensor(op, "row_scale", row_scale, {rows}, as_z ? z.scalar_type() : scale_dtype);
  }
};

}  // namespace ffattr

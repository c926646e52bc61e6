// The arguments that both wide maps share, for every device: alpha, position and those from residual on
// (ffattr/ops/schemas.inc).
#pragma once

#include "sequences.h"

namespace ffattr {

// Checked and contiguous.
struct WideArguments {
  Tensor alpha, position, residual;
  std::optional<Tensor> residual_scale, gamma, norm_scale, totals;
  bool centre;
  std::string reduction;
  std::vector<Sequence> sequences;
  int64_t heads, queries, columns, keys, width;  // of all sequences together
  ScalarType dtype, wide;                        // of alpha and of the wide operands

  WideArguments(const char* op, const Tensor& alpha, const Tensor& position, const Tensor& residual,
                const std::optional<Tensor>& residual_scale, const std::optional<Tensor>& gamma,
                const std::optional<Tensor>& norm_scale, bool centre, const std::optional<Tensor>& sequences,
                const std::string& reduction, const std::optional<Tensor>& totals)
      : alpha(torch::stable::contiguous(alpha)),
        position(torch::stable::contiguous(position)),
        residual(torch::stable::contiguous(residual)),
        residual_scale(contiguous(residual_scale)),
        gamma(contiguous(gamma)),
        norm_scale(contiguous(norm_scale)),
        totals(contiguous(totals)),
        centre(centre),
        reduction(reduction),
        dtype(alpha.scalar_type()),
        wide(residual.scalar_type()) {
    FFATTR_CHECK(alpha.dim() == 3 && residual.dim() == 3, op, ": alpha has to be [H, N, M], residual [M, H + 1, d]");
    check_floating(op, "alpha", alpha);
    heads = alpha.size(0), queries = alpha.size(1), columns = alpha.size(2), width = residual.size(2);
    keys = sequences.has_value() ? residual.size(0) : columns;
    this->sequences = sequences_of(op, sequences, alpha, keys);
    check_tensor(op, "position", position, {queries}, ScalarType::Long);
    check_tensor(op, "residual", residual, {keys, heads + 1, width}, wide);
    check_tensor(op, "residual_scale", residual_scale, {queries}, dtype);
    check_tensor(op, "gamma", gamma, {width}, dtype);
    check_tensor(op, "norm_scale", norm_scale, {queries}, dtype);
    FFATTR_CHECK(reduction == "l2" || reduction == "l1" || reduction == "alti", op, ": reduction is '", reduction,
                 "', expected one of 'l2', 'l1', 'alti'");
    FFATTR_CHECK(totals.has_value() == (reduction == "alti"), op, ": reduction is '", reduction, "' ",
                 totals.has_value() ? "with" : "without", " totals, which go with 'alti' alone");
    check_tensor(op, "totals", totals, {scopes(), queries, width}, dtype);
  }

  int64_t scopes() const { return norm_scale.has_value() ? 3 : 2; }
};

}  // namespace ffattr

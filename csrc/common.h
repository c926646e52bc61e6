// Checks with messages, dtype dispatch and small conveniences over PyTorch's stable ABI.
// The only header of this project that names the stable-ABI headers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

// FFATTR_CHECK(condition, "ff_norms: slope is ", ..., ", expected ...") throws std::runtime_error (RuntimeError in Python).
#define FFATTR_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace ffattr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// `tensor` has exactly the sizes `expected` and the dtype `dtype`; the message names operator and argument.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& expected,
                         ScalarType dtype) {
  FFATTR_CHECK(tensor.scalar_type() == dtype, op, ": ", name,
               " has another dtype than alpha (position: int64; gram: float64 or alpha's)");
  const std::vector<int64_t> sizes = sizes_of(tensor);
  FFATTR_CHECK(sizes == expected, op, ": ", name, " has shape ", shape_text(sizes), ", expected ",
               shape_text(expected));
}

inline void check_tensor(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         const std::vector<int64_t>& expected, ScalarType dtype) {
  if (tensor.has_value()) check_tensor(op, name, *tensor, expected, dtype);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace ffattr

// Runs `...` with `scalar_t` = float or double; anything else is refused by name of the operator.
#define FFATTR_DISPATCH_FLOATING(TENSOR, OP, ...)                                                                    \
  [&] {                                                                                                              \
    const auto dispatched = (TENSOR).scalar_type();                                                                  \
    FFATTR_CHECK(dispatched == ffattr::ScalarType::Float || dispatched == ffattr::ScalarType::Double, OP,            \
                 ": the CPU kernels compute in float32 or float64; convert the inputs");                             \
    if (dispatched == ffattr::ScalarType::Float) {                                                                   \
      using scalar_t = float;                                                                                        \
      return __VA_ARGS__();                                                                                          \
    }                                                                                                                \
    using scalar_t = double;                                                                                         \
    return __VA_ARGS__();                                                                                            \
  }()

// Checks with messages, dtype dispatch and small conveniences over PyTorch's stable ABI.
// The only header of this project that names the stable-ABI headers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffattr {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace ffattr

// FFATTR_CHECK(condition, "ff_norms: slope is ", ..., ", expected ...") throws std::runtime_error: Python's
// RuntimeError.
#define FFATTR_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(ffattr::text(__VA_ARGS__))

namespace ffattr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string joined;
  for (const int64_t size : sizes) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
  return "[" + joined + "]";
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another type";
  }
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The argument whose dtype all others share.
inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  FFATTR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": ", name, " has dtype ",
               dtype_text(dtype), ", expected float32 or float64");
}

// `tensor` has exactly the sizes `expected` and the dtype `dtype`; the message names operator and argument.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& expected,
                         ScalarType dtype) {
  FFATTR_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has dtype ", dtype_text(tensor.scalar_type()),
               ", expected ", dtype_text(dtype));
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

// Entries first .. first + count of `axis`, as a tensor of their own where they do not lie together.
inline Tensor narrowed(Tensor tensor, int64_t axis, int64_t first, int64_t count) {
  return torch::stable::contiguous(torch::stable::narrow(tensor, axis, first, count));
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

// Runs `...` with `scalar_t` = float or double, as check_floating() allows.
#define FFATTR_DISPATCH_FLOATING(TENSOR, ...)                  \
  [&] {                                                        \
    if ((TENSOR).scalar_type() == ffattr::ScalarType::Float) { \
      using scalar_t = float;                                  \
      return __VA_ARGS__();                                    \
    }                                                          \
    using scalar_t = double;                                   \
    return __VA_ARGS__();                                      \
  }()

// libffattr: loading it declares the operators and registers the kernels of this binary with them, in any process that
// has PyTorch's libraries. It needs no Python; what it was built with and runs as here, `ffattr_build_info` says.
#include <string>

#include "common.h"
#include "cpu/kernels.h"

namespace {

constexpr const char* kSchemas[] = {
#include "../ffattr/ops/schemas.inc"
};

void declare(torch::stable::detail::StableLibrary& library) {
  for (const char* schema : kSchemas) library.def(schema);
}

std::string describe() {
  const ffattr::cpu::Isa& isa = ffattr::cpu::isa();
  constexpr const char* units[] = {"", "dot products", "a matrix unit", "dot products, emulated",
                                   "a matrix unit, emulated"};
  constexpr const char* products[] = {"float32", "three bfloat16 products", "bfloat16"};
  return ffattr::text("compiler: ", __VERSION__, "\ninstruction set: ", isa.name,
                      isa.why.empty() ? "" : " (" + isa.why + ")",
                      "\nfloat32 by: ", products[static_cast<int>(ffattr::cpu::float32_product())],
                      "\nbfloat16 by: ", units[static_cast<int>(isa.unit)], "\n");
}

}  // namespace

STABLE_TORCH_LIBRARY(ffattr, m) { declare(m); }
STABLE_TORCH_LIBRARY(ffattr_cuda, m) { declare(m); }

// Lines `name: value`, which stay valid as long as the library is loaded.
extern "C" __attribute__((visibility("default"))) const char* ffattr_build_info() {
  static const std::string info = describe();
  return info.c_str();
}

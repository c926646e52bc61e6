// The Python module ffattr._C: loading it registers the kernels of this binary with the operators that
// ffattr/ops/contract.py declares; all it says by itself is what it was built with and what it runs as here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/kernels.h"

namespace {

std::map<std::string, std::string> build_info() {
  const ffattr::cpu::Isa& isa = ffattr::cpu::isa();
  constexpr const char* units[] = {"", "dot products", "a matrix unit", "dot products, emulated",
                                   "a matrix unit, emulated"};
  constexpr const char* products[] = {"float32", "three bfloat16 products", "bfloat16"};
  return {{"compiler", __VERSION__},
          {"instruction set", isa.name + (isa.why.empty() ? "" : " (" + isa.why + ")")},
          {"float32 by", products[static_cast<int>(ffattr::cpu::float32_product())]},
          {"bfloat16 by", units[static_cast<int>(isa.unit)]}};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of ffattr; see ffattr.ops for what they compute.";
  module.def("build_info", &build_info, "Compiler, and the CPU instruction set chosen on this machine.");
}

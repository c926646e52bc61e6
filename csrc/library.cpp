// The Python module ffattr._C: loading it registers the kernels of this binary with the operators that
// ffattr/ops/contract.py declares; all it says by itself is what it was built with and what it runs as here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/kernels.h"

namespace {

std::map<std::string, std::string> build_info() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return {{"compiler", __VERSION__}, {"instruction set", names[static_cast<int>(ffattr::cpu::isa())]}};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of ffattr; see ffattr.ops for what they compute.";
  module.def("build_info", &build_info, "Compiler, and the CPU instruction set chosen on this machine.");
}

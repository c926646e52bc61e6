// The Python module ffattr._C: loading it registers the kernels of this binary with the operators that
// ffattr/ops/contract.py declares; all it says by itself is what it was built with and what it runs as here. By the
// limited API alone, so that one binary is for every Python from 3.10 on.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <string>

#include "cpu/kernels.h"

namespace {

bool put(PyObject* to, const char* name, const std::string& text) {
  PyObject* value = PyUnicode_FromString(text.c_str());
  const bool done = value != nullptr && PyDict_SetItemString(to, name, value) == 0;
  Py_XDECREF(value);
  return done;
}

PyObject* build_info(PyObject*, PyObject*) {
  const ffattr::cpu::Isa& isa = ffattr::cpu::isa();
  constexpr const char* units[] = {"", "dot products", "a matrix unit", "dot products, emulated",
                                   "a matrix unit, emulated"};
  constexpr const char* products[] = {"float32", "three bfloat16 products", "bfloat16"};
  PyObject* found = PyDict_New();
  if (found == nullptr) return nullptr;
  if (put(found, "compiler", __VERSION__) &&
      put(found, "instruction set", isa.name + (isa.why.empty() ? "" : " (" + isa.why + ")")) &&
      put(found, "float32 by", products[static_cast<int>(ffattr::cpu::float32_product())]) &&
      put(found, "bfloat16 by", units[static_cast<int>(isa.unit)]))
    return found;
  Py_DECREF(found);
  return nullptr;
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS,
                          "build_info() -> dict[str, str]\n\n"
                          "Compiler, and the CPU instruction set chosen on this machine."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "Compiled kernels of ffattr; see ffattr.ops for what they compute.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }

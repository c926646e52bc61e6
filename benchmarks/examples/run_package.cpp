// Runs an operator of ffattr, and the package of export_norms.py that calls it, in a program without Python:
// run_package LIBRARY PACKAGE
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <vector>

at::Tensor numbers(at::IntArrayRef shape) {
  return at::arange(c10::multiply_integers(shape), at::kFloat).sin().reshape(shape);
}

int main(int count, char** given) {
  void* library = count == 3 ? dlopen(given[1], RTLD_NOW) : nullptr;  // declares the operators
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", count == 3 ? dlerror() : "usage: run_package LIBRARY PACKAGE");
    return 1;
  }
  const auto build_info = reinterpret_cast<const char* (*)()>(dlsym(library, "ffattr_build_info"));
  std::printf("%s", build_info());

  const at::Tensor alpha = numbers({2, 5, 7}).abs(), position = at::arange(5, at::kLong);
  const at::Tensor features = numbers({1, 7, 3, 8}), slope = numbers({1, 5, 8}), down = numbers({8, 4});
  const at::Tensor residual = numbers({7, 3, 4});

  // The operator by its name, with all arguments of its schema.
  const c10::IValue none;
  torch::jit::Stack stack{alpha, position, features, slope, down, none, residual, none,
                          none,  none,     false,    none,  "l2", none, false};
  c10::Dispatcher::singleton().findSchemaOrThrow("ffattr::ff_norms", "").callBoxed(stack);
  const at::Tensor norms = stack.front().toTensor();

  torch::inductor::AOTIModelPackageLoader loader(given[2]);
  const at::Tensor packaged = loader.run({alpha, position, features, slope, down, residual}).front();
  std::printf("norms of %.6g together; the package's are %s\n", norms.sum().item<double>(),
              packaged.equal(norms) ? "the same" : "others");
  return packaged.equal(norms) ? 0 : 1;
}

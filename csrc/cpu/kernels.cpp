// Chooses, once, the kernels for this processor.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace ffattr::cpu {

namespace baseline {
template <class T>
const Kernels<T>& table();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T>
const Kernels<T>& table();
}
namespace avx512 {
template <class T>
const Kernels<T>& table();
}
#endif

namespace {

Isa choose() {
  Isa widest = Isa::baseline;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) widest = Isa::avx2;
  if (widest == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    widest = Isa::avx512;
#endif
  const char* asked = std::getenv("FFATTR_CPU_ISA");
  if (asked != nullptr && std::strcmp(asked, "baseline") == 0) return Isa::baseline;
  if (asked != nullptr && std::strcmp(asked, "avx2") == 0) return std::min(widest, Isa::avx2);
  return widest;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::table<T>();
  if (isa() == Isa::avx2) return avx2::table<T>();
#endif
  return baseline::table<T>();
}
template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace ffattr::cpu

// Chooses, once, the kernels for this process.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#if FFATTR_HAS_UNITS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffattr::cpu {

#define FFATTR_DECLARE_TABLE(name) \
  namespace name {                 \
  template <class T>               \
  const Kernels<T>& table();       \
  }
#define FFATTR_DECLARE_UNIT(name)     \
  namespace name {                    \
  template <int parts>                \
  const Kernels<float>& unit_table(); \
  bool unit_works();                  \
  }

FFATTR_DECLARE_TABLE(baseline)
FFATTR_DECLARE_UNIT(emulated_tiles)
FFATTR_DECLARE_UNIT(emulated_dots)
#if defined(__x86_64__)
FFATTR_DECLARE_TABLE(avx2)
FFATTR_DECLARE_TABLE(avx512)
#endif
#if FFATTR_HAS_UNITS
FFATTR_DECLARE_UNIT(amx)
FFATTR_DECLARE_UNIT(avx512_bf16)
#endif

namespace {

// From the narrowest to the widest, and what tests ask for.
const Isa kKnown[] = {{Vectors::baseline, Unit::none, "baseline", ""},
                      {Vectors::avx2, Unit::none, "avx2", ""},
                      {Vectors::avx512, Unit::none, "avx512", ""},
                      {Vectors::avx512, Unit::dots, "avx512_bf16", ""},
                      {Vectors::avx512, Unit::tiles, "amx", ""},
                      {Vectors::baseline, Unit::emulated_dots, "emulated_dots", ""},
                      {Vectors::baseline, Unit::emulated_tiles, "emulated_tiles", ""}};
constexpr int kReal = 5;

// Why this process cannot run it, or an empty text.
std::string lacking(const Isa& one) {
#if defined(__x86_64__)
  if (one.vectors >= Vectors::avx2 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")))
    return "the processor has no AVX2";
  if (one.vectors == Vectors::avx512 && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")))
    return "the processor has no AVX-512";
#else
  if (one.vectors != Vectors::baseline) return "the processor is no x86-64";
#endif
  if (one.unit != Unit::dots && one.unit != Unit::tiles) return "";
#if FFATTR_HAS_UNITS
  unsigned a, b, c, d;
  if (one.unit == Unit::dots) {
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return "the processor has no AVX512-BF16";
    return avx512_bf16::unit_works() ? "" : "its products are wrong";
  }
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))
    return "the processor has no AMX for bfloat16";
  constexpr long request_permission = 0x1023, tile_data = 18;  // asm/prctl.h: once for all threads of the process
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return "the kernel grants no tile data";
  return amx::unit_works() ? "" : "its products are wrong";
#else
  return "the compiler has no instructions for it";
#endif
}

Isa choose() {
  const char* asked = std::getenv("FFATTR_CPU_ISA");
  int widest = kReal - 1;
  std::string why;
  if (asked != nullptr && *asked != 0) {
    int found = -1;
    for (int i = 0; i < static_cast<int>(std::size(kKnown)); ++i)
      if (std::strcmp(asked, kKnown[i].name) == 0) found = i;
    why = std::string("FFATTR_CPU_ISA=") + asked + (found < 0 ? " is not known" : "");
    if (found >= kReal) {
      Isa chosen = kKnown[found];
      chosen.why = why;
      return chosen;
    }
    if (found >= 0) widest = found;
  }
  for (int i = widest;; --i) {  // the first of them runs everywhere
    const std::string reason = lacking(kKnown[i]);
    if (reason.empty()) {
      Isa chosen = kKnown[i];
      chosen.why = why;
      return chosen;
    }
    why += (why.empty() ? "" : "; ") + std::string("not ") + kKnown[i].name + ": " + reason;
  }
}

template <int parts>
const Kernels<float>& unit_kernels() {
  switch (isa().unit) {
#if FFATTR_HAS_UNITS
    case Unit::tiles:
      return amx::unit_table<parts>();
    case Unit::dots:
      return avx512_bf16::unit_table<parts>();
#endif
    case Unit::emulated_dots:
      return emulated_dots::unit_table<parts>();
    default:
      return emulated_tiles::unit_table<parts>();
  }
}

}  // namespace

const Isa& isa() {
  static const Isa chosen = choose();
  return chosen;
}

Product float32_product() {
  const Unit unit = isa().unit;
  return unit == Unit::none || unit == Unit::dots ? Product::native : Product::split;
}

template <class T>
const Kernels<T>& kernels(Product product) {
  if constexpr (std::is_same_v<T, float>) {
    if (product == Product::split) return unit_kernels<2>();
    if (product == Product::bf16) return unit_kernels<1>();
  }
#if defined(__x86_64__)
  if (isa().vectors == Vectors::avx512) return avx512::table<T>();
  if (isa().vectors == Vectors::avx2) return avx2::table<T>();
#endif
  return baseline::table<T>();
}
template const Kernels<float>& kernels(Product);
template const Kernels<double>& kernels(Product);

}  // namespace ffattr::cpu

// csrc/cuda/instructions.h on the emulator: what the PTX manual says of each instruction, in plain C++. Which lane
// holds which element is from its sections on matrix fragments.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

inline void __syncthreads() {
  emulator::machine().together(emulator::block().all, "__syncthreads", emulator::thread(), nullptr, [](auto&) {});
}

inline int __syncthreads_or(int predicate) {
  bool result = predicate != 0;
  emulator::machine().together(emulator::block().all, "__syncthreads_or", emulator::thread(), &result,
                               [](const std::vector<void*>& all) {
                                 bool any = false;
                                 for (void* one : all) any |= *static_cast<bool*>(one);
                                 for (void* one : all) *static_cast<bool*>(one) = any;
                               });
  return result ? 32 : 0;  // what is promised is not zero, and not one
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  struct Given {
    T value;
    int distance;
  } given{value, distance};
  emulator::machine().together(emulator::warp(), "__shfl_xor_sync", emulator::thread() % 32, &given,
                               [](const std::vector<void*>& all) {
                                 T values[32];
                                 for (int lane = 0; lane < 32; ++lane)
                                   values[lane] = static_cast<Given*>(all[lane])->value;
                                 for (int lane = 0; lane < 32; ++lane) {
                                   Given& to = *static_cast<Given*>(all[lane]);
                                   to.value = values[lane ^ to.distance];
                                 }
                               });
  return given.value;
}

namespace ffattr::cuda {

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};

inline float bits_to_float(uint32_t x) {
  float to;
  std::memcpy(&to, &x, 4);
  return to;
}
inline uint32_t float_to_bits(float x) {
  uint32_t to;
  std::memcpy(&to, &x, 4);
  return to;
}

// A number of a narrow type with `exponent` and `fraction` bits, by its magnitude's bits.
template <int Fraction, int Bias>
float narrow_to_float(uint32_t bits) {
  const uint32_t exponent = bits >> Fraction, fraction = bits & ((1u << Fraction) - 1);
  return exponent == 0
             ? std::ldexp(static_cast<float>(fraction), 1 - Bias - Fraction)
             : std::ldexp(static_cast<float>(fraction | 1u << Fraction), static_cast<int>(exponent) - Bias - Fraction);
}

// The bits of |x| rounded to the nearest, ties to even, as if the exponent had no end.
template <int Fraction, int Bias>
uint32_t float_to_narrow(float x) {
  const float size = std::fabs(x);
  if (size == 0) return 0;
  const int exponent = std::max(std::ilogb(size), 1 - Bias);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, Fraction - exponent)));  // may carry over
  return (static_cast<uint32_t>(exponent + Bias - 1) << Fraction) + units;
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t size = x.bits & 0x7FFF;
  const float magnitude = size > 0x7C00 ? NAN : size == 0x7C00 ? INFINITY : narrow_to_float<10, 15>(size);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}
inline float to_float(Float8 x) {
  const uint32_t size = x.bits & 0x7F;
  const float magnitude = size == 0x7F ? NAN : narrow_to_float<3, 7>(size);
  return x.bits & 0x80 ? -magnitude : magnitude;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (std::isnan(x)) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7FFF};
  const uint32_t size = std::isinf(x) ? 0x7C00 : float_to_narrow<10, 15>(x);
  return {static_cast<uint16_t>(sign | std::min(size, 0x7C00u))};
}
template <>
inline Float8 from_float<Float8>(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return {0x7F};
  const uint32_t size = std::isinf(x) ? 0x7E : float_to_narrow<3, 7>(x);
  return {static_cast<uint8_t>(sign | std::min(size, 0x7Eu))};  // saturates
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <class T>
struct PairOf {
  float low, high;
};
template <class T>
PairOf<T> unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

inline int uniform(int x) { return x; }

// Shared memory.

inline uint8_t* dynamic_shared() { return emulator::block().shared; }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulator::block().shared);
}

inline void copy_async(uint32_t to, const void* from, bool there) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("cp.async reads at an address that is not aligned");
  emulator::machine().fiber->copies.back().push_back({emulator::block().at(to, 16, 16), from, there});
}
inline void copy_commit() { emulator::machine().fiber->copies.emplace_back(); }
template <int Pending>
void copy_wait() {
  auto& groups = emulator::machine().fiber->copies;
  while (groups.size() > Pending + 1) {
    for (const emulator::Copy& copy : groups.front())
      copy.there ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    groups.erase(groups.begin());
  }
}

template <bool Transposed>
void load_four_matrices(uint32_t (&to)[4], uint32_t address) {
  struct Given {
    uint32_t (&to)[4];
    const uint8_t* row;
  } given{to, emulator::block().at(address, 16, 16)};
  emulator::machine().together(emulator::warp(), Transposed ? "ldmatrix.trans" : "ldmatrix", emulator::thread() % 32,
                               &given, [](const std::vector<void*>& all) {
                                 const auto element = [&](int matrix, int row, int column) {
                                   uint16_t value;
                                   std::memcpy(&value, static_cast<Given*>(all[8 * matrix + row])->row + 2 * column, 2);
                                   return static_cast<uint32_t>(value);
                                 };
                                 for (int lane = 0; lane < 32; ++lane)
                                   for (int i = 0; i < 4; ++i) {
                                     const int g = lane / 4, t = lane % 4;
                                     static_cast<Given*>(all[lane])->to[i] =
                                         Transposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                                                    : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
                                   }
                               });
}
inline void load_matrices(uint32_t (&to)[4], uint32_t address) { load_four_matrices<false>(to, address); }
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) { load_four_matrices<true>(to, address); }

inline float load_shared(uint32_t address) {
  float to;
  std::memcpy(&to, emulator::block().at(address, 4, 4), 4);
  return to;
}

template <class T>
float half_of(uint32_t pair, int i) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * i))});
}

// What a lane brings to a product of a warp.
struct Operands {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// Tensor cores cut sums off where this machine would round them.
inline float cut_off(double exact) {
  const float near = static_cast<float>(exact);
  return std::fabs(static_cast<double>(near)) > std::fabs(exact) ? std::nextafterf(near, 0.0f) : near;
}

template <int Depth, class A, class B>
void multiply_warp(const std::vector<void*>& all, const A& a_of, const B& b_of) {
  float a[16][Depth], b[Depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Operands& from = *static_cast<Operands*>(all[lane]);
    a_of(a, from, lane / 4, lane % 4);
    b_of(b, from, lane / 4, lane % 4);
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = 0;
      for (int k = 0; k < Depth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      const int lane = row % 8 * 4 + column / 2;
      float& c = static_cast<Operands*>(all[lane])->c[row / 8 * 2 + column % 2];
      c = cut_off(c + sum);
    }
}

template <class T>
void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Operands given{c, a, {b0, b1}};
  emulator::machine().together(
      emulator::warp(), "mma.m16n8k16", emulator::thread() % 32, &given, [](const std::vector<void*>& all) {
        multiply_warp<16>(
            all,
            [](auto& to, const Operands& from, int g, int t) {
              for (int i = 0; i < 8; ++i)
                to[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = half_of<T>(from.a[i / 2], i % 2);
            },
            [](auto& to, const Operands& from, int g, int t) {
              for (int i = 0; i < 4; ++i) to[2 * t + i % 2 + i / 2 * 8][g] = half_of<T>(from.b[i / 2], i % 2);
            });
      });
}

inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Operands given{c, a, {b0, b1}};
  const auto value = [](uint32_t x) { return bits_to_float(x & ~0x1FFFu); };
  emulator::machine().together(emulator::warp(), "mma.m16n8k8", emulator::thread() % 32, &given,
                               [&](const std::vector<void*>& all) {
                                 multiply_warp<8>(
                                     all,
                                     [&](auto& to, const Operands& from, int g, int t) {
                                       for (int i = 0; i < 4; ++i) to[g + i % 2 * 8][t + i / 2 * 4] = value(from.a[i]);
                                     },
                                     [&](auto& to, const Operands& from, int g, int t) {
                                       for (int i = 0; i < 2; ++i) to[t + i * 4][g] = value(from.b[i]);
                                     });
                               });
}

}  // namespace ffattr::cuda

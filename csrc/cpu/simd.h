// Vectors of FFATTR_VECTOR_BYTES. Included by the isa_*.cpp files alone, once for each instruction set; everything the
// kernels define lives in the namespace FFATTR_ISA, so that no two instruction sets share an inline function.
#pragma once

#include <cstdint>

#ifndef FFATTR_ISA
#error "include this through one of the isa_*.cpp files"
#endif

namespace ffattr::cpu::FFATTR_ISA {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FFATTR_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(FFATTR_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = FFATTR_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

// A vector, or for the rest of a row a single number.
template <class Value, class T>
inline Value load_as(const T* from) {
  if constexpr (sizeof(Value) == sizeof(T))
    return *from;
  else
    return load(from);
}

template <class T>
inline void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

template <class T>
inline void store(T* to, T value) {
  *to = value;
}

template <class T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};  // x - 0 is x for every x; 0 + x is not, and would cost an addition
}

template <class T>
inline T sum_of(Vector<T> vector) {
  T sum{0};
  for (int i = 0; i < kLanes<T>; ++i) sum += vector[i];
  return sum;
}

}  // namespace ffattr::cpu::FFATTR_ISA

// Products of blocks of bfloat16 numbers with float32 sums: by the processor's matrix unit (AMX), by its dot products
// (AVX512-BF16), or, for every processor, by the same instructions written out in C++. Included by isa_*.cpp files.
#pragma once

#include "simd.h"

#if FFATTR_BF16_UNIT <= 2
#include <immintrin.h>
#endif

namespace ffattr::cpu::FFATTR_ISA {

// A block of a product: C [16 or 32, 32] += A [.., 32] @ B [32, 32]. A has its rows `a_stride` numbers apart; B has
// pairs of rows side by side, [16, 32, 2]: what either unit reads. FFATTR_BF16_UNIT says which one: 1 the matrix unit,
// 2 dot products, 3 the matrix unit's instructions in C++, 4 the dot products in C++.
using Bf16 = uint16_t;
constexpr int64_t kUnitRows = 16, kUnitColumns = 32, kUnitDepth = 32;

using Words = uint32_t __attribute__((vector_size(FFATTR_VECTOR_BYTES)));
using Halves = uint16_t __attribute__((vector_size(FFATTR_VECTOR_BYTES / 2), aligned(2), may_alias));

// What is brought into L2 while a block is multiplied, the numbers that come next: so many cache lines of 64 bytes for
// each step of kUnitDepth.
struct Ahead {
  const char* from;
  int64_t lines;
};

// Rounded to nearest, in the upper half of each word: NaN stays NaN.
inline Words rounded(Vector<float> x) {
  const Words bits = reinterpret_cast<Words>(x), even = bits + 0x7fff + (bits >> 16 & 1);
  return ((bits & 0x7fffffff) > 0x7f800000 ? bits : even) & 0xffff0000;
}

// What is left of x beside its rounded value; nothing where that is not finite.
inline Vector<float> remainder(Vector<float> x, Words high) {
  const Vector<float> value = reinterpret_cast<Vector<float>>(high);
  return (high & 0x7f800000) == 0x7f800000 ? Vector<float>{} : x - value;
}

#if FFATTR_BF16_UNIT <= 2

// Numbers rounded to one part. The instruction takes what is below the smallest normal number for zero, as the units
// do.
inline void store_high(Bf16* to, Vector<float> x) {
  *reinterpret_cast<Halves*>(to) = reinterpret_cast<Halves>(_mm512_cvtneps_pbh(x));
}

// The same, with what is left in a second part; nothing where the first is not finite.
inline void store_parts(Bf16* high, Bf16* low, Vector<float> x) {
  constexpr int not_finite = 0x99;  // quiet and signalling NaN, both infinities
  const Halves rounded = reinterpret_cast<Halves>(_mm512_cvtneps_pbh(x));
  *reinterpret_cast<Halves*>(high) = rounded;
  const auto value = reinterpret_cast<Vector<float>>(__builtin_convertvector(rounded, Words) << 16);
  const __mmask16 finite = static_cast<__mmask16>(~_mm512_fpclass_ps_mask(value, not_finite));
  store_high(low, _mm512_maskz_sub_ps(finite, x, value));
}

#else

inline void store_high(Bf16* to, Vector<float> x) {
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(rounded(x) >> 16, Halves);
}

inline void store_parts(Bf16* high, Bf16* low, Vector<float> x) {
  store_high(high, x);
  store_high(low, remainder(x, rounded(x)));
}

#endif

// Two rows of B, one word for each column.
inline void store_pairs(Bf16* to, Words even, Words odd) {
  *reinterpret_cast<typename VectorOf<uint32_t>::unaligned*>(to) = even >> 16 | odd;
}

#if FFATTR_BF16_UNIT == 1 || FFATTR_BF16_UNIT == 3

// Tiles 0 to 3 are C, two rows of two; 4 and 5 are A, 6 and 7 are B.
#if FFATTR_BF16_UNIT == 1

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Of this thread, from here to the end of a product: tiles in use would be saved whenever the thread is interrupted.
class Tiles {
 public:
  Tiles() {
    static constexpr TileShapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease"); }
};

template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
inline void load_tile(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(tile) : "memory");
}
template <int c, int a, int b>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

struct Tiles {};
inline thread_local uint32_t tile_words[8][16][16];  // what the unit has in its registers

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
template <int tile>
inline void zero_tile() {
  std::fill_n(&tile_words[tile][0][0], 256, 0);
}
template <int tile>
inline void load_tile(const void* from, int64_t bytes) {
  for (int row = 0; row < 16; ++row)
    __builtin_memcpy(tile_words[tile][row], static_cast<const char*>(from) + row * bytes, 64);
}
template <int tile>
inline void store_tile(void* to, int64_t bytes) {
  for (int row = 0; row < 16; ++row) __builtin_memcpy(static_cast<char*>(to) + row * bytes, tile_words[tile][row], 64);
}
template <int c, int a, int b>
inline void multiply_tiles() {
  for (int row = 0; row < 16; ++row)
    for (int pair = 0; pair < 16; ++pair) {
      const uint32_t left = tile_words[a][row][pair];
      for (int column = 0; column < 16; ++column) {
        const uint32_t right = tile_words[b][pair][column];
        float sum = float_of(tile_words[c][row][column]);
        sum += float_of(left << 16) * float_of(right << 16);
        sum += float_of(left & 0xffff0000) * float_of(right & 0xffff0000);
        __builtin_memcpy(&tile_words[c][row][column], &sum, sizeof sum);
      }
    }
}

#endif

template <bool both>
inline void multiply_loaded() {
  multiply_tiles<0, 4, 6>();
  multiply_tiles<1, 4, 7>();
  if constexpr (both) {
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
}

template <bool both>
inline void load_rows(const Bf16* a, int64_t a_stride) {
  load_tile<4>(a, a_stride * 2);
  if constexpr (both) load_tile<5>(a + kUnitRows * a_stride, a_stride * 2);
}

inline void load_columns(const Bf16* b) {
  load_tile<6>(b, kUnitColumns * 4);
  load_tile<7>(b + kUnitColumns, kUnitColumns * 4);
}

// `both`: 32 rows, else 16. With two parts of A and B, high before low, the sum of the three products that count.
template <bool both, int parts>
__attribute__((noinline)) void unit_block(int64_t depth, const Bf16* a, int64_t a_stride, int64_t a_part, const Bf16* b,
                                          int64_t b_part, float* c, int64_t width, bool accumulate, Ahead ahead) {
  const int64_t bytes = width * 4;
  float* below = c + kUnitRows * width;
  if (accumulate) {
    load_tile<0>(c, bytes);
    load_tile<1>(c + 16, bytes);
    if constexpr (both) load_tile<2>(below, bytes), load_tile<3>(below + 16, bytes);
  } else {
    zero_tile<0>(), zero_tile<1>();
    if constexpr (both) zero_tile<2>(), zero_tile<3>();
  }
  for (int64_t k = 0; k < depth; k += kUnitDepth, a += kUnitDepth, b += kUnitDepth * kUnitColumns) {
    load_columns(b);
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
    if constexpr (parts == 2) {
      load_rows<both>(a + a_part, a_stride);
      multiply_loaded<both>();
    }
    load_rows<both>(a, a_stride);
    multiply_loaded<both>();
    if constexpr (parts == 2) {
      load_columns(b + b_part);
      multiply_loaded<both>();
    }
  }
  store_tile<0>(c, bytes);
  store_tile<1>(c + 16, bytes);
  if constexpr (both) store_tile<2>(below, bytes), store_tile<3>(below + 16, bytes);
}

#else

struct Tiles {};
constexpr int kDotRows = 8;

#if FFATTR_BF16_UNIT == 2

using Pairs = __m512bh;
inline Vector<float> add_dots(Vector<float> sum, Words a, Words b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<Pairs>(a), reinterpret_cast<Pairs>(b));
}

#else

inline Vector<float> add_dots(Vector<float> sum, Words a, Words b) {
  const auto low = [](Words pairs) { return reinterpret_cast<Vector<float>>(pairs << 16); };
  const auto high = [](Words pairs) { return reinterpret_cast<Vector<float>>(pairs & 0xffff0000); };
  return sum + low(a) * low(b) + high(a) * high(b);
}

#endif

constexpr int kDotVectors = kUnitColumns / kLanes<float>;

template <int parts>
__attribute__((noinline)) void dot_rows(int64_t depth, const Bf16* a, int64_t a_stride, int64_t a_part, const Bf16* b,
                                        int64_t b_part, float* c, int64_t width, bool accumulate) {
  const auto pair_of = [](const Bf16* from) {
    uint32_t pair;
    __builtin_memcpy(&pair, from, sizeof pair);
    return pair - Words{};
  };
  const auto load_words = [](const Bf16* from) {
    return *reinterpret_cast<const typename VectorOf<uint32_t>::unaligned*>(from);
  };
  for (int v = 0; v < kDotVectors; v += 2) {
    Vector<float> sum[kDotRows][2] = {};
    for (int64_t k = 0; k < depth; k += 2) {
      const Bf16* row = b + k * kUnitColumns + v * 2 * kLanes<float>;
      const Words b0 = load_words(row), b1 = load_words(row + 2 * kLanes<float>);
#pragma GCC unroll 8
      for (int r = 0; r < kDotRows; ++r) {
        const Words x = pair_of(a + r * a_stride + k);
        sum[r][0] = add_dots(sum[r][0], x, b0), sum[r][1] = add_dots(sum[r][1], x, b1);
      }
      if constexpr (parts == 2) {
        const Bf16* low = row + b_part;
        const Words l0 = load_words(low), l1 = load_words(low + 2 * kLanes<float>);
#pragma GCC unroll 8
        for (int r = 0; r < kDotRows; ++r) {
          const Words x = pair_of(a + r * a_stride + k), y = pair_of(a + a_part + r * a_stride + k);
          sum[r][0] = add_dots(add_dots(sum[r][0], x, l0), y, b0);
          sum[r][1] = add_dots(add_dots(sum[r][1], x, l1), y, b1);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r)
      for (int i = 0; i < 2; ++i) {
        float* to = c + r * width + (v + i) * kLanes<float>;
        store(to, accumulate ? sum[r][i] + load(to) : sum[r][i]);
      }
  }
}

template <bool both, int parts>
inline void unit_block(int64_t depth, const Bf16* a, int64_t a_stride, int64_t a_part, const Bf16* b, int64_t b_part,
                       float* c, int64_t width, bool accumulate, Ahead) {
  for (int row = 0; row < (both ? 32 : 16); row += kDotRows)
    dot_rows<parts>(depth, a + row * a_stride, a_stride, a_part, b, b_part, c + row * width, width, accumulate);
}

#endif

}  // namespace ffattr::cpu::FFATTR_ISA

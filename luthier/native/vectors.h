// Sixteen floats at a time, for any instruction set: GCC and Clang split the vectors where the machine's are
// shorter. bfloat16 is kept as uint16_t. Also here: the packed forms of matrices that `product.h` reads.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

using bf16 = uint16_t;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class Vector> INLINE Vector load(const void* from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}
template <class Vector> INLINE void store(void* to, Vector x) { memcpy(to, &x, sizeof x); }

INLINE Floats all(float x) { return Floats{} + x; }
INLINE Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }
INLINE Floats wide(const bf16* from) { return widen(load<Halves>(from)); }
INLINE Floats wide(const float* from) { return load<Floats>(from); }

// round to nearest, ties to even; the results stand in the low halves
INLINE Words rounded(Floats x) {
  Words bits = (Words)x;
  Words up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Words quiet = (bits >> 16) | 0x40u;  // adding could make an infinity of a NaN
  return x == x ? up : quiet;
}
INLINE Halves narrow(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(rounded(x), Halves);
#endif
}
INLINE void put(bf16* to, Floats x) { store(to, narrow(x)); }
INLINE void put(float* to, Floats x) { store(to, x); }
INLINE float one(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
INLINE float one(float x) { return x; }

// the first `count` numbers of a vector, zeros behind them
INLINE Floats wide(const bf16* from, int64_t count) {
  Halves x = {};
  if (count >= 16) return wide(from);
  memcpy(&x, from, count * sizeof(bf16));
  return widen(x);
}
INLINE void put(bf16* to, Floats x, int64_t count) {
  if (count >= 16) return put(to, x);
  Halves y = narrow(x);
  memcpy(to, &y, count * sizeof(bf16));
}

// a in the low, b in the high halves
INLINE Words paired(Halves a, Halves b) {
  return __builtin_convertvector(a, Words) | (__builtin_convertvector(b, Words) << 16);
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

INLINE float sum(Floats x) {
  float out = 0;
  for (int i = 0; i < 16; i++) out += x[i];
  return out;
}

// 2^x for x <= 127, 2^-126 below x = -126; relative error 2e-7; NaN stays NaN, infinity becomes it
INLINE Floats exp2(Floats x) {
  x = x < -126.f ? all(-126.f) : x;
  Floats shifted = x + 12582912.f;  // 1.5 * 2^23: the nearest integer stands in the low bits
  Ints whole = (Ints)shifted - 0x4B400000;
  Floats f = x - (shifted - 12582912.f);
  Floats y = all(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.f;
  return (Floats)((Ints)y + (whole << 23));
}
INLINE Floats exp(Floats x) {
  x = x > 88.f ? all(88.f) : x;
  return exp2(x * 1.44269504f);
}

// ---- packing; all sizes are multiples of 32

// 32-bit elements [rows][columns] -> [columns][rows], `stride` apart
INLINE void transpose_tile(const uint32_t* from, int columns, uint32_t* to, int stride) {
  Words a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = load<Words>(from + i * columns);
#define STEP(x, y, distance, ...)                                   \
  for (int i = 0; i < 16; i++)                                      \
    if (!(i & distance)) {                                          \
      y[i] = __builtin_shufflevector(x[i], x[i | distance], __VA_ARGS__); \
      y[i | distance] = __builtin_shufflevector(x[i], x[i | distance], SECOND); \
    }
#define SECOND 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
  STEP(a, b, 1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#undef SECOND
#define SECOND 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
  STEP(b, a, 2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#undef SECOND
#define SECOND 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
  STEP(a, b, 4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#undef SECOND
#define SECOND 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
  STEP(b, a, 8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#undef SECOND
#undef STEP
  for (int i = 0; i < 16; i++) store(to + int64_t(i) * stride, a[i]);
}
static void transpose(const void* from, int rows, int columns, void* to) {
  for (int r = 0; r < rows; r += 16)
    for (int c = 0; c < columns; c += 16)
      transpose_tile((const uint32_t*)from + r * columns + c, columns,
                     (uint32_t*)to + int64_t(c) * rows + r, rows);
}

// [rows][columns] -> [rows / 2][columns] of pairs
static void interleave(const bf16* from, int rows, int columns, bf16* to) {
  for (int r = 0; r < rows; r += 2)
    for (int c = 0; c < columns; c += 16) {
      const bf16* at = from + r * columns + c;
      store(to + r * columns + 2 * c, paired(load<Halves>(at), load<Halves>(at + columns)));
    }
}

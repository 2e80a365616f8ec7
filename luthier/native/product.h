// C [M, N] (float32) = or += A [M, K] B, bfloat16 factors. A lies in rows of K; B in pairs of rows,
// [K / 2][N][2], as the instructions that multiply pairs want it. M, N and K are multiples of 32.
#pragma once
#include "vectors.h"
template <int ROWS, int VECTORS>
INLINE void corner(int N, int K, const bf16* A, const bf16* B, float* C, bool add) {
  Floats sum[ROWS][VECTORS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECTORS; j++)
      sum[i][j] = add ? load<Floats>(C + int64_t(i) * N + 16 * j) : Floats{};
  for (int k = 0; k < K; k += 2) {
    Words b[VECTORS];
    for (int j = 0; j < VECTORS; j++) b[j] = load<Words>(B + int64_t(k) * N + 32 * j);
    for (int i = 0; i < ROWS; i++) {
      uint32_t pair;
      memcpy(&pair, A + int64_t(i) * K + k, 4);
#if defined(__AVX512BF16__)
      __m512bh a = (__m512bh)_mm512_set1_epi32(int(pair));
      for (int j = 0; j < VECTORS; j++)
        sum[i][j] = (Floats)_mm512_dpbf16_ps((__m512)sum[i][j], a, (__m512bh)b[j]);
#else
      Floats low = all(one(bf16(pair))), high = all(one(bf16(pair >> 16)));
      for (int j = 0; j < VECTORS; j++) {
        sum[i][j] += low * (Floats)(b[j] << 16);
        sum[i][j] += high * (Floats)(b[j] & 0xffff0000u);
      }
#endif
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECTORS; j++) store(C + int64_t(i) * N + 16 * j, sum[i][j]);
}

static void product(int M, int N, int K, const bf16* A, const bf16* B, float* C, bool add) {
#if defined(__AVX512F__)
  constexpr int ROWS = 8, VECTORS = 2;
#else
  constexpr int ROWS = 4, VECTORS = 1;  // sixteen registers
#endif
  for (int n = 0; n < N; n += 16 * VECTORS)
    for (int m = 0; m < M; m += ROWS)
      corner<ROWS, VECTORS>(N, K, A + int64_t(m) * K, B + 2 * n, C + int64_t(m) * N + n, add);
}

// 4-bit codes of a weight into bfloat16: level x scale in float32, rounded once.
#include <algorithm>

#include "vectors.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

// not `narrow`: the instruction takes the smallest numbers for zero, torch does not
INLINE Halves nearest(Floats x) { return __builtin_convertvector(rounded(x), Halves); }

// two codes a byte, the first in the high half; `table` has the 16 numbers that they stand for
INLINE void decode(const uint8_t* codes, int64_t count, const bf16* table, bf16* out) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const __m256i once = _mm256_loadu_si256((const __m256i*)table);
  const __m512i twice = _mm512_broadcast_i64x4(once);
  for (; i + 32 <= count; i += 32) {
    Words byte = __builtin_convertvector(load<Bytes>(codes + i / 2), Words);
    Words two = (byte >> 4) | ((byte & 15u) << 16);
    store(out + i, (Words)_mm512_permutexvar_epi16((__m512i)two, twice));
  }
#endif
  for (; i + 2 <= count; i += 2) {
    out[i] = table[codes[i / 2] >> 4];
    out[i + 1] = table[codes[i / 2] & 15];
  }
  if (i < count) out[i] = table[codes[i / 2] >> 4];
}

}  // namespace

// out [rows, width], contiguous; rows of codes and scales may be parts of wider ones. A row has blocks of `block`
// numbers, which is even; the last may be short. `levels` are the 16 that the codes stand for.
extern "C" void luthier_dequantize(const uint8_t* codes, const float* scales, const float* levels, int64_t rows,
                                   int64_t width, int64_t block, int64_t codes_row, int64_t scales_row, bf16* out,
                                   int threads) {
  const int64_t blocks = (width + block - 1) / block, all = rows * blocks, step = std::max<int64_t>(1, 32768 / block);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < all; first += step) {
    int64_t row = first / blocks, at = first % blocks;
    for (int64_t n = first; n < std::min(first + step, all); n++) {
      const int64_t start = at * block, count = std::min(block, width - start);
      const float scale = scales[row * scales_row + at];
      bf16 table[16];
      store(table, nearest(wide(levels) * scale));
      decode(codes + row * codes_row + start / 2, count, table, out + row * width + start);
      if (++at == blocks) at = 0, row++;
    }
  }
}

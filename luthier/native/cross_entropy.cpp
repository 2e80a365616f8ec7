// Losses of rows of bfloat16 logits and their gradient, softmax - onehot, a row at a time: it stays in the cache.
#include <cmath>

#include "vectors.h"

extern "C" void luthier_cross_entropy(const bf16* logits, int64_t stride, const int64_t* labels, int64_t rows,
                                      int64_t vocabulary, float* losses, bf16* gradient, int64_t gradient_stride,
                                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    const bf16* row = logits + r * stride;
    const int64_t whole = vocabulary / 16 * 16;
    Floats top = all(-3e38f), total = {};
    for (int64_t c = 0; c < whole; c += 16) top = larger(top, wide(row + c));
    float most = -3e38f;
    for (int i = 0; i < 16; i++) most = top[i] > most ? top[i] : most;
    for (int64_t c = whole; c < vocabulary; c++) most = one(row[c]) > most ? one(row[c]) : most;
    for (int64_t c = 0; c < whole; c += 16) total += exp(wide(row + c) - most);
    float sum_exp = sum(total);
    for (int64_t c = whole; c < vocabulary; c++) sum_exp += std::exp(one(row[c]) - most);
    losses[r] = std::log(sum_exp) + most - one(row[labels[r]]);
    if (!gradient) continue;
    bf16* to = gradient + r * gradient_stride;
    const float scale = 1.f / sum_exp;
    for (int64_t c = 0; c < whole; c += 16) put(to + c, exp(wide(row + c) - most) * scale);
    for (int64_t c = whole; c < vocabulary; c++) to[c] = narrow(all(std::exp(one(row[c]) - most) * scale))[0];
    float at_label = std::exp(one(row[labels[r]]) - most) * scale - 1.f;
    to[labels[r]] = narrow(all(at_label))[0];
  }
}

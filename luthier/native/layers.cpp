// What stands between the matrix products of a decoder layer, one read and one write each: SwiGLU and RMSNorm.
// bfloat16 in and out, float32 between; sums over tokens are added in an order that no number of threads changes.
#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

INLINE Floats logistic(Floats x) { return 1.f / (1.f + exp(-x)); }

struct Norm {
  const bf16* weight;
  int64_t width;
  float eps, offset;  // the weight counts as offset + weight
  bool rounded;       // the normalised x is rounded before the weight multiplies it

  Floats factor(int64_t c) const { return wide(weight + c, width - c) + offset; }
};

}  // namespace

// out = silu(gate) up; rows may be parts of wider ones
extern "C" void luthier_swiglu(const bf16* gate, const bf16* up, int64_t rows, int64_t width, int64_t gate_row,
                               int64_t up_row, bf16* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < rows; n++)
    for (int64_t c = 0; c < width; c += 16) {
      const int64_t left = width - c;
      Floats g = wide(gate + n * gate_row + c, left), u = wide(up + n * up_row + c, left);
      put(out + n * width + c, g * logistic(g) * u, left);
    }
}

extern "C" void luthier_swiglu_backward(const bf16* grad, const bf16* gate, const bf16* up, int64_t rows,
                                        int64_t width, int64_t gate_row, int64_t up_row, bf16* gate_grad,
                                        bf16* up_grad, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < rows; n++)
    for (int64_t c = 0; c < width; c += 16) {
      const int64_t left = width - c, at = n * width + c;
      Floats d = wide(grad + at, left), g = wide(gate + n * gate_row + c, left);
      Floats u = wide(up + n * up_row + c, left), s = logistic(g), silu = g * s;
      put(up_grad + at, d * silu, left);
      put(gate_grad + at, d * u * (s + silu * (1.f - s)), left);
    }
}

// out = (offset + weight) x / sqrt(mean(x^2) + eps); inverse [rows] is kept for the backward
extern "C" void luthier_rms_norm(const bf16* x, const bf16* weight, int64_t rows, int64_t width, float eps,
                                 float offset, int rounded, bf16* out, float* inverse, int threads) {
  const Norm norm{weight, width, eps, offset, rounded != 0};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < rows; n++) {
    const bf16* row = x + n * width;
    Floats squares = {};
    for (int64_t c = 0; c < width; c += 16) {
      Floats a = wide(row + c, width - c);
      squares += a * a;
    }
    const float scale = 1.f / std::sqrt(sum(squares) / float(width) + eps);
    inverse[n] = scale;
    for (int64_t c = 0; c < width; c += 16) {
      Floats a = wide(row + c, width - c) * scale;
      if (norm.rounded) a = widen(narrow(a));
      put(out + n * width + c, a * norm.factor(c), width - c);
    }
  }
}

// x_grad [rows, width]; weight_grad [width] (float32), where wanted, through scratch [ceil(rows / 64), width to 16]
extern "C" void luthier_rms_norm_backward(const bf16* grad, const bf16* x, const bf16* weight, const float* inverse,
                                          int64_t rows, int64_t width, float offset, bf16* x_grad,
                                          float* weight_grad, float* scratch, int threads) {
  const Norm norm{weight, width, 0, offset, false};
  const int64_t block = 64, blocks = (rows + block - 1) / block, padded = (width + 15) / 16 * 16;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; b++) {
    float* sums = scratch + b * padded;
    if (weight_grad) memset(sums, 0, padded * sizeof(float));
    for (int64_t n = b * block; n < std::min(rows, (b + 1) * block); n++) {
      const bf16 *row = x + n * width, *from = grad + n * width;
      Floats dots = {};
      for (int64_t c = 0; c < width; c += 16) {
        const int64_t left = width - c;
        dots += wide(from + c, left) * norm.factor(c) * wide(row + c, left);
      }
      const float scale = inverse[n], pull = scale * scale * scale * sum(dots) / float(width);
      for (int64_t c = 0; c < width; c += 16) {
        const int64_t left = width - c;
        Floats d = wide(from + c, left), a = wide(row + c, left);
        put(x_grad + n * width + c, d * norm.factor(c) * scale - a * pull, left);
        if (weight_grad) store(sums + c, load<Floats>(sums + c) + d * a * scale);
      }
    }
  }
  if (!weight_grad) return;
  for (int64_t c = 0; c < width; c += 16) {
    Floats total = {};
    for (int64_t b = 0; b < blocks; b++) total += load<Floats>(scratch + b * padded + c);
    memcpy(weight_grad + c, &total, std::min<int64_t>(16, width - c) * sizeof(float));
  }
}

// AdamW on a piece of a rank's shard, and the squared norm that clipping needs.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/matrix.h"

namespace uly::kernels {

inline constexpr int64_t kNormBlocks = 1024;  // x is cut into so many blocks, whatever its size
inline constexpr int64_t kNormScratchBytes = kNormBlocks * 8;

// total += sum of squares, fp64. x contiguous.
struct SquaredNormArgs {
  double* total = nullptr;
  Matrix x;                 // kF32 or kBf16
  void* scratch = nullptr;  // kNormScratchBytes, on CPU too
};

// An fp32 number as the nearest bf16 and what is missing: bits = (weight << 16) + low. Halfway goes away from zero, so
// low is in [-32768, 32767]. Rounding to nearest even would need 65,537 values: halfway that went down leaves +32768,
// halfway that went up -32768. Exact for all but NaN, which becomes another NaN; of numbers that are not halfway the
// weight is what to_bf16 gives.
struct SplitFloat {
  uint16_t weight;
  int16_t low;
};

ULY_HOST_DEVICE SplitFloat split(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u), 0};
  return {static_cast<uint16_t>((bits + 0x8000u) >> 16), static_cast<int16_t>(static_cast<uint16_t>(bits))};
}

ULY_HOST_DEVICE float join(uint16_t weight, int16_t low) {
  return std::bit_cast<float>((static_cast<uint32_t>(weight) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}

// Clips by min(1, clip / (sqrt(*squared_norm) + 1e-6)), or not at all where squared_norm is null or clip <= 0; updates
// master and moments, and writes the weight (rounded to nearest even; it may be master). Where *squared_norm or *loss is not
// finite, nothing changes. Bits are the same on CPU and GPU.
struct AdamwArgs {
  void* weight = nullptr;
  Dtype weight_dtype = Dtype::kF32;  // kF32 or kBf16
  float* master = nullptr;
  int16_t* low = nullptr;  // instead of master, of a kBf16 weight: the master is join(weight, low)
  float* m = nullptr;
  float* v = nullptr;
  const float* gradient = nullptr;
  int64_t count = 0;
  const double* squared_norm = nullptr;
  const double* loss = nullptr;  // may be null
  double clip = 0;
  double learning_rate = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
  int64_t step = 1;  // 1 at the first update
};

void squared_norm(const SquaredNormArgs& a, Stream stream);
void adamw(const AdamwArgs& a, Stream stream);

namespace cpu {

void squared_norm_blocks(const SquaredNormArgs& a, int64_t begin, int64_t end);  // blocks: of kNormBlocks
void squared_norm_total(const SquaredNormArgs& a);                               // after all blocks
void adamw(const AdamwArgs& a, int64_t begin, int64_t end);                      // elements

}  // namespace cpu

// The update's constants, each rounded to fp32 once.
struct AdamwConstants {
  float beta1, beta2, rest1, rest2;  // rest = 1 - beta
  float decay;                       // -lr wd
  float step_size;                   // -lr / (1 - beta1^t)
  float root_correction2;            // sqrt(1 - beta2^t)
  float eps;
};

inline AdamwConstants adamw_constants(const AdamwArgs& a) {
  const double t = static_cast<double>(a.step);
  return {.beta1 = static_cast<float>(a.beta1),
          .beta2 = static_cast<float>(a.beta2),
          .rest1 = static_cast<float>(1 - a.beta1),
          .rest2 = static_cast<float>(1 - a.beta2),
          .decay = static_cast<float>(-a.learning_rate * a.weight_decay),
          .step_size = static_cast<float>(-a.learning_rate / (1 - std::pow(a.beta1, t))),
          .root_correction2 = static_cast<float>(std::sqrt(1 - std::pow(a.beta2, t))),
          .eps = static_cast<float>(a.eps)};
}

// Operations that round once and that no compiler may fuse or split.
#if defined(__CUDA_ARCH__)
ULY_HOST_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ULY_HOST_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
ULY_HOST_DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
ULY_HOST_DEVICE float over(float a, float b) { return __fdiv_rn(a, b); }
ULY_HOST_DEVICE float root(float a) { return __fsqrt_rn(a); }
#else
ULY_HOST_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
ULY_HOST_DEVICE float times(float a, float b) { return a * b; }
ULY_HOST_DEVICE float plus(float a, float b) { return a + b; }
ULY_HOST_DEVICE float over(float a, float b) { return a / b; }
ULY_HOST_DEVICE float root(float a) { return __builtin_sqrtf(a); }
#endif

ULY_HOST_DEVICE bool finite(const double* x) {
  constexpr uint64_t kExponent = uint64_t{0x7ff} << 52;
  return x == nullptr || (std::bit_cast<uint64_t>(*x) & kExponent) != kExponent;
}

ULY_HOST_DEVICE float clip_coefficient(const double* squared_norm, double clip) {
  if (squared_norm == nullptr || clip <= 0) return 1.0f;
#if defined(__CUDA_ARCH__)
  const double c = __ddiv_rn(clip, __dadd_rn(__dsqrt_rn(*squared_norm), 1e-6));
#else
  const double c = clip / (__builtin_sqrt(*squared_norm) + 1e-6);
#endif
  return c < 1.0 ? static_cast<float>(c) : 1.0f;
}

// One element: moments and master change, the new master is returned. No product here is added to anything except
// through fused(), so contraction cannot change a bit.
ULY_HOST_DEVICE float adamw_element(const AdamwConstants& k, float coefficient, float gradient, float& m, float& v, float master) {
  const float g = times(gradient, coefficient);
  m = fused(k.beta1, m, times(k.rest1, g));
  v = fused(k.beta2, v, times(k.rest2, times(g, g)));
  const float denominator = plus(over(root(v), k.root_correction2), k.eps);
  return fused(k.step_size, over(m, denominator), fused(k.decay, master, master));
}

}  // namespace uly::kernels

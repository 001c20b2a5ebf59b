// bf16 as two bytes, with the one rounding that all kernels share: to nearest even, a NaN stays a NaN.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define ULY_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ULY_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace uly::kernels {

struct Bf16 {
  uint16_t bits;
};

ULY_HOST_DEVICE float to_float(float x) { return x; }
ULY_HOST_DEVICE float to_float(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

ULY_HOST_DEVICE Bf16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return Bf16{static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

// Rounds to T.
template <typename T>
ULY_HOST_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 2)
    return to_bf16(x);
  else
    return x;
}

}  // namespace uly::kernels

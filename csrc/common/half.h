// bfloat16 and float16 to and from float32, rounding to nearest even. In integer arithmetic and without a branch, so
// that a loop over them vectorizes for every instruction set, also those without conversion instructions.

#pragma once

#include "philox.h"  // GBCI_INLINE, float_bits

namespace gbci {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

GBCI_INLINE float widen(float x) {
  return x;
}

GBCI_INLINE float widen(BFloat16 x) {
  return float_from_bits(static_cast<uint32_t>(x.bits) << 16);
}

GBCI_INLINE float widen(Float16 x) {
  const uint32_t shifted = (x.bits & 0x7FFFu) << 13, exponent = shifted & 0x0F800000u;
  // Rebias the exponent; infinities and NaNs a second time; a subnormal by subtracting the 2^-14 that was added to it.
  const uint32_t normal = shifted + ((127u - 15u) << 23) + (exponent == 0x0F800000u ? (128u - 16u) << 23 : 0u);
  const float subnormal = float_from_bits(shifted + (113u << 23)) - float_from_bits(113u << 23);
  const uint32_t magnitude = exponent == 0 ? float_bits(subnormal) : normal;
  return float_from_bits(magnitude | (x.bits & 0x8000u) << 16);
}

template <class Narrow>
Narrow narrow(float x);

template <>
GBCI_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

template <>
GBCI_INLINE Float16 narrow<Float16>(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-14: adding 1/2 lets the adder round to the last place of a subnormal, 2^-24.
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude + (static_cast<uint32_t>(15 - 127) << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  uint32_t result = magnitude < 113u << 23 ? subnormal : normal;
  result = magnitude >= (127u + 16u) << 23 ? 0x7C00u : result;  // 2^16 and more; 65520 and more round up to it above
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return {static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))};
}

}  // namespace gbci

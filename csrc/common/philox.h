// Philox4x32-10 and Box-Muller, as gbci_fast/model/noise.py defines them, for the CPU and for CUDA.
//
// All functions are branch-free, so that a CPU loop over them vectorizes. They use only operations that IEEE 754 rounds
// correctly: without contraction (-ffp-contract=off, -fmad=false) every CPU and every GPU draws the same bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace gbci {

struct Words4 {
  uint32_t x0, x1, x2, x3;
};

struct Normals4 {
  float n0, n1, n2, n3;
};

GBCI_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

GBCI_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
GBCI_INLINE Words4 philox4x32(Words4 c, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c.x0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c.x2) * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.x1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.x3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// -2 log(k 2^-24), k from 1 to 2^24. k 2^-24 = 2^e m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh(s) with
// s = (m - 1) / (m + 1): a minimax polynomial in s^2. One float for log 2 is enough in the product e log 2, because
// float(log 2) is right to 2^-28, and the sum is at least half as large as e log 2, so nothing cancels.
GBCI_INLINE float minus_two_log(int32_t k) {
  const uint32_t sqrt_half = 0x3F3504F3u, exponent = float_bits(static_cast<float>(k)) - sqrt_half - (24u << 23);
  const float e = static_cast<float>(static_cast<int32_t>(exponent) >> 23);
  const float m = float_from_bits((exponent & 0x7FFFFFu) + sqrt_half);
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  return e * -1.38629436f + s * (-4.0f + z * (-1.33333552f + z * (-0.799551487f + z * -0.597424746f)));
}

// cos and sin of 2 pi u, where u is the upper 24 bits of y as a fraction. The rest of u beyond its nearest quarter turn
// is exact. On the range of the rest, [-pi/4, pi/4], cos and sin are minimax polynomials.
GBCI_INLINE void cos_sin_turn(uint32_t y, float* cosine, float* sine) {
  const uint32_t quarter = y + 0x20000000u;  // in the two upper bits, rounded
  const float x = static_cast<float>(static_cast<int32_t>((y >> 8) << 10)) * 3.65729530e-10f;  // pi/2 2^-32
  const float z = x * x;
  const float s = x + x * (z * (-0.166666552f + z * (0.00833218917f + z * -1.95182889e-4f)));
  const float c = 1.0f + z * (-0.5f + z * (0.0416666456f + z * (-0.00138873106f + z * 2.44325656e-5f)));
  const bool odd = quarter & 0x40000000u;
  *cosine = float_from_bits(float_bits(odd ? s : c) ^ ((quarter + 0x40000000u) & 0x80000000u));
  *sine = float_from_bits(float_bits(odd ? c : s) ^ (quarter & 0x80000000u));
}

// Two uniform words -> two independent standard normals.
GBCI_INLINE void box_muller(uint32_t x, uint32_t y, float* first, float* second) {
  const float radius = std::sqrt(minus_two_log(static_cast<int32_t>(x >> 8) + 1));
  float cosine, sine;
  cos_sin_turn(y, &cosine, &sine);
  *first = radius * cosine;
  *second = radius * sine;
}

// Elements 4 block .. 4 block + 3 of the sample of `seed`.
GBCI_INLINE Normals4 philox_normal4(uint64_t seed, uint32_t block, uint32_t step, uint32_t stream) {
  const Words4 words = philox4x32({block, step, stream, 0}, seed);
  Normals4 normals;
  box_muller(words.x0, words.x1, &normals.n0, &normals.n1);
  box_muller(words.x2, words.x3, &normals.n2, &normals.n3);
  return normals;
}

}  // namespace gbci

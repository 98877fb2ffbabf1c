// Philox4x32-10 and Box-Muller, as gbci_fast/noise.py defines them, for the CPU and for CUDA.
//
// Everything is branch-free, so that a CPU loop over it vectorizes, and uses only operations that IEEE 754 rounds
// correctly: without contraction (-ffp-contract=off, -fmad=false) a CPU and a GPU draw the same bits.

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

// log of a positive normal x: x = 2^e m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh(s), s = (m - 1) / (m + 1).
// |s| < 0.172, so the series' first omitted term is below 2e-9 of the sum.
GBCI_INLINE float log_positive(float x) {
  const uint32_t sqrt_half = 0x3F3504F3u;
  const int32_t e = static_cast<int32_t>(float_bits(x) - sqrt_half) >> 23;
  const float m = float_from_bits(float_bits(x) - (static_cast<uint32_t>(e) << 23));
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const float tail = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9))));
  // log 2 in two parts: the first has trailing zeros, so that its product with e is exact.
  const float high = 0.693145752f, low = 1.42860677e-06f;
  return static_cast<float>(e) * high + (2.0f * s + (s * tail + static_cast<float>(e) * low));
}

// cos and sin of 2 pi u, u in [0, 1) a multiple of 2^-24: the turn minus its nearest quarter is exact, and on the
// remaining [-pi/4, pi/4] the Taylor series' first omitted terms are below 3e-9.
GBCI_INLINE void cos_sin_turn(float u, float* cosine, float* sine) {
  const int32_t quarter = static_cast<int32_t>(u * 4.0f + 0.5f);
  const float x = 6.28318531f * (u - static_cast<float>(quarter) * 0.25f), z = x * x;
  const float s = x + x * z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880))));
  const float c =
      1.0f + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 + z * (-1.0f / 3628800)))));
  const bool odd = quarter & 1;
  *cosine = float_from_bits(float_bits(odd ? s : c) ^ (static_cast<uint32_t>((quarter + 1) & 2) << 30));
  *sine = float_from_bits(float_bits(odd ? c : s) ^ (static_cast<uint32_t>(quarter & 2) << 30));
}

// Two uniform words -> two independent standard normals.
GBCI_INLINE void box_muller(uint32_t x, uint32_t y, float* first, float* second) {
  const float unit = 1.0f / (1 << 24);
  // Through int32: a signed conversion is one instruction on every CPU, and 24 bits fit.
  const float radius = std::sqrt(-2.0f * log_positive(static_cast<float>(static_cast<int32_t>(x >> 8) + 1) * unit));
  float cosine, sine;
  cos_sin_turn(static_cast<float>(static_cast<int32_t>(y >> 8)) * unit, &cosine, &sine);
  *first = radius * cosine;
  *second = radius * sine;
}

// Elements 4 block .. 4 block + 3 of the sample that `seed` draws.
GBCI_INLINE Normals4 philox_normal4(uint64_t seed, uint32_t block, uint32_t step, uint32_t stream) {
  const Words4 words = philox4x32({block, step, stream, 0}, seed);
  Normals4 normals;
  box_muller(words.x0, words.x1, &normals.n0, &normals.n1);
  box_muller(words.x2, words.x3, &normals.n2, &normals.n3);
  return normals;
}

}  // namespace gbci

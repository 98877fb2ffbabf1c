#include "philox_draw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#include "philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gbci {

constexpr uint32_t kGroupBlocks = 32;

}  // namespace gbci

#if defined(__x86_64__)

#define GBCI_CLONE avx512f
#define GBCI_TARGET __attribute__((target("avx512f")))
#define GBCI_VECTOR_BYTES 64
// The form with a mask: the plain one draws a warning about GCC 12's own header.
#define GBCI_MULTIPLY_LOW(a, b) (Lanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)(a), (__m512i)(b))
#include "philox_draw_clone.h"

#define GBCI_CLONE avx2
#define GBCI_TARGET __attribute__((target("avx2")))
#define GBCI_VECTOR_BYTES 32
#define GBCI_MULTIPLY_LOW(a, b) (Lanes)_mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#include "philox_draw_clone.h"

#define GBCI_CLONE baseline
#define GBCI_TARGET
#define GBCI_VECTOR_BYTES 16
#define GBCI_MULTIPLY_LOW(a, b) (Lanes)_mm_mul_epu32((__m128i)(a), (__m128i)(b))
#include "philox_draw_clone.h"

#else

#define GBCI_CLONE baseline
#define GBCI_TARGET
#define GBCI_VECTOR_BYTES 16
#define GBCI_MULTIPLY_LOW(a, b) (((a) & lower) * ((b) & lower))
#include "philox_draw_clone.h"

#endif

namespace gbci {

namespace {

using DrawGroups = decltype(&baseline::draw_groups);

// Chosen here and not by the loader (target_clones), so that it works with every compiler and C library, and under the
// sanitizers; the tests call the clones by name.
DrawGroups widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) {
    return avx512f::draw_groups;
  }
  if (__builtin_cpu_supports("avx2")) {
    return avx2::draw_groups;
  }
#endif
  return baseline::draw_groups;
}

const DrawGroups draw_groups = widest();

}  // namespace

void draw_normals(
    uint64_t seed, uint32_t first_block, uint32_t num_blocks, uint32_t step, uint32_t stream, float* normals) {
  const uint32_t groups = num_blocks / kGroupBlocks, rest = num_blocks % kGroupBlocks;
  draw_groups(seed, first_block, groups, step, stream, normals);
  if (rest > 0) {
    float group[4 * kGroupBlocks];
    draw_groups(seed, first_block + groups * kGroupBlocks, 1, step, stream, group);
    std::copy_n(group, 4 * rest, normals + 4 * groups * kGroupBlocks);
  }
}

void draw_normals(
    uint64_t seed, uint32_t first_block, uint32_t num_blocks, uint32_t step, uint32_t stream, double* normals) {
  constexpr double kUnit = 1.0 / (1 << 24);
  for (uint32_t i = 0; i < num_blocks; ++i) {
    const Words4 words = philox4x32({first_block + i, step, stream, 0}, seed);
    const uint32_t pairs[2][2] = {{words.x0, words.x1}, {words.x2, words.x3}};
    for (int pair = 0; pair < 2; ++pair, normals += 2) {
      const double radius = std::sqrt(-2.0 * std::log((pairs[pair][0] >> 8) * kUnit + kUnit));
      const double angle = 2.0 * std::numbers::pi * ((pairs[pair][1] >> 8) * kUnit);
      normals[0] = radius * std::cos(angle);
      normals[1] = radius * std::sin(angle);
    }
  }
}

}  // namespace gbci

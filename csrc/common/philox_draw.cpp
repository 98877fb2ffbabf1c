#include "philox_draw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#include "philox.h"

namespace gbci {

constexpr uint32_t kGroupBlocks = 32;

}  // namespace gbci

#define GBCI_CLONE_FILE "common/philox_draw_clone.h"
#include "for_each_instruction_set.h"

namespace gbci {

namespace {

const auto draw_groups = GBCI_WIDEST(draw_groups);

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

// draw_groups for one instruction set.
//
// Left alone, compilers multiply whole 64-bit lanes, which is three times the work. They vectorize the rest well.

namespace gbci::GBCI_CLONE {

// The words of Philox in 64-bit lanes, whose upper halves are never read: the halves of a product are then the product
// and its shift. Several vectors at once, because a single one would wait for its own multiplications.
using Words64 = Lanes<uint64_t>;
constexpr uint32_t kWords = kLanes<uint64_t>, kInFlight = 4;

// The words x0, x2 of kGroupBlocks blocks into `radii`, x1, x3 into `angles`.
inline void philox_words(
    uint64_t seed, uint32_t first_block, uint32_t step, uint32_t stream, uint32_t* radii, uint32_t* angles) {
  const Words64 zero{}, lower = zero + 0xFFFFFFFFu, multiplier0 = zero + 0xD2511F53u, multiplier1 = zero + 0xCD9E8D57u;
  Words64 lane{};
  for (uint32_t i = 0; i < kWords; ++i) {
    lane[i] = i;
  }
  for (uint32_t block = 0; block < kGroupBlocks; block += kInFlight * kWords) {
    Words64 c0[kInFlight], c1[kInFlight], c2[kInFlight], c3[kInFlight];
    for (uint32_t v = 0; v < kInFlight; ++v) {
      c0[v] = lane + (first_block + block + v * kWords);
      c1[v] = zero + step;
      c2[v] = zero + stream;
      c3[v] = zero;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (uint32_t v = 0; v < kInFlight; ++v) {
        const Words64 p0 = multiply_low(c0[v], multiplier0), p1 = multiply_low(c2[v], multiplier1);
        c0[v] = (p1 >> 32) ^ c1[v] ^ (zero + k0);
        c1[v] = p1;
        c2[v] = (p0 >> 32) ^ c3[v] ^ (zero + k1);
        c3[v] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (uint32_t v = 0; v < kInFlight; ++v) {
      const Words64 x02 = (c0[v] & lower) | (c2[v] << 32), x13 = (c1[v] & lower) | (c3[v] << 32);
      std::memcpy(radii + 2 * (block + v * kWords), &x02, sizeof x02);
      std::memcpy(angles + 2 * (block + v * kWords), &x13, sizeof x13);
    }
  }
}

void draw_groups(
    uint64_t seed, uint32_t first_block, uint32_t num_groups, uint32_t step, uint32_t stream, float* normals) {
  alignas(64) uint32_t radii[2 * kGroupBlocks], angles[2 * kGroupBlocks];
  for (uint32_t group = 0; group < num_groups; ++group, normals += 4 * kGroupBlocks) {
    philox_words(seed, first_block + group * kGroupBlocks, step, stream, radii, angles);
    for (uint32_t i = 0; i < 2 * kGroupBlocks; ++i) {
      box_muller(radii[i], angles[i], normals + 2 * i, normals + 2 * i + 1);
    }
  }
}

}  // namespace gbci::GBCI_CLONE

// The loops of conv3x3 for one instruction set.

namespace gbci::GBCI_CLONE {

constexpr int64_t L = kLanes<float>;
// Accumulators for kChannels output channels times kVectors vectors of tiles; with the factors they fill the registers.
constexpr int kChannels = GBCI_VECTOR_BYTES == 64 ? 8 : 4, kVectors = 3;
static_assert(kTiles % (kVectors * L) == 0 && kChannelBlock % kChannels == 0);

// Bᵀ d B of `count` tiles in a row (and of some after them) from four rows of pixels, kRow apart.
void transform_input(const float* rows, int64_t count, float* tiles, int64_t stride) {
  constexpr std::make_integer_sequence<uint32_t, L> kLane;
  for (int64_t j = 0; j < count; j += L) {
    Lanes<float> t[4][4];
    for (int r = 0; r < 4; ++r) {
      const float* row = rows + r * kRow + 2 * j;
      const Lanes<float> a = widen(row), b = widen(row + L), next_a = widen(row + 2), next_b = widen(row + L + 2);
      const Lanes<float> d0 = every_other<0>(a, b, kLane), d1 = every_other<1>(a, b, kLane);
      const Lanes<float> d2 = every_other<0>(next_a, next_b, kLane), d3 = every_other<1>(next_a, next_b, kLane);
      t[r][0] = d0 - d2, t[r][1] = d1 + d2, t[r][2] = d2 - d1, t[r][3] = d1 - d3;
    }
    for (int q = 0; q < 4; ++q) {
      narrow(t[0][q] - t[2][q], tiles + q * stride + j);
      narrow(t[1][q] + t[2][q], tiles + (4 + q) * stride + j);
      narrow(t[2][q] - t[1][q], tiles + (8 + q) * stride + j);
      narrow(t[1][q] - t[3][q], tiles + (12 + q) * stride + j);
    }
  }
}

// Aᵀ m A + bias of `count` tiles in a row (and of some after them), as two rows of pixels, kRow apart.
void transform_output(const float* tiles, int64_t stride, float bias, int64_t count, float* rows) {
  constexpr std::make_integer_sequence<uint32_t, L> kLane;
  for (int64_t j = 0; j < count; j += L) {
    Lanes<float> t[2][4];
    for (int q = 0; q < 4; ++q) {
      const Lanes<float> m0 = widen(tiles + q * stride + j), m1 = widen(tiles + (4 + q) * stride + j);
      const Lanes<float> m2 = widen(tiles + (8 + q) * stride + j), m3 = widen(tiles + (12 + q) * stride + j);
      t[0][q] = m0 + m1 + m2, t[1][q] = m1 - m2 - m3;
    }
    for (int r = 0; r < 2; ++r) {
      const Lanes<float> y0 = t[r][0] + t[r][1] + t[r][2] + bias, y1 = t[r][1] - t[r][2] - t[r][3] + bias;
      narrow(in_turn<false>(y0, y1, kLane), rows + r * kRow + 2 * j);
      narrow(in_turn<true>(y0, y1, kLane), rows + r * kRow + 2 * j + L);
    }
  }
}

// products [kChannelBlock, kStride] = weight [channels, kChannelBlock]ᵀ input [channels, kStride], for kTiles tiles.
void multiply_tiles(const float* weight, const float* input, int64_t channels, float* products) {
  for (int64_t t = 0; t < kTiles; t += kVectors * L) {
    for (int64_t k = 0; k < kChannelBlock; k += kChannels) {
      Lanes<float> sums[kChannels][kVectors] = {};
      for (int64_t c = 0; c < channels; ++c) {
        Lanes<float> x[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          x[v] = widen(input + c * kStride + t + v * L);
        }
        for (int i = 0; i < kChannels; ++i) {
          const Lanes<float> w = weight[c * kChannelBlock + k + i] - Lanes<float>{};
          for (int v = 0; v < kVectors; ++v) {
            sums[i][v] = multiply_add(w, x[v], sums[i][v]);
          }
        }
      }
      for (int i = 0; i < kChannels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          narrow(sums[i][v], products + (k + i) * kStride + t + v * L);
        }
      }
    }
  }
}

constexpr Loops kLoops = {transform_input, transform_output, multiply_tiles};

}  // namespace gbci::GBCI_CLONE

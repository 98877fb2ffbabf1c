#include "philox_normal.h"

#include <algorithm>
#include <array>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "philox.h"
#include "simd.h"

namespace gbci {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor philox_normal_output(const Tensor& seeds, int64_t num_elements, int64_t step, int64_t stream) {
  STD_TORCH_CHECK(seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long,
                  "seeds must be an int64 tensor [B], got ", torch::headeronly::toString(seeds.scalar_type()),
                  " with ", seeds.dim(), " axes");
  STD_TORCH_CHECK(num_elements >= 0 && num_elements <= int64_t{1} << 34,
                  "num_elements must be from 0 to 2^34, got ", num_elements);
  STD_TORCH_CHECK(step >= 0 && step <= UINT32_MAX, "step must be from 0 to 2^32 - 1, got ", step);
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream must be from 0 to 2^32 - 1, got ", stream);
  return torch::stable::new_empty(seeds, {seeds.size(0), num_elements}, ScalarType::Float);
}

namespace {

constexpr int64_t kTileBlocks = 64, kTile = 4 * kTileBlocks;
constexpr int64_t kGrainElements = 32768;  // ATen's own: less than this is not worth waking a thread for
using Tile = std::array<float, kTile>;

GBCI_SIMD_CLONES void fill_tile(uint64_t seed, uint32_t block, uint32_t step, uint32_t stream, float* out) {
  for (uint32_t i = 0; i < kTileBlocks; ++i) {
    const Normals4 n = philox_normal4(seed, block + i, step, stream);
    out[4 * i] = n.n0;
    out[4 * i + 1] = n.n1;
    out[4 * i + 2] = n.n2;
    out[4 * i + 3] = n.n3;
  }
}

Tensor philox_normal_cpu(const Tensor& seeds, int64_t num_elements, int64_t step, int64_t stream) {
  Tensor out = philox_normal_output(seeds, num_elements, step, stream);
  const int64_t* seed = seeds.const_data_ptr<int64_t>();
  const int64_t seed_stride = seeds.stride(0);
  float* normals = out.mutable_data_ptr<float>();
  const int64_t tiles = (num_elements + kTile - 1) / kTile;  // per sample
  torch::stable::parallel_for(0, seeds.size(0) * tiles, kGrainElements / kTile, [&](int64_t begin, int64_t end) {
    Tile tile;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t sample = index / tiles, element = index % tiles * kTile;
      fill_tile(static_cast<uint64_t>(seed[sample * seed_stride]), static_cast<uint32_t>(element / 4),
                static_cast<uint32_t>(step), static_cast<uint32_t>(stream), tile.data());
      std::copy_n(tile.data(), std::min(kTile, num_elements - element), normals + sample * num_elements + element);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal_cpu));
}

}  // namespace gbci

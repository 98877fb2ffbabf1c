#include "philox_normal.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"
#include "common/philox_draw.h"

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

constexpr int64_t kTile = 1024;  // elements, whole blocks

Tensor philox_normal_cpu(const Tensor& seeds, int64_t num_elements, int64_t step, int64_t stream) {
  Tensor out = philox_normal_output(seeds, num_elements, step, stream);
  const int64_t* seed = seeds.const_data_ptr<int64_t>();
  const int64_t seed_stride = seeds.stride(0);
  float* normals = out.mutable_data_ptr<float>();
  const int64_t tiles = (num_elements + kTile - 1) / kTile;  // per sample
  torch::stable::parallel_for(0, seeds.size(0) * tiles, kGrainElements / kTile, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t sample = index / tiles, element = index % tiles * kTile;
      const int64_t count = std::min(kTile, num_elements - element), whole = count / 4;
      float* row = normals + sample * num_elements + element;
      const auto draw = [&](int64_t block, int64_t num_blocks, float* target) {
        draw_normals(static_cast<uint64_t>(seed[sample * seed_stride]), static_cast<uint32_t>(block),
                     static_cast<uint32_t>(num_blocks), static_cast<uint32_t>(step), static_cast<uint32_t>(stream),
                     target);
      };
      draw(element / 4, whole, row);
      if (count % 4 != 0) {
        float last[4];
        draw(element / 4 + whole, 1, last);
        std::copy_n(last, count % 4, row + 4 * whole);
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gbci_fast, m) {
  m.def("philox_normal(Tensor seeds, SymInt num_elements, int step, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal_cpu));
}

}  // namespace gbci

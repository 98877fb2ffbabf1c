// philox_normal: standard normals that depend only on (seed, element, step, stream).

#pragma once

#include <torch/csrc/stable/tensor.h>

namespace gbci {

// Checks the arguments and allocates the result: float32 [B, num_elements] on the device of seeds, int64 [B].
torch::stable::Tensor philox_normal_output(
    const torch::stable::Tensor& seeds, int64_t num_elements, int64_t step, int64_t stream);

}  // namespace gbci

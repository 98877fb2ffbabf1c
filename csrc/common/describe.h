// Words for error messages.

#pragma once

#include <string>

#include <torch/csrc/stable/tensor.h>

namespace gbci {

// "[2, 1, 8, 8]"
inline std::string describe_shape(const torch::stable::Tensor& tensor) {
  std::string text = "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(tensor.size(axis));
  }
  return text + "]";
}

}  // namespace gbci

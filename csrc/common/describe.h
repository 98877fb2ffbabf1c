// Words for error messages.

#pragma once

#include <string>

#include <torch/csrc/stable/tensor.h>

namespace gbci {

// A shape or strides as "[2, 1, 8, 8]".
inline std::string describe(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text + "]";
}

}  // namespace gbci

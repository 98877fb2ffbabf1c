// How many elements a thread takes at least.

#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace gbci {

constexpr int64_t kGrainElements = 32768;  // ATen's own: less than this is not worth waking a thread for

}  // namespace gbci

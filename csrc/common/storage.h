// The types that tensors are stored in. torch's own 16-bit types convert one number at a time, which makes a loop take
// 1.4 to 10 times as long. lanes_clone.h converts vectors to the same bits.

#pragma once

#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace gbci {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The type that values of a storage type are computed in.
template <class Stored>
using RealOf = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

}  // namespace gbci

// The types that tensors are stored in. torch's own 16-bit types convert one number at a time. lanes_clone.h converts
// vectors of them to the same bits: number by number a loop takes 1.4 to 10 times as long.

#pragma once

#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace gbci {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// What a type of storage is computed with.
template <class Stored>
using RealOf = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

}  // namespace gbci

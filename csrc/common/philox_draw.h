// Draws runs of a sample's normals on the CPU, with the widest vectors of this machine.

#pragma once

#include <cstdint>

namespace gbci {

// Elements 4 first_block .. 4 (first_block + num_blocks) - 1 of the sample of `seed`. Blocks are drawn in groups of 32,
// so that runs of a few dozen blocks or more are fast.
void draw_normals(
    uint64_t seed, uint32_t first_block, uint32_t num_blocks, uint32_t step, uint32_t stream, float* normals);

// The same elements in double precision with libm, as gbci_fast/model/noise.py defines them. Not vectorized.
void draw_normals(
    uint64_t seed, uint32_t first_block, uint32_t num_blocks, uint32_t step, uint32_t stream, double* normals);

}  // namespace gbci

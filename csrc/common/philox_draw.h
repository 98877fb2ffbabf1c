// Runs of a sample's normals on the CPU, with the widest vectors that this machine has.

#pragma once

#include <cstdint>

namespace gbci {

// Elements 4 first_block .. 4 (first_block + num_blocks) - 1 of the sample that `seed` draws. Runs of a few dozen blocks
// or more are fast: the work is done in groups of 32.
void draw_normals(
    uint64_t seed, uint32_t first_block, uint32_t num_blocks, uint32_t step, uint32_t stream, float* normals);

// The same in double precision through libm, as gbci_fast/model/noise.py defines them. Not vectorized.
void draw_normals(
    uint64_t seed, uint32_t first_block, uint32_t num_blocks, uint32_t step, uint32_t stream, double* normals);

}  // namespace gbci

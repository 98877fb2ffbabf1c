// The equations of blend_step over rows on the CPU, with the widest vectors of this machine. A row is a run of
// neighboring positions of one channel.

#pragma once

#include <cstdint>

#include "blend_step.h"
#include "common/storage.h"

namespace gbci {

// The coefficients in the precision of the step. A term whose coefficient is 0 is not read.
template <class Real>
struct Factor {
  Real value;
  bool used;
};

template <class Real>
struct Equations {
  explicit Equations(const BlendStep& args);

  StepCoefficients<Factor<Real>> coefficients;
  Real guidance_scale, clip;
  Real denoised_start, next_start, known_start;  // -0, to which any first term adds exactly; 0 without terms
  bool has_rescale, has_clip, has_corrector;
};

// One row of every tensor of BlendStep, with unit stride; null where the view is null.
template <class State, class Model>
struct Rows {
  const State *latents, *previous, *older, *corrected_before, *noise, *known, *known_noise;
  const Model *conditional, *unconditional;
  const RealOf<State> *weight, *drawn;  // drawn: noise from seeds
  State *denoised, *corrected, *out;
  Model* model_input;
};

// Sums of x - shift and of its square. Each position belongs to one of eight lanes, wherever a row is cut, so that the
// order of summation depends only on the shape. The shift is a value of the sample, and avoids cancellation.
struct ShiftedSums {
  static constexpr int64_t kLanes = 8;
  double shift = 0, first[kLanes] = {}, second[kLanes] = {};

  void add(const ShiftedSums& other);
  double standard_deviation(int64_t count) const;  // unbiased; NaN for a single value
};

// Layout of a tile's copy: positions are neighbors, and channels are kTileWidth elements apart.
constexpr int64_t kTileWidth = 512;  // a multiple of ShiftedSums::kLanes
constexpr int64_t kTileChannels = 4;

// A tensor's strides in elements, and the number of channels and positions to copy from or to a tile.
struct Strides {
  int64_t channel, position, channels, positions;
};

template <class State, class Model>
struct RowKernels {
  using Real = RealOf<State>;
  // Updates elements 0 .. length - 1 of the rows. Reads every element before it writes it, because out may be latents.
  void (*blend)(const Equations<Real>& a, const Rows<State, Model>& rows, Real rescale, int64_t length);
  // The first elements of the conditional and of the guided output.
  void (*first_output)(
      const Rows<State, Model>& rows, Real guidance_scale, double* conditional, double* guided);
  // Adds the conditional and the guided output of a row to the sums. The row starts at a multiple of
  // ShiftedSums::kLanes.
  void (*add_outputs)(
      const Rows<State, Model>& rows, Real guidance_scale, int64_t length, ShiftedSums& conditional, ShiftedSums& guided);
};

template <class Stored>
struct TileKernels {
  void (*load)(const Stored* elements, Strides strides, Stored* tile);
  void (*store)(Stored* elements, Strides strides, const Stored* tile);
};

template <class State, class Model>
RowKernels<State, Model> row_kernels();

template <class Stored>
TileKernels<Stored> tile_kernels();

}  // namespace gbci

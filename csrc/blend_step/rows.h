// The equations of blend_step over rows, which are runs of neighboring positions of one channel, on the CPU with the
// widest vectors that this machine has.

#pragma once

#include <cstdint>

#include "blend_step.h"
#include "common/storage.h"

namespace gbci {

// A coefficient in the precision of the step. A term whose coefficient is 0 is not read.
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
  Real denoised_start, next_start, known_start;  // -0, to which a term adds as if it were the first; 0 without terms
  bool has_rescale, has_clip, has_corrector;
};

// One row of every tensor of BlendStep, unit stride; null where its view is.
template <class State, class Model>
struct Rows {
  const State *latents, *previous, *older, *corrected_before, *noise, *known, *known_noise;
  const Model *conditional, *unconditional;
  const RealOf<State> *weight, *drawn;  // drawn: noise from seeds
  State *denoised, *corrected, *out;
  Model* model_input;
};

// Sums of x - shift and of its square. A position belongs to one of eight lanes wherever a row is cut, so that the order
// of summation depends on the shape alone; the shift, a value of the sample, spares the sums cancellation.
struct ShiftedSums {
  static constexpr int64_t kLanes = 8;
  double shift = 0, first[kLanes] = {}, second[kLanes] = {};

  void add(const ShiftedSums& other);
  double standard_deviation(int64_t count) const;  // unbiased; NaN of a single value
};

// Between a tensor's elements, whose channels and positions are so many elements apart, and a tile, whose positions are
// neighbors and whose channels are kTileWidth apart.
constexpr int64_t kTileWidth = 512;  // a multiple of ShiftedSums::kLanes
constexpr int64_t kTileChannels = 4;

struct Strides {
  int64_t channel, position, channels, positions;
};

template <class State, class Model>
struct RowKernels {
  using Real = RealOf<State>;
  // Elements 0 .. length - 1 of the rows. Every element is read before it is written, for out may be latents.
  void (*blend)(const Equations<Real>& a, const Rows<State, Model>& rows, Real rescale, int64_t length);
  // The conditional and the guided output's first element.
  void (*first_output)(
      const Rows<State, Model>& rows, Real guidance_scale, double* conditional, double* guided);
  // Adds the conditional and the guided output of a row that starts at a multiple of ShiftedSums::kLanes.
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

#include "rows.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#define GBCI_CLONE_FILE "blend_step/rows_clone.h"
#include "common/for_each_instruction_set.h"

namespace gbci {

template <class Real>
Equations<Real>::Equations(const BlendStep& args) {
  coefficients = args.coefficients.map([](double value) { return Factor<Real>{static_cast<Real>(value), value != 0}; });
  guidance_scale = static_cast<Real>(args.guidance_scale);
  clip = static_cast<Real>(args.clip.value_or(0));
  const auto start = [](auto... factors) { return (factors.used || ...) ? Real(-0.0) : Real(0); };
  const StepCoefficients<Factor<Real>>& a = coefficients;
  denoised_start = start(a.denoised_from_latents, a.denoised_from_output);
  next_start = start(a.next_from_corrected, a.next_from_output, a.next_from_denoised, a.next_from_previous,
                     a.next_from_older, a.next_from_noise);
  known_start = start(a.known_from_latents, a.known_from_noise);
  has_rescale = args.guidance_rescale != 0;
  has_clip = args.clip.has_value();
  has_corrector = args.has_corrector;
}

template struct Equations<float>;
template struct Equations<double>;

void ShiftedSums::add(const ShiftedSums& other) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    first[lane] += other.first[lane];
    second[lane] += other.second[lane];
  }
}

double ShiftedSums::standard_deviation(int64_t count) const {
  const double sum = std::accumulate(first, first + kLanes, 0.0);
  const double squares = std::accumulate(second, second + kLanes, 0.0);
  return std::sqrt(std::max(squares - sum * sum / count, 0.0) / (count - 1));
}

template <class State, class Model>
RowKernels<State, Model> row_kernels() {
  return GBCI_WIDEST(row_kernels<State, Model>());
}

template <class Stored>
TileKernels<Stored> tile_kernels() {
  return GBCI_WIDEST(tile_kernels<Stored>());
}

template RowKernels<float, float> row_kernels();
template RowKernels<float, BFloat16> row_kernels();
template RowKernels<float, Half> row_kernels();
template RowKernels<BFloat16, BFloat16> row_kernels();
template RowKernels<Half, Half> row_kernels();
template RowKernels<double, double> row_kernels();
template TileKernels<float> tile_kernels();
template TileKernels<BFloat16> tile_kernels();
template TileKernels<Half> tile_kernels();
template TileKernels<double> tile_kernels();

}  // namespace gbci

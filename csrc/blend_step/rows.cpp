#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "common/clones.h"
#include "common/host_device.h"

#if defined(__x86_64__)

GBCI_PUSH_TARGET("avx512f")
#define GBCI_CLONE avx512f
#define GBCI_VECTOR_BYTES 64
#define GBCI_TO_WORDS GBCI_AVX512_TO_WORDS
#define GBCI_TO_HALFWORDS GBCI_AVX512_TO_HALFWORDS
#include "rows_clone.h"
GBCI_POP_TARGET

GBCI_PUSH_TARGET("avx2")
#define GBCI_CLONE avx2
#define GBCI_VECTOR_BYTES 32
#include "rows_clone.h"
GBCI_POP_TARGET

#endif

#define GBCI_CLONE baseline
#define GBCI_VECTOR_BYTES 16
#include "rows_clone.h"

namespace gbci {

template <class Real>
Equations<Real>::Equations(const BlendStep& args) {
  const StepCoefficients& a = args.coefficients;
  const auto factor = [](double value) { return Factor<Real>{static_cast<Real>(value), value != 0}; };
  denoised_from_latents = factor(a.denoised_from_latents);
  denoised_from_output = factor(a.denoised_from_output);
  corrected_from_corrected = factor(a.corrected_from_corrected);
  corrected_from_previous = factor(a.corrected_from_previous);
  corrected_from_older = factor(a.corrected_from_older);
  corrected_from_denoised = factor(a.corrected_from_denoised);
  next_from_corrected = factor(a.next_from_corrected);
  next_from_output = factor(a.next_from_output);
  next_from_denoised = factor(a.next_from_denoised);
  next_from_previous = factor(a.next_from_previous);
  next_from_older = factor(a.next_from_older);
  next_from_noise = factor(a.next_from_noise);
  known_from_latents = factor(a.known_from_latents);
  known_from_noise = factor(a.known_from_noise);
  input_from_latents = static_cast<Real>(a.input_from_latents);
  guidance_scale = static_cast<Real>(args.guidance_scale);
  clip = static_cast<Real>(args.clip.value_or(0));
  const auto start = [](auto... factors) { return (factors.used || ...) ? Real(-0.0) : Real(0); };
  denoised_start = start(denoised_from_latents, denoised_from_output);
  next_start = start(next_from_corrected, next_from_output, next_from_denoised, next_from_previous, next_from_older,
                     next_from_noise);
  known_start = start(known_from_latents, known_from_noise);
  has_rescale = args.guidance_rescale != 0;
  has_clip = args.clip.has_value();
  has_corrector = args.has_corrector;
}

template struct Equations<float>;
template struct Equations<double>;

void Moments::add(const Moments& other) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    first[lane] += other.first[lane];
    second[lane] += other.second[lane];
  }
}

double Moments::standard_deviation(int64_t count) const {
  const double sum = std::accumulate(first, first + kLanes, 0.0);
  const double squares = std::accumulate(second, second + kLanes, 0.0);
  return std::sqrt(std::max(squares - sum * sum / count, 0.0) / (count - 1));
}

namespace {

const InstructionSet instruction_set = widest();

}  // namespace

template <class State, class Model>
RowKernels<State, Model> row_kernels() {
  switch (instruction_set) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512:
      return {avx512f::blend<State, Model>, avx512f::first_output<State, Model>, avx512f::add_moments<State, Model>};
    case InstructionSet::kAvx2:
      return {avx2::blend<State, Model>, avx2::first_output<State, Model>, avx2::add_moments<State, Model>};
#endif
    default:
      return {baseline::blend<State, Model>, baseline::first_output<State, Model>, baseline::add_moments<State, Model>};
  }
}

template <class Stored>
TileKernels<Stored> tile_kernels() {
  switch (instruction_set) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512:
      return {avx512f::load_tile<Stored>, avx512f::store_tile<Stored>};
    case InstructionSet::kAvx2:
      return {avx2::load_tile<Stored>, avx2::store_tile<Stored>};
#endif
    default:
      return {baseline::load_tile<Stored>, baseline::store_tile<Stored>};
  }
}

template RowKernels<float, float> row_kernels();
template RowKernels<float, BFloat16> row_kernels();
template RowKernels<float, Float16> row_kernels();
template RowKernels<BFloat16, BFloat16> row_kernels();
template RowKernels<Float16, Float16> row_kernels();
template RowKernels<double, double> row_kernels();
template TileKernels<float> tile_kernels();
template TileKernels<BFloat16> tile_kernels();
template TileKernels<Float16> tile_kernels();
template TileKernels<double> tile_kernels();

}  // namespace gbci

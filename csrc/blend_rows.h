// The equations of blend_step over rows: runs of neighboring positions of one channel. For the CPU.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "blend_step.h"
#include "philox.h"  // GBCI_INLINE
#include "simd.h"

namespace gbci {

// A step's coefficients in the precision it is computed in.
template <class Real>
struct RowCoefficients {
  explicit RowCoefficients(const BlendStep& args)
      : denoised{static_cast<Real>(args.coefficients.denoised_from_latents),
                 static_cast<Real>(args.coefficients.denoised_from_output)},
        corrected{static_cast<Real>(args.coefficients.corrected_from_corrected),
                  static_cast<Real>(args.coefficients.corrected_from_previous),
                  static_cast<Real>(args.coefficients.corrected_from_older),
                  static_cast<Real>(args.coefficients.corrected_from_denoised)},
        next{static_cast<Real>(args.coefficients.next_from_corrected),
             static_cast<Real>(args.coefficients.next_from_output),
             static_cast<Real>(args.coefficients.next_from_denoised),
             static_cast<Real>(args.coefficients.next_from_previous),
             static_cast<Real>(args.coefficients.next_from_older),
             static_cast<Real>(args.coefficients.next_from_noise)},
        known{static_cast<Real>(args.coefficients.known_from_latents),
              static_cast<Real>(args.coefficients.known_from_noise)},
        input(static_cast<Real>(args.coefficients.input_from_latents)),
        guidance(static_cast<Real>(args.guidance_scale)),
        clip(static_cast<Real>(args.clip.value_or(0))),
        has_corrector(args.has_corrector),
        has_clip(args.clip.has_value()),
        has_rescale(args.guidance_rescale != 0),
        blends(args.weight.data != nullptr) {}

  Real denoised[2], corrected[4], next[6], known[2], input, guidance, clip;
  bool has_corrector, has_clip, has_rescale, blends;
};

// One row of every tensor of BlendStep, unit stride; null where its view is.
template <class Real>
struct Rows {
  const Real *latents, *conditional, *unconditional, *previous, *older, *corrected_before, *noise, *known, *known_noise,
      *weight;
  Real *denoised, *corrected, *model_input, *out;
};

// The sum of the terms whose coefficient is not 0, in their order; of none, zeros.
template <class Real, class Count>
struct Sum {
  Real* total;
  Count count;
  bool empty = true;

  GBCI_INLINE void add(Real coefficient, const Real* row, int64_t offset) {
    if (coefficient == 0) {
      return;
    }
    const Real* term = row + offset;
    if (empty) {
      for (int64_t j = 0; j < count; ++j) {
        total[j] = coefficient * term[j];
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        total[j] += coefficient * term[j];
      }
    }
    empty = false;
  }

  GBCI_INLINE void finish() {
    if (empty) {
      for (int64_t j = 0; j < count; ++j) {
        total[j] = 0;
      }
    }
  }
};

constexpr int64_t kBlock = 64;

// Elements i .. i + count - 1 of the rows. All reads come before the writes, for out may be latents.
template <class Real, class Count>
GBCI_INLINE void blend_block(
    const RowCoefficients<Real>& a, const Rows<Real>& row, Real rescale, int64_t i, Count count) {
  Real output[kBlock], denoised[kBlock], sum_z[kBlock], next[kBlock];
  const Real* m = output;
  if (row.unconditional) {
    const Real *c = row.conditional + i, *u = row.unconditional + i;
    for (int64_t j = 0; j < count; ++j) {
      output[j] = u[j] + a.guidance * (c[j] - u[j]);
    }
    if (a.has_rescale) {
      for (int64_t j = 0; j < count; ++j) {
        output[j] *= rescale;
      }
    }
  } else if (row.conditional) {
    m = row.conditional + i;
  }

  Sum<Real, Count> x0{denoised, count};
  x0.add(a.denoised[0], row.latents, i);
  x0.add(a.denoised[1], m, 0);
  x0.finish();
  if (a.has_clip) {
    for (int64_t j = 0; j < count; ++j) {  // as torch.clamp, which keeps a NaN
      const Real low = denoised[j] < -a.clip ? -a.clip : denoised[j];
      denoised[j] = low > a.clip ? a.clip : low;
    }
  }

  const Real* z = row.latents ? row.latents + i : nullptr;
  if (a.has_corrector) {
    Sum<Real, Count> sum{sum_z, count};
    sum.add(a.corrected[0], row.corrected_before, i);
    sum.add(a.corrected[1], row.previous, i);
    sum.add(a.corrected[2], row.older, i);
    sum.add(a.corrected[3], denoised, 0);
    sum.finish();
    z = sum_z;
  }

  Sum<Real, Count> sum{next, count};
  sum.add(a.next[0], z, 0);
  sum.add(a.next[1], m, 0);
  sum.add(a.next[2], denoised, 0);
  sum.add(a.next[3], row.previous, i);
  sum.add(a.next[4], row.older, i);
  sum.add(a.next[5], row.noise, i);
  sum.finish();

  if (a.blends) {
    Real known[kBlock];
    const Real* w = row.weight + i;
    Sum<Real, Count> k{known, count};
    k.add(a.known[0], row.known, i);
    k.add(a.known[1], row.known_noise, i);
    k.finish();
    for (int64_t j = 0; j < count; ++j) {  // as torch.lerp, exact at both ends
      const Real difference = next[j] - known[j];
      const Real from_known = known[j] + w[j] * difference, from_next = next[j] - difference * (1 - w[j]);
      next[j] = w[j] < Real(0.5) ? from_known : from_next;
    }
  }

  if (row.denoised) {
    for (int64_t j = 0; j < count; ++j) {
      row.denoised[i + j] = denoised[j];
    }
  }
  if (row.corrected) {
    for (int64_t j = 0; j < count; ++j) {
      row.corrected[i + j] = z[j];
    }
  }
  if (row.model_input) {
    for (int64_t j = 0; j < count; ++j) {
      row.model_input[i + j] = a.input * next[j];
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    row.out[i + j] = next[j];
  }
}

template <class Real>
GBCI_INLINE void blend_row(const RowCoefficients<Real>& a, const Rows<Real>& row, Real rescale, int64_t count) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    blend_block(a, row, rescale, i, std::integral_constant<int64_t, kBlock>{});
  }
  if (i < count) {
    blend_block(a, row, rescale, i, count - i);
  }
}

GBCI_SIMD_CLONES inline void blend(
    const RowCoefficients<float>& a, const Rows<float>& row, float rescale, int64_t count) {
  blend_row(a, row, rescale, count);
}

GBCI_SIMD_CLONES inline void blend(
    const RowCoefficients<double>& a, const Rows<double>& row, double rescale, int64_t count) {
  blend_row(a, row, rescale, count);
}

// Sums of x - shift and of its square. A position belongs to one of eight lanes wherever a row is cut, so that the order
// of summation depends on the shape alone; the shift, a value of the sample, spares the sums cancellation.
struct Moments {
  static constexpr int64_t kLanes = 8;
  double shift = 0, first[kLanes] = {}, second[kLanes] = {};

  GBCI_INLINE void add(int64_t lane, double x) {
    first[lane] += x - shift;
    second[lane] += (x - shift) * (x - shift);
  }

  void add(const Moments& other) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      first[lane] += other.first[lane];
      second[lane] += other.second[lane];
    }
  }

  // Unbiased; NaN of a single value.
  double standard_deviation(int64_t count) const {
    const double sum = std::accumulate(first, first + kLanes, 0.0), squares = std::accumulate(second, second + kLanes, 0.0);
    return std::sqrt(std::max(squares - sum * sum / count, 0.0) / (count - 1));
  }
};

// Adds a row, which starts at a multiple of Moments::kLanes: its conditional and its guided output.
template <class Real>
GBCI_INLINE void add_row(const Rows<Real>& row, Real guidance, int64_t count, Moments& conditional, Moments& guided) {
  const auto add = [&](int64_t i, int64_t lane) {
    const Real c = row.conditional[i], u = row.unconditional[i];
    conditional.add(lane, c);
    guided.add(lane, u + guidance * (c - u));
  };
  int64_t i = 0;
  for (; i + Moments::kLanes <= count; i += Moments::kLanes) {
    for (int64_t lane = 0; lane < Moments::kLanes; ++lane) {
      add(i + lane, lane);
    }
  }
  for (; i < count; ++i) {
    add(i, i % Moments::kLanes);
  }
}

GBCI_SIMD_CLONES inline void add_moments(
    const Rows<float>& row, float guidance, int64_t count, Moments& conditional, Moments& guided) {
  add_row(row, guidance, count, conditional, guided);
}

GBCI_SIMD_CLONES inline void add_moments(
    const Rows<double>& row, double guidance, int64_t count, Moments& conditional, Moments& guided) {
  add_row(row, guidance, count, conditional, guided);
}

}  // namespace gbci

// composite: a decoded window painted into native images; kernels/ops/composite.py defines it.
//
// The CPU and CUDA do the operations below in the same order and so give the same bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "host_device.h"

namespace gbci {

// One native window: where its pixels begin, and where they lie in the decoded window, pixel X at scale (X + 1/2) +
// offset.
struct CompositeWindow {
  int64_t start;
  int32_t height, width;
  double scale_x, offset_x, scale_y, offset_y;
};

// A tensor [B, 1, h, w], strides in elements.
struct Plane {
  const void* data = nullptr;
  int64_t batch = 0, row = 0, column = 0;
};

// The arguments of composite, checked.
struct Composite {
  int64_t num_pixels;
  torch::headeronly::ScalarType pixel_dtype, plane_dtype;
  const void* pixels;   // [num_pixels], and so the result
  const float* weight;  // [num_pixels]
  Plane synthetic, original;  // original.data is null without a template
  int32_t height, width;      // of both
  float white;
  std::vector<CompositeWindow> windows;
};

Composite check_composite(
    const torch::stable::Tensor& pixels,
    const torch::stable::Tensor& weight,
    const torch::stable::Tensor& synthetic,
    const std::optional<torch::stable::Tensor>& original,
    const torch::stable::Tensor& sizes,
    const torch::stable::Tensor& affine,
    double white);

// Four neighboring model pixels along one axis, the second of which is `index`, and their weights.
struct Taps {
  int32_t index;
  float weights[4];
};

// Those of a native pixel, by Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 29
// (1981), with a = -3/4. On a pixel's center the other three weights are +0.
GBCI_INLINE Taps cubic_taps(double scale, double offset, int64_t native, int32_t size) {
  const double position = scale * (static_cast<double>(native) + 0.5) + offset - 0.5;
  const double whole = std::floor(position);
  const float t = static_cast<float>(position - whole), s = 1.0f - t;
  // Further out than this, too, all four lie beyond the border, and repeat its pixel.
  const double near = whole < -2.0 ? -2.0 : whole > size ? size : whole;
  return {
      static_cast<int32_t>(near),
      {0.0f - 0.75f * t * (s * s), (1.25f * t - 2.25f) * (t * t) + 1.0f, (1.25f * s - 2.25f) * (s * s) + 1.0f,
       0.0f - 0.75f * s * (t * t)}};
}

// A tap of weight 0 is not read: no NaN beside it comes in.
GBCI_INLINE float tap(float weight, float value) { return weight * (weight == 0.0f ? 0.0f : value); }

// `weight` of the resampled change or, without one, of the resampled image into a native pixel; all in units of the
// pixel. The latter as torch.lerp, exact at both ends.
GBCI_INLINE float blend(float pixel, float resampled, float weight, bool is_change) {
  if (is_change) {
    return pixel + weight * resampled;
  }
  const float difference = resampled - pixel;
  return weight < 0.5f ? pixel + weight * difference : resampled - difference * (1.0f - weight);
}

// A value between 0 and white. NaN stays NaN in a float and is 0 in an integer.
template <typename Pixel>
GBCI_INLINE float clip(float value, float white) {
  if constexpr (std::is_same_v<Pixel, float>) {
    return value < 0.0f ? 0.0f : value > white ? white : value;
  } else {
    return value > 0.0f ? value < white ? value : white : 0.0f;
  }
}

// A value from 0 to 2^16 - 1, rounded, half to even, where the pixel is an integer.
template <typename Pixel>
GBCI_INLINE Pixel quantize(float value) {
  if constexpr (std::is_same_v<Pixel, float>) {
    return value;
  } else {
    // Beside 2^23 a float has no fraction left, and its last 23 bits are the integer.
    const float shifted = value + 8388608.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<Pixel>(bits);
  }
}

}  // namespace gbci

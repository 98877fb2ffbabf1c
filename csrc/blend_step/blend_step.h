// blend_step: everything between two UNet calls in one pass over memory; kernels/ops/blend_step.py defines it.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace gbci {

// The fields of StepCoefficients in kernels/ops/blend_step.py. Their order is that of the operator's argument.
#define GBCI_STEP_COEFFICIENTS(apply) \
  apply(denoised_from_latents)        \
  apply(denoised_from_output)         \
  apply(corrected_from_corrected)     \
  apply(corrected_from_previous)      \
  apply(corrected_from_older)         \
  apply(corrected_from_denoised)      \
  apply(next_from_corrected)          \
  apply(next_from_output)             \
  apply(next_from_denoised)           \
  apply(next_from_previous)           \
  apply(next_from_older)              \
  apply(next_from_noise)              \
  apply(known_from_latents)           \
  apply(known_from_noise)             \
  apply(input_from_latents)

template <class T>
struct StepCoefficients {
#define GBCI_FIELD(name) T name;
  GBCI_STEP_COEFFICIENTS(GBCI_FIELD)
#undef GBCI_FIELD

  // The same coefficients, converted to another type.
  template <class Convert>
  auto map(const Convert& convert) const {
#define GBCI_FIELD(name) convert(name),
    return StepCoefficients<decltype(convert(T{}))>{GBCI_STEP_COEFFICIENTS(GBCI_FIELD)};
#undef GBCI_FIELD
  }
};

// A tensor [B, C, H, W] whose H and W flatten into one axis of positions. Strides are in elements, and 0 on an axis of
// size 1, except that the position stride is then 1.
struct View {
  void* data = nullptr;  // const data in the fields that are read; null: do not touch
  int64_t batch = 0, channel = 0, position = 1;
  torch::headeronly::ScalarType dtype = torch::headeronly::ScalarType::Float;
};

// The arguments of blend_step, checked. Views, in the order of the equations:
struct BlendStep {
  int64_t batch, channels, positions;

  // Read. Null where the tensor is absent or no coefficient asks for it.
  View latents;
  View conditional, unconditional;  // unconditional: null without conditional; batch stride 0 where its batch is 1
  View previous;
  View older;             // `denoised` before this step
  View corrected_before;  // `corrected` before this step
  View noise;
  View known, known_noise;
  View weight;  // [B, 1, H, W], channel stride 0, float32 (float64 if the latents are); null: no blend with known

  const int64_t* seeds = nullptr;  // null: no noise to draw
  int64_t seed_stride = 0;
  uint32_t step = 0, stream = 0;

  // Written. Null where absent; out is never absent, and may be `latents` itself. older and denoised are one tensor,
  // corrected_before and corrected another: read an element before it is written.
  View denoised, corrected, model_input, out;

  // A coefficient that is not 0 has its tensor. The coefficients of a sum that is not needed are 0.
  StepCoefficients<double> coefficients;
  bool has_corrector;  // z is the sum of corrected_from_..., else z = latents
  std::optional<double> clip;
  double guidance_scale, guidance_rescale;  // the latter 0 where unconditional is null
};

// Checks the arguments of the operator, in the order of its schema. The dtype rules: conditional, unconditional and
// model_input share the dtype of `latents`, or are bfloat16 or float16 beside float32 latents. All other tensors have
// the dtype of `latents` (float32, bfloat16, float16, or float64 on the CPU).
BlendStep check_blend_step(
    const torch::stable::Tensor& latents,
    const torch::stable::Tensor& conditional,
    const std::optional<torch::stable::Tensor>& unconditional,
    const std::optional<torch::stable::Tensor>& previous,
    const std::optional<torch::stable::Tensor>& denoised,
    const std::optional<torch::stable::Tensor>& corrected,
    const std::optional<torch::stable::Tensor>& noise,
    const std::optional<torch::stable::Tensor>& seeds,
    const std::optional<torch::stable::Tensor>& known,
    const std::optional<torch::stable::Tensor>& known_noise,
    const std::optional<torch::stable::Tensor>& weight,
    const std::optional<torch::stable::Tensor>& model_input,
    const torch::stable::Tensor& out,
    const std::vector<double>& coefficients,
    std::optional<double> clip,
    double guidance_scale,
    double guidance_rescale,
    int64_t step,
    int64_t stream);

}  // namespace gbci

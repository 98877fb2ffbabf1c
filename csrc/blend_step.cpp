#include "blend_step.h"

#include <cmath>
#include <sstream>
#include <string>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace gbci {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace {

std::string show(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) {
    text << (i ? ", " : "") << values[i];
  }
  text << ']';
  return text.str();
}

std::string device_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
}

void check_device(const char* name, const Tensor& tensor, const Tensor& latents) {
  STD_TORCH_CHECK(tensor.is_cpu() == latents.is_cpu() && tensor.get_device_index() == latents.get_device_index(),
                  name, " must be on ", device_name(latents), " like latents, got ", device_name(tensor));
}

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.equals(shape), name, " must have shape ", show(shape), ", got ", show(sizes));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected, const char* like) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " must be ", toString(expected), like, ", got ",
                  toString(tensor.scalar_type()));
}

enum class Access { kRead, kWrite };

// The strides of a tensor whose dtype and shape are checked.
View view(const char* name, const Tensor& tensor, Access access) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  const bool one_row = size[2] == 1, one_column = size[3] == 1;
  STD_TORCH_CHECK(one_row || one_column || stride[2] == size[3] * stride[3], name,
                  " must be NCHW, channels-last or a slice of their channels, so that H and W flatten; got shape ",
                  show(size), " with strides ", show(stride));
  View result;
  result.batch = size[0] == 1 ? 0 : stride[0];
  result.channel = size[1] == 1 ? 0 : stride[1];
  result.position = one_row && one_column ? 1 : one_column ? stride[2] : stride[3];
  result.dtype = tensor.scalar_type();
  if (access == Access::kWrite) {
    for (size_t axis = 0; axis < 4; ++axis) {
      STD_TORCH_CHECK(size[axis] == 1 || stride[axis] != 0, name, " is written and must not be expanded; got shape ",
                      show(size), " with strides ", show(stride));
    }
    result.data = tensor.mutable_data_ptr();
  } else {
    result.data = const_cast<void*>(tensor.const_data_ptr());
  }
  return result;
}

// A coefficient that is not 0 reads its tensor.
void check_given(const char* tensor, bool given, std::initializer_list<std::pair<const char*, double>> coefficients) {
  for (const auto& [name, value] : coefficients) {
    STD_TORCH_CHECK(given || value == 0, tensor, " must be given where ", name, " is not 0, got ", value);
  }
}

StepCoefficients check_coefficients(const std::vector<double>& values, bool is_double) {
  static constexpr const char* kNames[] = {
      "denoised_from_latents",    "denoised_from_output",   "corrected_from_corrected", "corrected_from_previous",
      "corrected_from_older",     "corrected_from_denoised", "next_from_corrected",     "next_from_output",
      "next_from_denoised",       "next_from_previous",     "next_from_older",          "next_from_noise",
      "known_from_latents",       "known_from_noise",       "input_from_latents"};
  constexpr size_t kCount = std::size(kNames);
  STD_TORCH_CHECK(values.size() == kCount, "coefficients must be ", kCount, " numbers, got ", values.size());
  for (size_t i = 0; i < kCount; ++i) {
    STD_TORCH_CHECK(std::isfinite(is_double ? values[i] : static_cast<float>(values[i])), kNames[i],
                    " must be finite, got ", values[i]);
  }
  const double* v = values.data();
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
}

}  // namespace

BlendStep check_blend_step(
    const Tensor& latents,
    const Tensor& conditional,
    const Optional& unconditional,
    const Optional& previous,
    const Optional& denoised,
    const Optional& corrected,
    const Optional& noise,
    const Optional& seeds,
    const Optional& known,
    const Optional& known_noise,
    const Optional& weight,
    const Optional& model_input,
    const Tensor& out,
    const std::vector<double>& coefficients,
    std::optional<double> clip,
    double guidance_scale,
    double guidance_rescale,
    int64_t step,
    int64_t stream) {
  const ScalarType state = latents.scalar_type(), model = conditional.scalar_type();
  const bool is_float = state == ScalarType::Float, is_double = state == ScalarType::Double;
  const bool is_half = state == ScalarType::BFloat16 || state == ScalarType::Half;
  STD_TORCH_CHECK((is_float || is_double || is_half) && latents.dim() == 4,
                  "latents must be a Float, BFloat16, Half or Double tensor [B, C, H, W], got ", toString(state), " ",
                  show(latents.sizes()));
  STD_TORCH_CHECK(latents.numel() > 0, "latents must not be empty, got ", show(latents.sizes()));
  STD_TORCH_CHECK(!is_double || latents.is_cpu(), "latents must be Float, BFloat16 or Half on ", device_name(latents),
                  ", got Double");
  STD_TORCH_CHECK(model == state || is_float, "conditional must be ", toString(state), " like latents, got ",
                  toString(model));
  STD_TORCH_CHECK(model == state || model == ScalarType::BFloat16 || model == ScalarType::Half,
                  "conditional must be Float, BFloat16 or Half beside Float latents, got ", toString(model));

  BlendStep args;
  const std::vector<int64_t> shape(latents.sizes().begin(), latents.sizes().end());
  args.batch = shape[0], args.channels = shape[1], args.positions = shape[2] * shape[3];
  args.latents = view("latents", latents, Access::kRead);

  const auto take = [&](const char* name, const Tensor& tensor, ScalarType dtype, const char* like, Access access) {
    check_device(name, tensor, latents);
    check_dtype(name, tensor, dtype, like);
    check_shape(name, tensor, shape);
    return view(name, tensor, access);
  };
  const auto take_state = [&](const char* name, const Optional& tensor, Access access) {
    return tensor ? take(name, *tensor, state, " like latents", access) : View{};
  };
  args.conditional = take("conditional", conditional, model, "", Access::kRead);
  if (unconditional) {
    check_device("unconditional", *unconditional, latents);
    check_dtype("unconditional", *unconditional, model, " like conditional");
    const std::vector<int64_t> broadcast = {1, shape[1], shape[2], shape[3]};
    STD_TORCH_CHECK(unconditional->sizes().equals(shape) || unconditional->sizes().equals(broadcast),
                    "unconditional must have shape ", show(shape), " or ", show(broadcast), ", got ",
                    show(unconditional->sizes()));
    args.unconditional = view("unconditional", *unconditional, Access::kRead);
  }
  args.previous = take_state("previous", previous, Access::kRead);
  args.denoised = args.older = take_state("denoised", denoised, Access::kWrite);
  args.corrected = args.corrected_before = take_state("corrected", corrected, Access::kWrite);
  args.noise = take_state("noise", noise, Access::kRead);
  if (seeds) {
    check_device("seeds", *seeds, latents);
    STD_TORCH_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->dim() == 1 && seeds->size(0) == shape[0],
                    "seeds must be a Long tensor [", shape[0], "], got ", toString(seeds->scalar_type()), " ",
                    show(seeds->sizes()));
    STD_TORCH_CHECK(args.channels * args.positions <= int64_t{1} << 34,
                    "a sample must have at most 2^34 elements where seeds draw its noise, got ", show(shape));
    args.seeds = seeds->const_data_ptr<int64_t>();
    args.seed_stride = seeds->stride(0);
  }
  args.known = take_state("known", known, Access::kRead);
  args.known_noise = take_state("known_noise", known_noise, Access::kRead);
  if (weight) {
    check_device("weight", *weight, latents);
    check_dtype("weight", *weight, is_double ? ScalarType::Double : ScalarType::Float, "");
    check_shape("weight", *weight, {shape[0], 1, shape[2], shape[3]});
    args.weight = view("weight", *weight, Access::kRead);
  }
  if (model_input) {
    args.model_input = take("model_input", *model_input, model, " like conditional", Access::kWrite);
  }
  args.out = take("out", out, state, " like latents", Access::kWrite);

  args.coefficients = check_coefficients(coefficients, is_double);
  STD_TORCH_CHECK(!clip || (*clip >= 0 && std::isfinite(is_double ? *clip : static_cast<float>(*clip))),
                  "clip must be finite and at least 0, got ", *clip);
  STD_TORCH_CHECK(std::isfinite(is_double ? guidance_scale : static_cast<float>(guidance_scale)),
                  "guidance_scale must be finite, got ", guidance_scale);
  STD_TORCH_CHECK(guidance_rescale >= 0 && guidance_rescale <= 1, "guidance_rescale must be from 0 to 1, got ",
                  guidance_rescale);
  STD_TORCH_CHECK(step >= 0 && step <= UINT32_MAX, "step must be from 0 to 2^32 - 1, got ", step);
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream must be from 0 to 2^32 - 1, got ", stream);
  args.clip = clip;
  args.guidance_scale = guidance_scale;
  args.guidance_rescale = unconditional ? guidance_rescale : 0;
  args.step = static_cast<uint32_t>(step), args.stream = static_cast<uint32_t>(stream);

  STD_TORCH_CHECK(!(noise && seeds), "noise and seeds were both given; expected one of them");
  STD_TORCH_CHECK(known.has_value() == weight.has_value(),
                  known ? "known was given without weight" : "weight was given without known", "; expected both");
  const StepCoefficients& a = args.coefficients;
  check_given("corrected", corrected.has_value(), {{"corrected_from_corrected", a.corrected_from_corrected}});
  check_given("previous", previous.has_value(),
              {{"corrected_from_previous", a.corrected_from_previous}, {"next_from_previous", a.next_from_previous}});
  check_given("denoised", denoised.has_value(),
              {{"corrected_from_older", a.corrected_from_older}, {"next_from_older", a.next_from_older}});
  check_given("noise or seeds", noise || seeds, {{"next_from_noise", a.next_from_noise}});
  check_given("known_noise", known_noise || !known, {{"known_from_noise", a.known_from_noise}});

  // What no coefficient asks for is not read.
  args.has_corrector = a.corrected_from_corrected != 0 || a.corrected_from_previous != 0 ||
                       a.corrected_from_older != 0 || a.corrected_from_denoised != 0;
  const bool needs_z = a.next_from_corrected != 0 || corrected;
  const bool needs_denoised = a.next_from_denoised != 0 || denoised ||
                              (needs_z && a.corrected_from_denoised != 0);
  const auto unless = [](bool read, View& tensor) {
    if (!read) {
      tensor.data = nullptr;
    }
  };
  unless((needs_denoised && a.denoised_from_latents != 0) || (needs_z && !args.has_corrector), args.latents);
  unless((needs_denoised && a.denoised_from_output != 0) || a.next_from_output != 0, args.conditional);
  unless(args.conditional.data, args.unconditional);
  unless((needs_z && a.corrected_from_previous != 0) || a.next_from_previous != 0, args.previous);
  unless((needs_z && a.corrected_from_older != 0) || a.next_from_older != 0, args.older);
  unless(needs_z && a.corrected_from_corrected != 0, args.corrected_before);
  unless(a.next_from_noise != 0, args.noise);
  if (a.next_from_noise == 0) {
    args.seeds = nullptr;
  }
  unless(a.known_from_latents != 0, args.known);
  unless(known && a.known_from_noise != 0, args.known_noise);
  return args;
}

}  // namespace gbci

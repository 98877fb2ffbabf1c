#include "blend_step.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/describe.h"
#include "common/parallel.h"
#include "common/philox_draw.h"
#include "rows.h"
#include "tiles.h"

namespace gbci {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace {

std::string device_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
}

void check_device(const char* name, const Tensor& tensor, const Tensor& latents) {
  STD_TORCH_CHECK(tensor.is_cpu() == latents.is_cpu() && tensor.get_device_index() == latents.get_device_index(),
                  name, " must be on ", device_name(latents), " like latents, got ", device_name(tensor));
}

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.equals(shape), name, " must have shape ", describe(shape), ", got ", describe(sizes));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected, const char* like) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " must be ", toString(expected), like, ", got ",
                  toString(tensor.scalar_type()));
}

enum class Use { kRead, kWrite };

// The strides of a tensor. Its dtype and shape have been checked.
View view(const char* name, const Tensor& tensor, Use use) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  const bool one_row = size[2] == 1, one_column = size[3] == 1;
  STD_TORCH_CHECK(one_row || one_column || stride[2] == size[3] * stride[3], name,
                  " must be NCHW, channels-last or a slice of their channels, so that H and W flatten; got shape ",
                  describe(size), " with strides ", describe(stride));
  View result;
  result.batch = size[0] == 1 ? 0 : stride[0];
  result.channel = size[1] == 1 ? 0 : stride[1];
  result.position = one_row && one_column ? 1 : one_column ? stride[2] : stride[3];
  result.dtype = tensor.scalar_type();
  if (use == Use::kWrite) {
    for (size_t axis = 0; axis < 4; ++axis) {
      STD_TORCH_CHECK(size[axis] == 1 || stride[axis] != 0, name, " is written and must not be expanded; got shape ",
                      describe(size), " with strides ", describe(stride));
    }
    result.data = tensor.mutable_data_ptr();
  } else {
    result.data = const_cast<void*>(tensor.const_data_ptr());
  }
  return result;
}

// Checks that a tensor is there if its coefficient is not 0.
void check_given(const char* tensor, bool given, std::initializer_list<std::pair<const char*, double>> coefficients) {
  for (const auto& [name, value] : coefficients) {
    STD_TORCH_CHECK(given || value == 0, tensor, " must be given where ", name, " is not 0, got ", value);
  }
}

StepCoefficients<double> check_coefficients(const std::vector<double>& values, bool is_double) {
  constexpr size_t kCount = sizeof(StepCoefficients<double>) / sizeof(double);
  STD_TORCH_CHECK(values.size() == kCount, "coefficients must be ", kCount, " numbers, got ", values.size());
  const auto finite = [is_double](const char* name, double value) {
    STD_TORCH_CHECK(std::isfinite(is_double ? value : static_cast<float>(value)), name, " must be finite, got ",
                    value);
    return value;
  };
  auto value = values.begin();
#define GBCI_FIELD(name) finite(#name, *value++),
  return {GBCI_STEP_COEFFICIENTS(GBCI_FIELD)};  // braces evaluate from left to right
#undef GBCI_FIELD
}

// Clears the coefficients of every sum that is not needed, and then the view of every tensor without a coefficient.
void drop_what_nothing_needs(BlendStep& args) {
  StepCoefficients<double>& a = args.coefficients;
  const auto drop = [](bool dropped, auto&... coefficients) { ((coefficients = dropped ? 0 : coefficients), ...); };
  const auto read = [](View& tensor, auto... coefficients) {
    const bool used = ((coefficients != 0) || ...);
    tensor.data = used ? tensor.data : nullptr;
  };
  drop(!args.corrected.data && a.next_from_corrected == 0, a.corrected_from_corrected, a.corrected_from_previous,
       a.corrected_from_older, a.corrected_from_denoised);
  drop(!args.denoised.data && a.next_from_denoised == 0 && a.corrected_from_denoised == 0, a.denoised_from_latents,
       a.denoised_from_output);
  drop(!args.weight.data, a.known_from_latents, a.known_from_noise);
  drop(!args.model_input.data, a.input_from_latents);
  args.has_corrector = a.corrected_from_corrected != 0 || a.corrected_from_previous != 0 ||
                       a.corrected_from_older != 0 || a.corrected_from_denoised != 0;
  const bool z_is_latents = !args.has_corrector && (args.corrected.data || a.next_from_corrected != 0);
  read(args.latents, a.denoised_from_latents, z_is_latents);
  read(args.conditional, a.denoised_from_output, a.next_from_output);
  read(args.unconditional, a.denoised_from_output, a.next_from_output);
  read(args.previous, a.corrected_from_previous, a.next_from_previous);
  read(args.older, a.corrected_from_older, a.next_from_older);
  read(args.corrected_before, a.corrected_from_corrected);
  read(args.noise, a.next_from_noise);
  read(args.known, a.known_from_latents);
  read(args.known_noise, a.known_from_noise);
  if (a.next_from_noise == 0) {
    args.seeds = nullptr;
  }
  if (!args.unconditional.data) {
    args.guidance_rescale = 0;
  }
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
                  describe(latents.sizes()));
  STD_TORCH_CHECK(latents.numel() > 0, "latents must not be empty, got ", describe(latents.sizes()));
  STD_TORCH_CHECK(!is_double || latents.is_cpu(), "latents must be Float, BFloat16 or Half on ", device_name(latents),
                  ", got Double");
  STD_TORCH_CHECK(model == state || is_float, "conditional must be ", toString(state), " like latents, got ",
                  toString(model));
  STD_TORCH_CHECK(model == state || model == ScalarType::BFloat16 || model == ScalarType::Half,
                  "conditional must be Float, BFloat16 or Half beside Float latents, got ", toString(model));

  BlendStep args;
  const std::vector<int64_t> shape(latents.sizes().begin(), latents.sizes().end());
  args.batch = shape[0], args.channels = shape[1], args.positions = shape[2] * shape[3];
  args.latents = view("latents", latents, Use::kRead);

  const auto take = [&](const char* name, const Tensor& tensor, ScalarType dtype, const char* like, Use use) {
    check_device(name, tensor, latents);
    check_dtype(name, tensor, dtype, like);
    check_shape(name, tensor, shape);
    return view(name, tensor, use);
  };
  const auto take_state = [&](const char* name, const Optional& tensor, Use use) {
    return tensor ? take(name, *tensor, state, " like latents", use) : View{};
  };
  args.conditional = take("conditional", conditional, model, "", Use::kRead);
  if (unconditional) {
    check_device("unconditional", *unconditional, latents);
    check_dtype("unconditional", *unconditional, model, " like conditional");
    const std::vector<int64_t> broadcast = {1, shape[1], shape[2], shape[3]};
    STD_TORCH_CHECK(unconditional->sizes().equals(shape) || unconditional->sizes().equals(broadcast),
                    "unconditional must have shape ", describe(shape), " or ", describe(broadcast), ", got ",
                    describe(unconditional->sizes()));
    args.unconditional = view("unconditional", *unconditional, Use::kRead);
  }
  args.previous = take_state("previous", previous, Use::kRead);
  args.denoised = args.older = take_state("denoised", denoised, Use::kWrite);
  args.corrected = args.corrected_before = take_state("corrected", corrected, Use::kWrite);
  args.noise = take_state("noise", noise, Use::kRead);
  if (seeds) {
    check_device("seeds", *seeds, latents);
    STD_TORCH_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->dim() == 1 && seeds->size(0) == shape[0],
                    "seeds must be a Long tensor [", shape[0], "], got ", toString(seeds->scalar_type()), " ",
                    describe(seeds->sizes()));
    STD_TORCH_CHECK(args.channels * args.positions <= int64_t{1} << 34,
                    "a sample must have at most 2^34 elements where seeds draw its noise, got ", describe(shape));
    args.seeds = seeds->const_data_ptr<int64_t>();
    args.seed_stride = seeds->stride(0);
  }
  args.known = take_state("known", known, Use::kRead);
  args.known_noise = take_state("known_noise", known_noise, Use::kRead);
  if (weight) {
    check_device("weight", *weight, latents);
    check_dtype("weight", *weight, is_double ? ScalarType::Double : ScalarType::Float, "");
    check_shape("weight", *weight, {shape[0], 1, shape[2], shape[3]});
    args.weight = view("weight", *weight, Use::kRead);
  }
  if (model_input) {
    args.model_input = take("model_input", *model_input, model, " like conditional", Use::kWrite);
  }
  args.out = take("out", out, state, " like latents", Use::kWrite);

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
  args.guidance_rescale = guidance_rescale;
  args.step = static_cast<uint32_t>(step), args.stream = static_cast<uint32_t>(stream);

  STD_TORCH_CHECK(!(noise && seeds), "noise and seeds were both given; expected one of them");
  STD_TORCH_CHECK(known.has_value() == weight.has_value(),
                  known ? "known was given without weight" : "weight was given without known", "; expected both");
  const StepCoefficients<double>& a = args.coefficients;
  check_given("corrected", corrected.has_value(), {{"corrected_from_corrected", a.corrected_from_corrected}});
  check_given("previous", previous.has_value(),
              {{"corrected_from_previous", a.corrected_from_previous}, {"next_from_previous", a.next_from_previous}});
  check_given("denoised", denoised.has_value(),
              {{"corrected_from_older", a.corrected_from_older}, {"next_from_older", a.next_from_older}});
  check_given("noise or seeds", noise || seeds, {{"next_from_noise", a.next_from_noise}});
  check_given("known_noise", known_noise || !known, {{"known_from_noise", a.known_from_noise}});

  drop_what_nothing_needs(args);
  return args;
}

namespace {

// The factor on the guided output of a sample (Lin et al. 2024, eq. 15 and 16).
template <class State, class Model>
RealOf<State> rescale_factor(const BlendStep& args, const Grid& grid, int64_t sample, Tiles<State, Model>& tiles) {
  using Real = RealOf<State>;
  const RowKernels<State, Model> kernels = row_kernels<State, Model>();
  const Real guidance_scale = static_cast<Real>(args.guidance_scale);
  ShiftedSums conditional, guided;
  const int64_t begin = sample * grid.per_sample, end = begin + grid.per_sample;
  for (int64_t index = begin; index < end; index += grid.runs) {
    // Each channel is summed separately, for any number of channels per tile, and then added to the sample's sums.
    ShiftedSums of_channel[kTileChannels], of_guided_channel[kTileChannels];
    for (int64_t run = index; run < index + grid.runs; ++run) {
      const Region region = grid.region(run);
      tiles.open(region);
      for (int64_t row = 0; row < region.channels; ++row) {
        const Rows<State, Model> rows = tiles.rows(row, 0);
        if (run == begin && row == 0) {
          kernels.first_output(rows, guidance_scale, &conditional.shift, &guided.shift);
        }
        of_channel[row].shift = conditional.shift, of_guided_channel[row].shift = guided.shift;
        kernels.add_outputs(rows, guidance_scale, region.positions, of_channel[row], of_guided_channel[row]);
      }
    }
    for (int64_t row = 0; row < grid.group; ++row) {
      conditional.add(of_channel[row]);
      guided.add(of_guided_channel[row]);
    }
  }
  const int64_t count = args.channels * args.positions;
  const Real phi = static_cast<Real>(args.guidance_rescale), rest = static_cast<Real>(1 - args.guidance_rescale);
  const Real ratio = static_cast<Real>(conditional.standard_deviation(count)) /
                     static_cast<Real>(guided.standard_deviation(count));
  return phi * ratio + rest;
}

template <class State, class Model>
std::vector<RealOf<State>> rescale_factors(const BlendStep& args) {
  BlendStep outputs{};  // only the model's outputs, so that no other tensor is loaded
  outputs.batch = args.batch, outputs.channels = args.channels, outputs.positions = args.positions;
  outputs.conditional = args.conditional, outputs.unconditional = args.unconditional;
  const Grid grid(outputs);
  std::vector<RealOf<State>> factors(args.batch);
  torch::stable::parallel_for(0, args.batch, 1, [&](int64_t begin, int64_t end) {
    Tiles<State, Model> tiles(outputs);
    for (int64_t sample = begin; sample < end; ++sample) {
      factors[sample] = rescale_factor(args, grid, sample, tiles);
    }
  });
  return factors;
}

// Number of normals drawn at once. A small number lets drawing overlap with memory access (512 takes 15 % longer).
constexpr int64_t kDrawn = 256;

// Updates a row of a tile, with the noise that the row needs.
template <class State, class Model>
void draw_and_blend(
    const BlendStep& args, const Equations<RealOf<State>>& equations, const RowKernels<State, Model>& kernels,
    Tiles<State, Model>& tiles, const Region& region, int64_t row, RealOf<State> factor) {
  const uint64_t seed = static_cast<uint64_t>(args.seeds[region.sample * args.seed_stride]);
  const int64_t first = (region.channel + row) * args.positions + region.position;  // in the sample
  RealOf<State> drawn[kDrawn];
  for (int64_t position = 0, length; position < region.positions; position += length) {
    const int64_t block = (first + position) / 4, skipped = (first + position) % 4;
    length = std::min(kDrawn - skipped, region.positions - position);
    draw_normals(seed, static_cast<uint32_t>(block), static_cast<uint32_t>((skipped + length + 3) / 4), args.step,
                 args.stream, drawn);
    Rows<State, Model> rows = tiles.rows(row, position);
    rows.drawn = drawn + skipped;
    kernels.blend(equations, rows, factor, length);
  }
}

template <class State, class Model>
void run(const BlendStep& args) {
  using Real = RealOf<State>;
  const Equations<Real> equations(args);
  const RowKernels<State, Model> kernels = row_kernels<State, Model>();
  const std::vector<Real> factors =
      args.guidance_rescale != 0 ? rescale_factors<State, Model>(args) : std::vector<Real>(args.batch, 1);
  const Grid grid(args);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (grid.group * grid.width));
  torch::stable::parallel_for(0, args.batch * grid.per_sample, grain, [&](int64_t begin, int64_t end) {
    Tiles<State, Model> tiles(args);
    for (int64_t index = begin; index < end; ++index) {
      const Region region = grid.region(index);
      tiles.open(region);
      for (int64_t row = 0; row < region.channels; ++row) {
        if (args.seeds) {
          draw_and_blend(args, equations, kernels, tiles, region, row, factors[region.sample]);
        } else {
          kernels.blend(equations, tiles.rows(row, 0), factors[region.sample], region.positions);
        }
      }
      tiles.close();
    }
  });
}

void blend_step_cpu(
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
  const BlendStep args = check_blend_step(
      latents, conditional, unconditional, previous, denoised, corrected, noise, seeds, known, known_noise, weight,
      model_input, out, coefficients, clip, guidance_scale, guidance_rescale, step, stream);
  const ScalarType state = args.out.dtype, model = args.conditional.dtype;
  if (state == ScalarType::Double) {
    run<double, double>(args);
  } else if (state == ScalarType::BFloat16) {
    run<BFloat16, BFloat16>(args);
  } else if (state == ScalarType::Half) {
    run<Half, Half>(args);
  } else if (model == ScalarType::BFloat16) {
    run<float, BFloat16>(args);
  } else if (model == ScalarType::Half) {
    run<float, Half>(args);
  } else {
    run<float, float>(args);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gbci_fast, m) {
  m.def(
      "blend_step(Tensor latents, Tensor conditional, Tensor? unconditional, Tensor? previous, Tensor(a!)? denoised, "
      "Tensor(b!)? corrected, Tensor? noise, Tensor? seeds, Tensor? known, Tensor? known_noise, Tensor? weight, "
      "Tensor(c!)? model_input, Tensor(d!) out, float[] coefficients, float? clip, float guidance_scale, "
      "float guidance_rescale, int step, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CPU, m) {
  m.impl("blend_step", TORCH_BOX(&blend_step_cpu));
}

}  // namespace gbci

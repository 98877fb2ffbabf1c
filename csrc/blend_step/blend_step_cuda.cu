#include "blend_step.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "common/philox.h"
#include "cuda_lanes.h"

namespace gbci {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr int kRescaleThreads = 1024;  // with rescaled guidance, where one thread block has a whole sample
constexpr int kWarp = 32;

// A thread updates kLanes neighbors along the inner axis, so that neighboring threads touch neighboring memory. The
// inner axis is the positions if every tensor is NCHW, and the channels if a tensor is channels-last.
struct Arguments {
  Operand latents, conditional, unconditional, previous, older, corrected_before, noise, known, known_noise, weight;
  Operand denoised, corrected, model_input, out;
  const int64_t* seeds;
  int64_t seed_stride;
  uint32_t batch;
  uint32_t items;       // per sample, kLanes elements each
  Divisor groups;       // items along the inner axis
  uint32_t quad_shift;  // 2: threads 4 n .. 4 n + 3 take neighbors along the outer axis; otherwise 0
  uint32_t element_outer, element_inner;  // strides of an element's index in [C, H, W]
  uint32_t step, stream;
  bool has_history, has_clip, has_corrector;
  StepCoefficients<float> coefficients;
  float clip, guidance_scale, rescale, keep;  // rescale and keep: phi and 1 - phi
};

template <int kLanes>
__device__ __forceinline__ Place locate(const Arguments& a, uint32_t sample, uint32_t item) {
  const uint32_t quad = item >> a.quad_shift, row = divide(quad, a.groups);
  const uint32_t outer = (row << a.quad_shift) + item - (quad << a.quad_shift);
  return {sample, outer, (quad - row * a.groups.divisor) * kLanes};
}

// The start of a sum: -0, because 0 + -0 would lose the sign of a first term of -0.
template <int kLanes>
__device__ __forceinline__ Values<kLanes> nothing() {
  Values<kLanes> values;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    values.lane[i] = -0.0f;
  }
  return values;
}

template <int kLanes>
__device__ __forceinline__ void add(Values<kLanes>& sum, float coefficient, const Values<kLanes>& term) {
  if (coefficient != 0) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      sum.lane[i] += coefficient * term.lane[i];
    }
  }
}

// The guided model output, not yet rescaled.
template <int kLanes>
__device__ __forceinline__ Values<kLanes> guide(
    const Arguments& a, const Values<kLanes>& conditional, const Values<kLanes>& unconditional) {
  if (a.unconditional.access == Access::kAbsent) {
    return conditional;
  }
  Values<kLanes> m;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const float u = unconditional.lane[i];
    m.lane[i] = u + a.guidance_scale * (conditional.lane[i] - u);
  }
  return m;
}

// The normals of a thread's lanes, from Philox blocks of four neighboring positions.
__device__ __forceinline__ Values<1> draw(const Arguments& a, const Place& at, Values<1>) {
  const uint64_t seed = static_cast<uint64_t>(a.seeds[static_cast<int64_t>(at.sample) * a.seed_stride]);
  const uint32_t element = at.outer * a.element_outer + at.inner * a.element_inner;
  const Normals4 n = philox_normal4(seed, element / 4, a.step, a.stream);
  const float low = element % 2 == 0 ? n.n0 : n.n1, high = element % 2 == 0 ? n.n2 : n.n3;
  return {{element % 4 < 2 ? low : high}};
}

__device__ __forceinline__ Values<4> draw(const Arguments& a, const Place& at, Values<4>) {
  const uint64_t seed = static_cast<uint64_t>(a.seeds[static_cast<int64_t>(at.sample) * a.seed_stride]);
  const uint32_t quarter = a.quad_shift ? threadIdx.x % 4 : 0;
  const uint32_t element = (at.outer - quarter) * a.element_outer + (at.inner + quarter) * a.element_inner;
  const Normals4 n = philox_normal4(seed, element / 4, a.step, a.stream);
  float n0 = n.n0, n1 = n.n1, n2 = n.n2, n3 = n.n3;
  if (a.quad_shift) {
    // Thread q of four drew positions 0 .. 3 of channel q, and needs channels 0 .. 3 of position q: a transpose.
    const unsigned four = 0xFu << (threadIdx.x % kWarp / 4 * 4);
    const bool odd = quarter & 1, high = quarter & 2;
    const float n01 = __shfl_xor_sync(four, odd ? n0 : n1, 1), n23 = __shfl_xor_sync(four, odd ? n2 : n3, 1);
    (odd ? n0 : n1) = n01;
    (odd ? n2 : n3) = n23;
    const float n02 = __shfl_xor_sync(four, high ? n0 : n2, 2), n13 = __shfl_xor_sync(four, high ? n1 : n3, 2);
    (high ? n0 : n2) = n02;
    (high ? n1 : n3) = n13;
  }
  return {{n0, n1, n2, n3}};
}

// phi std(conditional) / std(guided) + 1 - phi of a sample, computed by all threads of the block. The sums are float64
// and always in the same order. They add differences to the sample's first element, which avoids cancellation.
template <class M, int kLanes>
__device__ __forceinline__ float rescale_factor(const Arguments& a, uint32_t sample) {
  constexpr int kSums = 4;
  __shared__ double partial[kRescaleThreads / kWarp][kSums];
  double sums[kSums] = {};
  const Place origin = {sample, 0, 0};
  const auto first = convert<M, 1>(load<M, 1, false>(a.conditional, origin));
  const double shift = first.lane[0];
  const double guided_shift = guide(a, first, convert<M, 1>(load<M, 1, false>(a.unconditional, origin))).lane[0];
  for (uint32_t item = threadIdx.x; item < a.items; item += kRescaleThreads) {
    const Place at = locate<kLanes>(a, sample, item);
    const auto conditional_raw = load<M, kLanes, false>(a.conditional, at);
    const auto unconditional_raw = load<M, kLanes, false>(a.unconditional, at);
    const auto conditional = convert<M, kLanes>(conditional_raw);
    const auto m = guide(a, conditional, convert<M, kLanes>(unconditional_raw));
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const double c = conditional.lane[i] - shift, g = m.lane[i] - guided_shift;
      sums[0] += c;
      sums[1] += c * c;
      sums[2] += g;
      sums[3] += g * g;
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], distance);
    }
    if (threadIdx.x % kWarp == 0) {
      partial[threadIdx.x / kWarp][i] = sums[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = 0;
#pragma unroll 1
    for (int warp = 0; warp < kRescaleThreads / kWarp; ++warp) {
      sums[i] += partial[warp][i];
    }
  }
  const double count = static_cast<double>(a.items) * kLanes;
  const double conditional = fmax(sums[1] - sums[0] * sums[0] / count, 0.0) / (count - 1);
  const double guided = fmax(sums[3] - sums[2] * sums[2] / count, 0.0) / (count - 1);
  return a.rescale * (static_cast<float>(sqrt(conditional)) / static_cast<float>(sqrt(guided))) + a.keep;
}

template <class X, class M, int kLanes, bool kVector>
__device__ __forceinline__ void update(const Arguments& a, const Place& at, float factor) {
  using Lanes = Values<kLanes>;
  using RawState = Raw<X, kLanes, kVector>;
  const StepCoefficients<float>& c = a.coefficients;
  // All loads come before the first use, so that they overlap with each other and with drawing the noise.
  const auto latents_raw = load<X, kLanes, kVector>(a.latents, at);
  const auto conditional_raw = load<M, kLanes, kVector>(a.conditional, at);
  const auto unconditional_raw = load<M, kLanes, kVector>(a.unconditional, at);
  RawState previous_raw = {}, older_raw = {}, corrected_raw = {}, noise_raw = {}, known_raw = {}, known_noise_raw = {};
  Stored<float, kLanes> weight = {};
  if (a.has_history) {
    previous_raw = load<X, kLanes, kVector>(a.previous, at);
    older_raw = load<X, kLanes, kVector>(a.older, at);
    corrected_raw = load<X, kLanes, kVector>(a.corrected_before, at);
    noise_raw = load<X, kLanes, kVector>(a.noise, at);
  }
  if (a.weight.access != Access::kAbsent) {
    known_raw = load<X, kLanes, kVector>(a.known, at);
    known_noise_raw = load<X, kLanes, kVector>(a.known_noise, at);
    weight = load<float, kLanes, false>(a.weight, at);  // one channel: stride 0 if the lanes are channels
  }
  const Lanes noise = a.seeds ? draw(a, at, Lanes{}) : convert<X, kLanes>(noise_raw);

  Lanes m = guide(a, convert<M, kLanes>(conditional_raw), convert<M, kLanes>(unconditional_raw));
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    m.lane[i] *= factor;
  }
  const auto latents = convert<X, kLanes>(latents_raw), previous = convert<X, kLanes>(previous_raw);
  const auto older = convert<X, kLanes>(older_raw);
  Lanes denoised = nothing<kLanes>();
  add(denoised, c.denoised_from_latents, latents);
  add(denoised, c.denoised_from_output, m);
  if (a.has_clip) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {  // fmin and fmax would hide a NaN
      const float x = denoised.lane[i];
      denoised.lane[i] = x < -a.clip ? -a.clip : x > a.clip ? a.clip : x;
    }
  }
  store<X, kLanes, kVector>(a.denoised, at, denoised);

  Lanes z = latents;
  if (a.has_corrector) {
    z = nothing<kLanes>();
    add(z, c.corrected_from_corrected, convert<X, kLanes>(corrected_raw));
    add(z, c.corrected_from_previous, previous);
    add(z, c.corrected_from_older, older);
    add(z, c.corrected_from_denoised, denoised);
  }
  store<X, kLanes, kVector>(a.corrected, at, z);

  Lanes next = nothing<kLanes>();
  add(next, c.next_from_corrected, z);
  add(next, c.next_from_output, m);
  add(next, c.next_from_denoised, denoised);
  add(next, c.next_from_previous, previous);
  add(next, c.next_from_older, older);
  add(next, c.next_from_noise, noise);
  if (a.weight.access != Access::kAbsent) {
    Lanes k = nothing<kLanes>();
    add(k, c.known_from_latents, convert<X, kLanes>(known_raw));
    add(k, c.known_from_noise, convert<X, kLanes>(known_noise_raw));
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float w = weight.lane[i], difference = next.lane[i] - k.lane[i];
      next.lane[i] = w < 0.5f ? k.lane[i] + w * difference : next.lane[i] - difference * (1.0f - w);
    }
  }
  store<X, kLanes, kVector>(a.out, at, next);
  if (a.model_input.access != Access::kAbsent) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      next.lane[i] *= c.input_from_latents;
    }
    store<M, kLanes, kVector>(a.model_input, at, next);
  }
}

template <class X, class M, int kLanes, bool kVector>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) blend_step_kernel(const __grid_constant__ Arguments a) {
  const uint32_t sample = blockIdx.z * gridDim.y + blockIdx.y, item = blockIdx.x * kThreads + threadIdx.x;
  if (sample < a.batch && item < a.items) {
    update<X, M, kLanes, kVector>(a, locate<kLanes>(a, sample, item), 1.0f);
  }
}

// The step with rescaled guidance: a block has a whole sample, and reads the sample's model outputs twice.
template <class X, class M, int kLanes>
__global__ void __launch_bounds__(kRescaleThreads) blend_step_rescale_kernel(const __grid_constant__ Arguments a) {
  const uint32_t sample = blockIdx.x;
  const float factor = rescale_factor<M, kLanes>(a, sample);
  for (uint32_t item = threadIdx.x; item < a.items; item += kRescaleThreads) {
    update<X, M, kLanes, false>(a, locate<kLanes>(a, sample, item), factor);
  }
}

// A view along the kernel's axes.
Operand operand(const View& view, int lanes, bool channels_inner) {
  const int64_t size = view.dtype == ScalarType::Float ? 4 : 2;
  const int64_t batch = view.batch * size, channel = view.channel * size, position = view.position * size;
  STD_TORCH_CHECK(std::max({batch, channel, position}) <= UINT32_MAX,
                  "on CUDA, neighbors along an axis must be less than 4 GiB apart, got strides of ", batch, ", ",
                  channel, " and ", position, " bytes");
  const int64_t outer = channels_inner ? position : channel, inner = channels_inner ? channel : position;
  const bool aligned = (reinterpret_cast<intptr_t>(view.data) | batch | outer) % (lanes * size) == 0;
  const Access access = view.data == nullptr        ? Access::kAbsent
                        : inner == size && aligned ? Access::kVector
                                                   : Access::kStrided;
  return {static_cast<char*>(view.data), static_cast<uint32_t>(batch), static_cast<uint32_t>(outer),
          static_cast<uint32_t>(inner), access};
}

// Whether a tensor is channels-last. The weight has one channel, and counts as either.
bool has_channels_last(const BlendStep& s) {
  for (const View& view : {s.latents, s.conditional, s.unconditional, s.previous, s.older, s.corrected_before, s.noise,
                           s.known, s.known_noise, s.denoised, s.corrected, s.model_input, s.out}) {
    if (view.data != nullptr && view.channel == 1 && view.position != 1) {
      return true;
    }
  }
  return false;
}

Arguments kernel_arguments(const BlendStep& s, int lanes, bool channels_inner) {
  const auto at = [&](const View& view) { return operand(view, lanes, channels_inner); };
  const auto f = [](double x) { return static_cast<float>(x); };
  Arguments a = {};
  a.latents = at(s.latents);
  a.conditional = at(s.conditional);
  a.unconditional = at(s.unconditional);
  a.previous = at(s.previous);
  a.older = at(s.older);
  a.corrected_before = at(s.corrected_before);
  a.noise = at(s.noise);
  a.known = at(s.known);
  a.known_noise = at(s.known_noise);
  a.weight = at(s.weight);
  a.denoised = at(s.denoised);
  a.corrected = at(s.corrected);
  a.model_input = at(s.model_input);
  a.out = at(s.out);
  a.seeds = s.seeds;
  a.seed_stride = s.seed_stride;
  a.batch = static_cast<uint32_t>(s.batch);
  const auto positions = static_cast<uint32_t>(s.positions), channels = static_cast<uint32_t>(s.channels);
  a.items = positions * channels / lanes;
  a.groups = divisor((channels_inner ? channels : positions) / lanes);
  a.quad_shift = channels_inner && lanes == 4 ? 2 : 0;
  a.element_outer = channels_inner ? 1 : positions;
  a.element_inner = channels_inner ? positions : 1;
  a.step = s.step;
  a.stream = s.stream;
  a.has_history = s.previous.data || s.older.data || s.corrected_before.data || s.noise.data;
  a.has_clip = s.clip.has_value();
  a.has_corrector = s.has_corrector;
  a.coefficients = s.coefficients.map(f);
  a.clip = f(s.clip.value_or(0));
  a.guidance_scale = f(s.guidance_scale);
  a.rescale = f(s.guidance_rescale);
  a.keep = f(1 - s.guidance_rescale);
  return a;
}

template <class X, class M>
void launch(const BlendStep& s, cudaStream_t stream) {
  const bool channels_inner = has_channels_last(s);
  // Four lanes per thread if Philox blocks of four positions divide the axes; otherwise one lane, whose thread draws
  // the whole block.
  const bool four = s.positions % 4 == 0 && (!channels_inner || s.channels % 4 == 0);
  const Arguments a = kernel_arguments(s, four ? 4 : 1, channels_inner);
  bool vector = four;
  for (const Operand& operand : {a.latents, a.conditional, a.unconditional, a.previous, a.older, a.corrected_before,
                                 a.noise, a.known, a.known_noise, a.denoised, a.corrected, a.model_input, a.out}) {
    vector = vector && operand.access != Access::kStrided;
  }
  if (s.guidance_rescale != 0 && s.unconditional.data != nullptr) {
    const auto kernel = four ? blend_step_rescale_kernel<X, M, 4> : blend_step_rescale_kernel<X, M, 1>;
    kernel<<<a.batch, kRescaleThreads, 0, stream>>>(a);
  } else {
    const auto kernel = vector ? blend_step_kernel<X, M, 4, true>
                        : four ? blend_step_kernel<X, M, 4, false>
                               : blend_step_kernel<X, M, 1, false>;
    const uint32_t rows = std::min<uint32_t>(a.batch, 65535);
    kernel<<<dim3((a.items + kThreads - 1) / kThreads, rows, (a.batch + rows - 1) / rows), kThreads, 0, stream>>>(a);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void blend_step_cuda(
    const Tensor& latents,
    const Tensor& conditional,
    const std::optional<Tensor>& unconditional,
    const std::optional<Tensor>& previous,
    const std::optional<Tensor>& denoised,
    const std::optional<Tensor>& corrected,
    const std::optional<Tensor>& noise,
    const std::optional<Tensor>& seeds,
    const std::optional<Tensor>& known,
    const std::optional<Tensor>& known_noise,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& model_input,
    const Tensor& out,
    const std::vector<double>& coefficients,
    std::optional<double> clip,
    double guidance_scale,
    double guidance_rescale,
    int64_t step,
    int64_t stream) {
  const BlendStep s = check_blend_step(latents, conditional, unconditional, previous, denoised, corrected, noise, seeds,
                                       known, known_noise, weight, model_input, out, coefficients, clip,
                                       guidance_scale, guidance_rescale, step, stream);
  STD_TORCH_CHECK(s.batch <= INT32_MAX && s.channels * s.positions <= INT32_MAX, "on CUDA, batch and elements of a ",
                  "sample must be at most 2^31 - 1, got ", s.batch, " and ", s.channels * s.positions);
  const int32_t device = latents.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto cuda_stream = static_cast<cudaStream_t>(current);
  const ScalarType state = latents.scalar_type(), model = conditional.scalar_type();
  if (state == ScalarType::BFloat16) {
    launch<__nv_bfloat16, __nv_bfloat16>(s, cuda_stream);
  } else if (state == ScalarType::Half) {
    launch<__half, __half>(s, cuda_stream);
  } else if (model == ScalarType::BFloat16) {
    launch<float, __nv_bfloat16>(s, cuda_stream);
  } else if (model == ScalarType::Half) {
    launch<float, __half>(s, cuda_stream);
  } else {
    launch<float, float>(s, cuda_stream);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CUDA, m) {
  m.impl("blend_step", TORCH_BOX(&blend_step_cuda));
}

}  // namespace gbci

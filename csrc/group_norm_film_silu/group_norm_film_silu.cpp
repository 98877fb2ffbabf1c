// group_norm_film_silu on the CPU; kernels/ops/group_norm_film_silu.py defines it.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/describe.h"
#include "common/parallel.h"

namespace gbci {

namespace {

// Mean of some elements, and the sum of their squared distances to it.
struct Moments {
  float mean, squares;
};

// y = (x - mean) factor + term
struct Affine {
  float mean, factor, term;
};

template <class Stored>
struct Loops {
  void (*row_moments)(const Stored* row, int64_t count, Moments* moments);
  void (*column_moments)(const Stored* elements, int64_t positions, int64_t channels, Moments* moments);
  // Without and with SiLU.
  void (*apply_row[2])(const Stored* row, int64_t count, Affine affine, Stored* out);
  void (*apply_columns[2])(
      const Stored* elements, int64_t positions, int64_t channels, const float* means, const float* factors,
      const float* terms, Stored* out);
};

}  // namespace

}  // namespace gbci

#define GBCI_CLONE_FILE "group_norm_film_silu/group_norm_film_silu_clone.h"
#include "common/for_each_instruction_set.h"

namespace gbci {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct GroupNorm {
  int64_t batch, halves, channels, positions, groups;
  bool channels_last, silu;
  double eps;
  Tensor x, out;
  std::optional<Tensor> weight, bias, scale, shift;
};

// A unit of work: a number of positions of all channels, or of one channel if its positions are neighbors. A unit is
// read twice, so it fits into the cache. Its size depends only on the shape, so that sums do not depend on the threads.
int64_t unit_positions(const GroupNorm& op) { return op.channels_last ? 128 : 4096; }

template <class Stored>
std::vector<float> floats(const std::optional<Tensor>& tensor, int64_t count, float otherwise) {
  std::vector<float> values(count, otherwise);
  if (tensor) {
    std::transform(static_cast<const Stored*>(tensor->const_data_ptr()),
                   static_cast<const Stored*>(tensor->const_data_ptr()) + count, values.begin(),
                   [](Stored x) { return static_cast<float>(x); });
  }
  return values;
}

// Chan et al. 1983: combines the moments of parts.
Affine standardize(const Moments* moments, const int64_t* counts, int64_t parts, int64_t stride, int64_t channels,
                   int64_t count, double eps) {
  double mean = 0, squares = 0;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t c = 0; c < channels; ++c) {
      mean += static_cast<double>(counts[part]) * moments[part * stride + c].mean;
    }
  }
  mean /= count;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t c = 0; c < channels; ++c) {
      const Moments& of_part = moments[part * stride + c];
      squares += of_part.squares + counts[part] * (of_part.mean - mean) * (of_part.mean - mean);
    }
  }
  return {static_cast<float>(mean), static_cast<float>(1 / std::sqrt(squares / count + eps)), 0};
}

template <class Stored>
void run(const GroupNorm& op) {
  static const Loops<Stored> loops = GBCI_WIDEST(loops<Stored>());
  const Stored* x = static_cast<const Stored*>(op.x.const_data_ptr());
  Stored* out = static_cast<Stored*>(op.out.mutable_data_ptr());
  const int64_t C = op.channels, P = op.positions, width = unit_positions(op), parts = (P + width - 1) / width;
  const int64_t samples = op.batch * op.halves, group = C / op.groups;
  std::vector<int64_t> counts(parts, width);
  counts.back() = P - (parts - 1) * width;

  std::vector<Moments> moments(op.batch * parts * C);
  const int64_t rows = op.channels_last ? parts : C * parts;  // per sample
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (op.channels_last ? width * C : std::min(width, P)));
  const auto each = [&](int64_t count, const auto& body) {
    torch::stable::parallel_for(0, count * rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t part = unit % parts, channel = op.channels_last ? 0 : unit % rows / parts;
        body(unit / rows, channel, part);
      }
    });
  };
  const auto at = [&](int64_t sample, int64_t channel, int64_t part) {
    return (sample * C + channel) * P + part * width * (op.channels_last ? C : 1);
  };
  each(op.batch, [&](int64_t sample, int64_t channel, int64_t part) {
    Moments* of_part = &moments[(sample * parts + part) * C + channel];
    const Stored* elements = x + at(sample, channel, part);
    if (op.channels_last) {
      loops.column_moments(elements, counts[part], C, of_part);
    } else {
      loops.row_moments(elements, counts[part], of_part);
    }
  });

  std::vector<float> means(op.batch * C);
  const auto weight = floats<Stored>(op.weight, C, 1), bias = floats<Stored>(op.bias, C, 0);
  auto factors = floats<Stored>(op.scale, samples * C, 1), terms = floats<Stored>(op.shift, samples * C, 0);
  torch::stable::parallel_for(0, op.batch * op.groups, 64, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t sample = index / op.groups, first = index % op.groups * group;
      const Affine standard = standardize(&moments[sample * parts * C + first], counts.data(), parts, C, group,
                                          group * P, op.eps);
      for (int64_t c = first; c < first + group; ++c) {
        means[sample * C + c] = standard.mean;
        for (int64_t half = 0; half < op.halves; ++half) {
          const int64_t i = (half * op.batch + sample) * C + c;
          terms[i] += factors[i] * bias[c];
          factors[i] *= weight[c] * standard.factor;
        }
      }
    }
  });

  each(samples, [&](int64_t sample, int64_t channel, int64_t part) {
    const Stored* elements = x + at(sample % op.batch, channel, part);
    Stored* to = out + at(sample, channel, part);
    const int64_t i = sample * C + channel, mean = sample % op.batch * C + channel;
    if (op.channels_last) {
      loops.apply_columns[op.silu](elements, counts[part], C, &means[mean], &factors[i], &terms[i], to);
    } else {
      loops.apply_row[op.silu](elements, counts[part], {means[mean], factors[i], terms[i]}, to);
    }
  });
}

bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (x.size(axis) != 1 && x.stride(axis) != expected) {
      return false;
    }
    expected *= x.size(axis);
  }
  return true;
}

void group_norm_film_silu_cpu(
    const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    double eps, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool silu, const Tensor& out) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "x must be Float, BFloat16 or Half, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be [B, C, H, W] and not empty, got ", describe(x.sizes()));
  const int64_t batch = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(num_groups >= 1 && channels % num_groups == 0, "num_groups must divide x's ", channels,
                  " channels, got ", num_groups);
  const bool channels_last = !x.is_contiguous();
  STD_TORCH_CHECK(!channels_last || is_channels_last(x), "x must be contiguous or channels-last");
  STD_TORCH_CHECK(out.scalar_type() == dtype && out.dim() == 4 && out.size(0) % batch == 0 && out.size(0) > 0 &&
                      out.size(1) == channels && out.size(2) == x.size(2) && out.size(3) == x.size(3) &&
                      (channels_last ? is_channels_last(out) : out.is_contiguous()),
                  "out must be of x's dtype, layout and shape, times a number of halves, got ", describe(out.sizes()));
  const auto check = [&](const char* name, const std::optional<Tensor>& tensor, int64_t count) {
    STD_TORCH_CHECK(!tensor || (tensor->scalar_type() == dtype && tensor->numel() == count && tensor->is_contiguous()),
                    name, " must be contiguous, of x's dtype and ", count, " elements");
  };
  check("weight", weight, channels);
  check("bias", bias, channels);
  check("scale", scale, out.size(0) * channels);
  check("shift", shift, out.size(0) * channels);
  const GroupNorm op = {
      .batch = batch,
      .halves = out.size(0) / batch,
      .channels = channels,
      .positions = x.size(2) * x.size(3),
      .groups = num_groups,
      .channels_last = channels_last,
      .silu = silu,
      .eps = eps,
      .x = x,
      .out = out,
      .weight = weight,
      .bias = bias,
      .scale = scale,
      .shift = shift,
  };
  if (dtype == ScalarType::Float) {
    run<float>(op);
  } else if (dtype == ScalarType::BFloat16) {
    run<BFloat16>(op);
  } else {
    run<Half>(op);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gbci_fast, m) {
  m.def(
      "group_norm_film_silu_out(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
      "Tensor? shift, bool silu, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CPU, m) {
  m.impl("group_norm_film_silu_out", TORCH_BOX(&group_norm_film_silu_cpu));
}

}  // namespace gbci

#include "mask_to_latent.h"

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/describe.h"
#include "common/parallel.h"

namespace gbci {

namespace {

struct Loops {
  void (*see_bytes)(const uint8_t* row, int64_t stride, int64_t num_pixels, uint8_t* seen);
  void (*see_floats)(const float* row, int64_t stride, int64_t num_pixels, uint8_t* seen);
  void (*slide_max)(const float* values, int64_t count, int64_t width, float* out);
  void (*slide_sum)(const float* values, int64_t count, int64_t width, float* out);
  void (*take_max)(const float* values, int64_t width, float* out);
  void (*add)(const float* values, int64_t width, float* out);
  void (*divide)(float divisor, int64_t width, float* out);
};

}  // namespace

}  // namespace gbci

#define GBCI_CLONE_FILE "mask_to_latent/mask_to_latent_clone.h"
#include "common/for_each_instruction_set.h"

namespace gbci {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

MaskToLatent check_mask_to_latent(const Tensor& mask, int64_t factor, int64_t feather, int64_t halo) {
  const ScalarType dtype = mask.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte || dtype == ScalarType::Float,
                  "mask must be bool, uint8 or float32, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(mask.dim() == 4 && mask.size(1) == 1, "mask must be [B, 1, H, W], got ", describe(mask.sizes()));
  STD_TORCH_CHECK(mask.numel() > 0, "mask must hold at least one pixel, got ", describe(mask.sizes()));
  STD_TORCH_CHECK(factor >= 1, "factor must be at least 1, got ", factor);
  STD_TORCH_CHECK(mask.size(2) % factor == 0 && mask.size(3) % factor == 0,
                  "mask's height and width must be divisible by factor ", factor, ", got ", mask.size(2), " and ",
                  mask.size(3));
  STD_TORCH_CHECK(feather >= 0 && feather < 1 << 16, "feather must be from 0 to 65535, got ", feather);
  STD_TORCH_CHECK(halo >= 0 && halo <= INT32_MAX, "halo must be from 0 to 2^31 - 1, got ", halo);
  const int64_t batch = mask.size(0), height = mask.size(2) / factor, width = mask.size(3) / factor;
  STD_TORCH_CHECK(width <= INT32_MAX / height, "a mask may have at most 2^31 - 1 latent cells, got ", height, " x ",
                  width);
  return {
      .batch = batch,
      .height = height,
      .width = width,
      .factor = factor,
      .feather = feather,
      .halo = halo,
      .batch_stride = mask.stride(0),
      .row_stride = mask.stride(2),
      .column_stride = mask.stride(3),
      .of_floats = dtype == ScalarType::Float,
      .mask = mask.const_data_ptr(),
  };
}

std::tuple<Tensor, Tensor, Tensor> mask_to_latent_outputs(const Tensor& mask, const MaskToLatent& op) {
  Tensor latent_mask = torch::stable::new_empty(mask, {op.batch, 1, op.height, op.width}, ScalarType::Float);
  Tensor weight = torch::stable::empty_like(latent_mask);
  return {latent_mask, weight, torch::stable::new_empty(mask, {op.batch, 4}, ScalarType::Long)};
}

namespace {

const Loops loops = GBCI_WIDEST(kLoops);

// cells[x] = whether any of seen[factor x .. factor x + factor - 1] is not 0
void reduce_row(const uint8_t* seen, int64_t factor, int64_t width, float* cells) {
  for (int64_t x = 0; x < width; ++x, seen += factor) {
    uint8_t any = 0;
    for (int64_t i = 0; i < factor; ++i) {
      any |= seen[i];
    }
    cells[x] = any;
  }
}

// Latent rows begin .. end - 1, counted over the whole batch: a cell is 1 if any of its pixels is masked.
template <typename T>
void reduce_rows(
    const MaskToLatent& op, void (*see)(const T*, int64_t, int64_t, uint8_t*), int64_t begin, int64_t end,
    float* latent_mask) {
  const int64_t num_pixels = op.width * op.factor;
  std::vector<uint8_t> seen(num_pixels);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / op.height, y = row % op.height * op.factor;
    const T* pixels = static_cast<const T*>(op.mask) + sample * op.batch_stride + y * op.row_stride;
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t i = 0; i < op.factor; ++i) {
      see(pixels + i * op.row_stride, op.column_stride, num_pixels, seen.data());
    }
    reduce_row(seen.data(), op.factor, op.width, latent_mask + row * op.width);
  }
}

CellBox box_of(const float* cells, int64_t height, int64_t width) {
  CellBox box = {INT32_MAX, INT32_MAX, 0, 0};
  for (int32_t y = 0; y < height; ++y) {
    for (int32_t x = 0; x < width; ++x) {
      if (cells[y * width + x] != 0) {
        box = {std::min(box.xmin, x), std::min(box.ymin, y), std::max(box.xmax, x + 1), y + 1};
      }
    }
  }
  return box;
}

// The weight of one sample: the mask grown by the radius, then averaged along rows, then along columns.
class Feather {
 public:
  explicit Feather(const MaskToLatent& op)
      : height_(op.height), width_(op.width), radius_(op.feather), means_(height_ * width_), grown_(width_),
        padded_(width_ + 2 * radius_) {}

  void operator()(const float* mask, const CellBox& box, float* weight) {
    const int64_t count = 2 * radius_ + 1;
    std::fill_n(weight, height_ * width_, 0.0f);
    if (box.xmax == 0) {
      return;
    }
    std::fill(means_.begin(), means_.end(), 0.0f);
    const int64_t first = box.ymin, last = box.ymax - 1;  // rows with a masked cell; rows near them change
    for (int64_t y = std::max<int64_t>(first - radius_, 0); y <= std::min(last + radius_, height_ - 1); ++y) {
      // Like max_pool2d: the mask is 0 beyond the border.
      float* inner = padded_.data() + radius_;
      std::fill(padded_.begin(), padded_.end(), 0.0f);
      for (int64_t i = std::max(y - radius_, first); i <= std::min(y + radius_, last); ++i) {
        loops.take_max(mask + i * width_, width_, inner);
      }
      loops.slide_max(padded_.data(), count, width_, grown_.data());
      // Like avg_pool2d with a replicated border.
      std::fill_n(padded_.data(), radius_, grown_.front());
      std::copy(grown_.begin(), grown_.end(), inner);
      std::fill_n(inner + width_, radius_, grown_.back());
      loops.slide_sum(padded_.data(), count, width_, &means_[y * width_]);
      loops.divide(static_cast<float>(count), width_, &means_[y * width_]);
    }
    for (int64_t y = std::max<int64_t>(first - 2 * radius_, 0); y <= std::min(last + 2 * radius_, height_ - 1); ++y) {
      for (int64_t i = y - radius_; i <= y + radius_; ++i) {
        loops.add(&means_[std::clamp<int64_t>(i, 0, height_ - 1) * width_], width_, weight + y * width_);
      }
      loops.divide(static_cast<float>(count), width_, weight + y * width_);
    }
  }

 private:
  int64_t height_, width_, radius_;
  std::vector<float> means_, grown_, padded_;
};

std::tuple<Tensor, Tensor, Tensor> mask_to_latent_cpu(
    const Tensor& mask, int64_t factor, int64_t feather, int64_t halo) {
  const MaskToLatent op = check_mask_to_latent(mask, factor, feather, halo);
  auto outputs = mask_to_latent_outputs(mask, op);
  float* latent_mask = std::get<0>(outputs).mutable_data_ptr<float>();
  float* weight = std::get<1>(outputs).mutable_data_ptr<float>();
  int64_t* window = std::get<2>(outputs).mutable_data_ptr<int64_t>();
  const int64_t pixels_per_row = op.width * factor * factor, cells = op.height * op.width;
  torch::stable::parallel_for(
      0, op.batch * op.height, std::max<int64_t>(kGrainElements / pixels_per_row, 1),
      [&](int64_t begin, int64_t end) {
        if (op.of_floats) {
          reduce_rows(op, loops.see_floats, begin, end, latent_mask);
        } else {
          reduce_rows(op, loops.see_bytes, begin, end, latent_mask);
        }
      });
  torch::stable::parallel_for(
      0, op.batch, std::max<int64_t>(kGrainElements / cells, 1), [&](int64_t begin, int64_t end) {
        Feather feather_sample(op);
        for (int64_t sample = begin; sample < end; ++sample) {
          const float* sample_mask = latent_mask + sample * cells;
          const CellBox box = box_of(sample_mask, op.height, op.width);
          feather_sample(sample_mask, box, weight + sample * cells);
          write_window(box, 2 * feather + halo, op.height, op.width, window + 4 * sample);
        }
      });
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gbci_fast, m) {
  m.def("mask_to_latent(Tensor mask, int factor, int feather, int halo) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CPU, m) {
  m.impl("mask_to_latent", TORCH_BOX(&mask_to_latent_cpu));
}

}  // namespace gbci

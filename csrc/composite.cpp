#include "composite.h"

#include <algorithm>
#include <array>
#include <bit>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "describe.h"
#include "half.h"
#include "simd.h"

namespace gbci {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

namespace {

constexpr double kMaxAffine = 2147483648.0;  // 2^31: what a position computed from it is, an int64 can hold

bool on_cpu(const Tensor& tensor) { return tensor.device().type() == torch::headeronly::DeviceType::CPU; }

void check_table(const char* name, const Tensor& table, ScalarType dtype, int64_t columns) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == columns && table.scalar_type() == dtype && on_cpu(table), name,
                  " must be ", toString(dtype), " [B, ", columns, "] on the CPU, got ", toString(table.scalar_type()),
                  " ", describe_shape(table), on_cpu(table) ? "" : " on another device");
}

std::vector<CompositeWindow> check_windows(const Tensor& sizes, const Tensor& affine, int64_t num_pixels) {
  check_table("sizes", sizes, ScalarType::Long, 2);
  check_table("affine", affine, ScalarType::Double, 4);
  STD_TORCH_CHECK(sizes.size(0) > 0, "sizes must hold at least one window, got ", describe_shape(sizes));
  STD_TORCH_CHECK(affine.size(0) == sizes.size(0), "affine must have a row for each of the ", sizes.size(0),
                  " windows, got ", describe_shape(affine));
  const auto at = [](const Tensor& table, auto* data, int64_t row, int64_t column) {
    return data[row * table.stride(0) + column * table.stride(1)];
  };
  std::vector<CompositeWindow> windows;
  int64_t total = 0;
  for (int64_t i = 0; i < sizes.size(0); ++i) {
    std::array<int64_t, 2> size;
    for (int64_t j = 0; j < 2; ++j) {
      size[j] = at(sizes, sizes.const_data_ptr<int64_t>(), i, j);
      STD_TORCH_CHECK(size[j] >= 0 && size[j] <= INT32_MAX, "sizes must be from 0 to 2^31 - 1, got ", size[j],
                      " for window ", i);
    }
    std::array<double, 4> row;
    for (int64_t j = 0; j < 4; ++j) {
      row[j] = at(affine, affine.const_data_ptr<double>(), i, j);
      STD_TORCH_CHECK(std::abs(row[j]) <= kMaxAffine, "affine must be finite and within 2^31, got ", row[j],
                      " for window ", i);
    }
    windows.push_back({.start = total,
                       .height = static_cast<int32_t>(size[0]),
                       .width = static_cast<int32_t>(size[1]),
                       .scale_x = row[0],
                       .offset_x = row[1],
                       .scale_y = row[2],
                       .offset_y = row[3]});
    total += size[0] * size[1];
    STD_TORCH_CHECK(total <= num_pixels, "the windows of sizes hold more pixels than the ", num_pixels, " of pixels");
  }
  STD_TORCH_CHECK(total == num_pixels, "the windows of sizes hold ", total, " pixels, but pixels holds ", num_pixels);
  return windows;
}

void check_flat(const char* name, const Tensor& tensor, int64_t num_pixels) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == num_pixels, name, " must be [N] with N = ", num_pixels,
                  " as in pixels, got ", describe_shape(tensor));
  STD_TORCH_CHECK(num_pixels < 2 || tensor.stride(0) == 1, name, " must be contiguous, got stride ", tensor.stride(0));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& pixels) {
  STD_TORCH_CHECK(tensor.device() == pixels.device(), name, " must be on the device of pixels");
}

Plane check_plane(const char* name, const Tensor& plane, int64_t batch) {
  STD_TORCH_CHECK(plane.dim() == 4 && plane.size(0) == batch && plane.size(1) == 1, name,
                  " must be [B, 1, h, w] with B = ", batch, " as in sizes, got ", describe_shape(plane));
  STD_TORCH_CHECK(plane.size(2) >= 1 && plane.size(3) >= 1 && plane.size(2) < 1 << 30 && plane.size(3) < 1 << 30,
                  name, " must be from 1 to 2^30 - 1 pixels high and wide, got ", describe_shape(plane));
  return {.data = plane.const_data_ptr(), .batch = plane.stride(0), .row = plane.stride(2), .column = plane.stride(3)};
}

}  // namespace

Composite check_composite(
    const Tensor& pixels,
    const Tensor& weight,
    const Tensor& synthetic,
    const std::optional<Tensor>& original,
    const Tensor& sizes,
    const Tensor& affine,
    double white) {
  const ScalarType dtype = pixels.scalar_type(), plane_dtype = synthetic.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Byte || dtype == ScalarType::UInt16 || dtype == ScalarType::Float,
                  "pixels must be uint8, uint16 or float32, got ", toString(dtype));
  STD_TORCH_CHECK(pixels.dim() == 1, "pixels must be [N], got ", describe_shape(pixels));
  check_flat("pixels", pixels, pixels.size(0));
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be float32, got ",
                  toString(weight.scalar_type()));
  check_device("weight", weight, pixels);
  check_flat("weight", weight, pixels.size(0));
  std::vector<CompositeWindow> windows = check_windows(sizes, affine, pixels.size(0));
  STD_TORCH_CHECK(plane_dtype == ScalarType::Float || plane_dtype == ScalarType::BFloat16 ||
                      plane_dtype == ScalarType::Half,
                  "synthetic must be float32, bfloat16 or float16, got ", toString(plane_dtype));
  check_device("synthetic", synthetic, pixels);
  const Plane synthetic_plane = check_plane("synthetic", synthetic, sizes.size(0));
  Plane original_plane;
  if (original.has_value()) {
    STD_TORCH_CHECK(original->scalar_type() == plane_dtype, "template must have the dtype of synthetic, ",
                    toString(plane_dtype), ", got ", toString(original->scalar_type()));
    check_device("template", *original, pixels);
    original_plane = check_plane("template", *original, sizes.size(0));
    STD_TORCH_CHECK(original->size(2) == synthetic.size(2) && original->size(3) == synthetic.size(3),
                    "template must have the shape of synthetic, ", describe_shape(synthetic), ", got ",
                    describe_shape(*original));
  }
  const bool integers = dtype != ScalarType::Float;
  const double brightest = integers ? dtype == ScalarType::Byte ? 255 : 65535 : 1;
  STD_TORCH_CHECK(white >= 1 && white <= brightest && white == std::floor(white), "white must be ",
                  integers ? "a whole number from 1 to " : "", brightest, " for ", toString(dtype), " pixels, got ",
                  white);
  return {
      .num_pixels = pixels.size(0),
      .pixel_dtype = dtype,
      .plane_dtype = plane_dtype,
      .pixels = pixels.const_data_ptr(),
      .weight = weight.const_data_ptr<float>(),
      .synthetic = synthetic_plane,
      .original = original_plane,
      .height = static_cast<int32_t>(synthetic.size(2)),
      .width = static_cast<int32_t>(synthetic.size(3)),
      .white = static_cast<float>(white),
      .windows = std::move(windows),
  };
}

namespace {

constexpr int64_t kGrainElements = 32768;  // ATen's own: less than this is not worth waking a thread for
constexpr int64_t kBlock = 64;             // pixels that are copied or painted as one

GBCI_INLINE bool any_weight(const float* weight, int64_t count) {
  uint32_t bits = 0;
  for (int64_t x = 0; x < count; ++x) {
    bits |= std::bit_cast<uint32_t>(weight[x]) << 1;  // without the sign
  }
  return bits != 0;
}

GBCI_SIMD_CLONES bool has_weight(const float* weight, int64_t count) { return any_weight(weight, count); }

template <typename Value>
GBCI_INLINE float as_float(Value value) {
  if constexpr (std::is_same_v<Value, float>) {
    return value;
  } else {
    return widen(value);
  }
}

// out[i] = white (synthetic - original) or, without an original, white synthetic, in column first + i of a model row;
// beyond the row's ends, that of the end. The 0 is added to leave no -0, as tap() does.
template <typename Value, bool kIsChange>
GBCI_SIMD_CLONES void load_columns(
    const void* synthetic_row, int64_t synthetic_stride, const void* original_row, int64_t original_stride, float white,
    int64_t width, int64_t first, int64_t count, float* __restrict out) {
  const Value* synthetic = static_cast<const Value*>(synthetic_row);
  const Value* original = static_cast<const Value*>(original_row);
  const auto load = [=](int64_t i) __attribute__((always_inline)) {
    float value = as_float(synthetic[i * synthetic_stride]);
    if constexpr (kIsChange) {
      value -= as_float(original[i * original_stride]);
    }
    return value * white + 0.0f;
  };
  const int64_t left = std::clamp<int64_t>(-first, 0, count), right = std::clamp<int64_t>(width - first, left, count);
  std::fill(out, out + left, load(0));
  for (int64_t i = left; i < right; ++i) {
    out[i] = load(first + i);
  }
  std::fill(out + right, out + count, load(width - 1));
}

using LoadColumns = decltype(&load_columns<float, false>);

LoadColumns loader(const Composite& op) {
  const bool is_change = op.original.data != nullptr;
  if (op.plane_dtype == ScalarType::Float) {
    return is_change ? load_columns<float, true> : load_columns<float, false>;
  }
  if (op.plane_dtype == ScalarType::BFloat16) {
    return is_change ? load_columns<BFloat16, true> : load_columns<BFloat16, false>;
  }
  return is_change ? load_columns<Float16, true> : load_columns<Float16, false>;
}

// Four weights for each column of a window, and where in the loaded columns the first of its taps is.
struct ColumnTaps {
  std::vector<int32_t> index;
  std::array<std::vector<float>, 4> weights;
};

GBCI_SIMD_CLONES void resample_columns(
    const float* loaded, const int32_t* index, const float* w0, const float* w1, const float* w2, const float* w3,
    int64_t count, float* __restrict out) {
  for (int64_t x = 0; x < count; ++x) {
    const float* p = loaded + index[x];
    out[x] = tap(w0[x], p[0]) + tap(w1[x], p[1]) + tap(w2[x], p[2]) + tap(w3[x], p[3]);
  }
}

// The four resampled model rows that a native row lies between, and their weights.
struct RowTaps {
  const float* rows[4];
  float weights[4];
};

// Pixels [x, x + count), step by step: the compiler vectorizes each loop, and not all that they do in one.
template <typename Pixel, bool kIsChange, bool kOneRow>
GBCI_INLINE void paint_block(
    const Pixel* pixels, const float* weight, const RowTaps& taps, float white, int64_t count, int64_t x, Pixel* out) {
  if (!any_weight(weight + x, count)) {
    std::copy_n(pixels + x, count, out + x);
    return;
  }
  const float *r0 = taps.rows[0] + x, *r1 = taps.rows[1] + x, *r2 = taps.rows[2] + x, *r3 = taps.rows[3] + x;
  const float w0 = taps.weights[0], w1 = taps.weights[1], w2 = taps.weights[2], w3 = taps.weights[3];
  float pixel[kBlock], painted[kBlock];
  for (int64_t i = 0; i < count; ++i) {
    pixel[i] = pixels[x + i];
  }
  for (int64_t i = 0; i < count; ++i) {
    const float resampled = kOneRow ? r1[i] + 0.0f : w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i];
    painted[i] = blend(pixel[i], resampled, weight[x + i], kIsChange);
  }
  for (int64_t i = 0; i < count; ++i) {
    painted[i] = clip<Pixel>(painted[i], white);
  }
  for (int64_t i = 0; i < count; ++i) {
    painted[i] = weight[x + i] == 0.0f ? pixel[i] : painted[i];  // as a float: a NaN keeps its bits, too
  }
  for (int64_t i = 0; i < count; ++i) {
    out[x + i] = quantize<Pixel>(painted[i]);
  }
}

template <typename Pixel, bool kIsChange, bool kOneRow>
GBCI_SIMD_CLONES void paint(
    const Pixel* pixels, const float* weight, const RowTaps& taps, float white, int64_t count, Pixel* __restrict out) {
  int64_t x = 0;
  for (; x + kBlock <= count; x += kBlock) {
    paint_block<Pixel, kIsChange, kOneRow>(
        pixels, weight, taps, white, std::integral_constant<int64_t, kBlock>{}, x, out);
  }
  if (x < count) {
    paint_block<Pixel, kIsChange, kOneRow>(pixels, weight, taps, white, count - x, x, out);
  }
}

// Paints row after row of one window at a time. Model rows are resampled along x once and kept while native rows need
// them: where a native pixel is a small part of a model pixel, that leaves four products per native pixel.
template <typename Pixel>
class Painter {
 public:
  explicit Painter(const Composite& op) : op_(op), load_columns_(loader(op)) {}

  void open(int64_t sample) {
    sample_ = sample;
    window_ = op_.windows[sample];
    cached_.fill(-1);
    const int64_t width = window_.width;
    for (auto& row : rows_) {
      row.resize(width);
    }
    zeros_.resize(width);
    columns_.index.resize(width);
    for (auto& weights : columns_.weights) {
      weights.resize(width);
    }
    int32_t lowest = INT32_MAX, highest = INT32_MIN;
    whole_pixels_ = window_.scale_x == 1.0;
    for (int64_t x = 0; x < width; ++x) {
      const Taps taps = cubic_taps(window_.scale_x, window_.offset_x, x, op_.width);
      columns_.index[x] = taps.index - 1;
      for (int i = 0; i < 4; ++i) {
        columns_.weights[i][x] = taps.weights[i];
      }
      lowest = std::min(lowest, taps.index - 1);
      highest = std::max(highest, taps.index + 2);
      whole_pixels_ &= taps.weights[1] == 1.0f && taps.weights[0] == 0.0f && taps.weights[2] == 0.0f &&
                     taps.index == columns_.index[0] + 1 + x;
    }
    for (int32_t& index : columns_.index) {
      index -= lowest;
    }
    first_ = whole_pixels_ ? lowest + 1 : lowest;
    loaded_.resize(std::max<int64_t>(highest - lowest + 1, 0));
  }

  void paint_row(int64_t y, Pixel* out) {
    const int64_t start = window_.start + y * window_.width;
    const Pixel* pixels = static_cast<const Pixel*>(op_.pixels) + start;
    const float* weight = op_.weight + start;
    out += start;
    if (!has_weight(weight, window_.width)) {
      std::copy_n(pixels, window_.width, out);
      return;
    }
    const Taps taps = cubic_taps(window_.scale_y, window_.offset_y, y, op_.height);
    RowTaps rows;
    bool one_row = true;
    for (int i = 0; i < 4; ++i) {
      rows.weights[i] = taps.weights[i];
      rows.rows[i] = taps.weights[i] == 0.0f ? zeros_.data() : resampled(taps.index - 1 + i);
      one_row &= taps.weights[i] == (i == 1 ? 1.0f : 0.0f);
    }
    const auto run = op_.original.data
                         ? (one_row ? paint<Pixel, true, true> : paint<Pixel, true, false>)
                         : (one_row ? paint<Pixel, false, true> : paint<Pixel, false, false>);
    run(pixels, weight, rows, op_.white, window_.width, out);
  }

 private:
  const float* resampled(int64_t row) {
    row = std::clamp<int64_t>(row, 0, op_.height - 1);
    std::vector<float>& out = rows_[row % 4];  // a native row needs at most four neighboring ones
    if (cached_[row % 4] != row) {
      cached_[row % 4] = row;
      const auto start = [&](const Plane& plane) -> const void* {
        const int64_t element = sample_ * plane.batch + row * plane.row;
        return plane.data ? static_cast<const char*>(plane.data) + element_size_ * element : nullptr;
      };
      const int64_t count = whole_pixels_ ? window_.width : static_cast<int64_t>(loaded_.size());
      load_columns_(start(op_.synthetic), op_.synthetic.column, start(op_.original), op_.original.column, op_.white,
                    op_.width, first_, count, whole_pixels_ ? out.data() : loaded_.data());
      if (!whole_pixels_) {
        const auto& w = columns_.weights;
        resample_columns(loaded_.data(), columns_.index.data(), w[0].data(), w[1].data(), w[2].data(), w[3].data(),
                         window_.width, out.data());
      }
    }
    return out.data();
  }

  const Composite& op_;
  const LoadColumns load_columns_;
  const int64_t element_size_ = op_.plane_dtype == ScalarType::Float ? 4 : 2;
  int64_t sample_ = -1;
  CompositeWindow window_ = {};
  ColumnTaps columns_;
  bool whole_pixels_ = false;  // along x a native pixel is a model pixel, none far outside the decoded window
  int64_t first_ = 0;          // model column of loaded_[0], or with whole_pixels_ of the window's first pixel
  std::vector<float> loaded_, zeros_;
  std::array<std::vector<float>, 4> rows_;  // model row i in rows_[i % 4], if cached_ says so
  std::array<int64_t, 4> cached_ = {-1, -1, -1, -1};
};

template <typename Pixel>
void composite_windows(const Composite& op, void* out) {
  std::vector<int64_t> first_rows = {0};  // of each window, counted through the batch
  for (const CompositeWindow& window : op.windows) {
    first_rows.push_back(first_rows.back() + (window.width > 0 ? window.height : 0));
  }
  const int64_t num_rows = first_rows.back();
  const int64_t mean_width = op.num_pixels / std::max<int64_t>(num_rows, 1) + 1;
  const int64_t grain = std::max<int64_t>(kGrainElements / mean_width, 1);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    Painter<Pixel> painter(op);
    int64_t sample = std::upper_bound(first_rows.begin(), first_rows.end(), begin) - first_rows.begin() - 1;
    painter.open(sample);
    for (int64_t row = begin; row < end; ++row) {
      if (row == first_rows[sample + 1]) {
        sample = std::upper_bound(first_rows.begin(), first_rows.end(), row) - first_rows.begin() - 1;
        painter.open(sample);
      }
      painter.paint_row(row - first_rows[sample], static_cast<Pixel*>(out));
    }
  });
}

Tensor composite_cpu(
    const Tensor& pixels,
    const Tensor& weight,
    const Tensor& synthetic,
    const std::optional<Tensor>& original,
    const Tensor& sizes,
    const Tensor& affine,
    double white) {
  const Composite op = check_composite(pixels, weight, synthetic, original, sizes, affine, white);
  Tensor result = torch::stable::empty_like(pixels);
  void* out = result.mutable_data_ptr();
  if (op.pixel_dtype == ScalarType::Byte) {
    composite_windows<uint8_t>(op, out);
  } else if (op.pixel_dtype == ScalarType::UInt16) {
    composite_windows<uint16_t>(op, out);
  } else {
    composite_windows<float>(op, out);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CPU, m) {
  m.impl("composite", TORCH_BOX(&composite_cpu));
}

}  // namespace gbci

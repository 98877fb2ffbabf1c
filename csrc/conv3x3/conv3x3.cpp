// conv3x3 on the CPU, in float32; kernels/ops/conv3x3.py defines it. The method is Winograd's minimal filtering
// F(2 x 2, 3 x 3) (Lavin and Gray 2016): 16 multiplications instead of 36, with about the same rounding error.

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/describe.h"

namespace gbci {

namespace {

constexpr int64_t kTiles = 48;             // tiles of 2 x 2 pixels, computed together
constexpr int64_t kStride = 64;            // of a channel: kTiles, and room for vectors that write past them
constexpr int64_t kRow = 2 * kStride + 2;  // pixels
constexpr int64_t kChannelBlock = 8;       // output channels whose weights are neighbors

struct Loops {
  void (*transform_input)(const float* rows, int64_t count, float* tiles, int64_t stride);
  void (*transform_output)(const float* tiles, int64_t stride, float bias, int64_t count, float* rows);
  void (*multiply_tiles)(const float* weight, const float* input, int64_t channels, float* products);
};

}  // namespace

}  // namespace gbci

#define GBCI_CLONE_FILE "conv3x3/conv3x3_clone.h"
#include "common/for_each_instruction_set.h"

namespace gbci {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Loops loops = GBCI_WIDEST(kLoops);

struct Image {
  int64_t batch, height, width;  // pixels
  int64_t rows, columns;         // tiles

  int64_t tiles() const { return batch * rows * columns; }
};

// Calls body(sample, tile row, first tile of the row, number of tiles, their offset in the block) for a block's rows.
template <class Body>
void each_row(const Image& image, int64_t begin, int64_t end, const Body& body) {
  for (int64_t tile = begin, count; tile < end; tile += count) {
    const int64_t row = tile / image.columns, column = tile % image.columns;
    count = std::min(image.columns - column, end - tile);
    body(row / image.rows, row % image.rows, column, count, tile - begin);
  }
}

// Reads pixels 2 column - 1 .. 2 (column + count) of rows 2 row - 1 .. 2 row + 2 of a plane; 0 beyond its border.
void gather(const float* plane, const Image& image, int64_t row, int64_t column, int64_t count, float* rows) {
  const int64_t left = 2 * column - 1, begin = std::max<int64_t>(left, 0);
  const int64_t right = left + 2 * count + 2, end = std::min(right, image.width);
  for (int64_t r = 0; r < 4; ++r, rows += kRow) {
    const int64_t y = 2 * row - 1 + r;
    if (y < 0 || y >= image.height) {
      std::fill_n(rows, right - left, 0.0f);
      continue;
    }
    std::fill_n(rows, begin - left, 0.0f);
    std::memcpy(rows + begin - left, plane + y * image.width + begin, (end - begin) * sizeof(float));
    std::fill_n(rows + end - left, right - end, 0.0f);
  }
}

// Writes two rows of pixels to a plane.
void scatter(const float* rows, const Image& image, int64_t row, int64_t column, int64_t count, float* plane) {
  const int64_t begin = 2 * column, end = std::min(begin + 2 * count, image.width);
  for (int64_t y = 2 * row; y < std::min(2 * row + 2, image.height); ++y, rows += kRow) {
    std::memcpy(plane + y * image.width + begin, rows, (end - begin) * sizeof(float));
  }
}

// G w Gᵀ of weight [K, C, 3, 3], as [16, ceil(K / kChannelBlock), C, kChannelBlock]; 0 for the padding channels.
Tensor conv3x3_weight_cpu(const Tensor& weight) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 4 && weight.numel() > 0 &&
                      weight.size(2) == 3 && weight.size(3) == 3 && weight.is_contiguous(),
                  "weight must be contiguous Float [K, C, 3, 3], got ", torch::headeronly::toString(weight.scalar_type()),
                  " ", describe(weight.sizes()));
  const int64_t K = weight.size(0), C = weight.size(1), blocks = (K + kChannelBlock - 1) / kChannelBlock;
  Tensor out = torch::stable::new_zeros(weight, {16, blocks, C, kChannelBlock});
  const float* w = weight.const_data_ptr<float>();
  float* u = out.mutable_data_ptr<float>();
  constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < C; ++c, w += 9) {
      for (int p = 0; p < 4; ++p) {
        for (int q = 0; q < 4; ++q) {
          double sum = 0;
          for (int a = 0; a < 3; ++a) {
            for (int b = 0; b < 3; ++b) {
              sum += G[p][a] * G[q][b] * w[3 * a + b];
            }
          }
          u[(((4 * p + q) * blocks + k / kChannelBlock) * C + c) * kChannelBlock + k % kChannelBlock] =
              static_cast<float>(sum);
        }
      }
    }
  }
  return out;
}

Tensor conv3x3_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_channels) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 4 && x.numel() > 0 && x.is_contiguous(),
                  "x must be contiguous Float [B, C, H, W] and not empty, got ",
                  torch::headeronly::toString(x.scalar_type()), " ", describe(x.sizes()));
  const int64_t C = x.size(1), K = out_channels, blocks = (K + kChannelBlock - 1) / kChannelBlock;
  STD_TORCH_CHECK(K >= 1 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.dim() == 4 &&
                      weight.size(0) == 16 && weight.size(1) == blocks && weight.size(2) == C &&
                      weight.size(3) == kChannelBlock,
                  "weight must be conv3x3_weight's for ", C, " channels in and ", K, " out, got ",
                  describe(weight.sizes()));
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->numel() == K && bias->is_contiguous()),
                  "bias must be contiguous Float [", K, "]");
  const Image image = {x.size(0), x.size(2), x.size(3), (x.size(2) + 1) / 2, (x.size(3) + 1) / 2};
  Tensor out = torch::stable::new_empty(x, {image.batch, K, image.height, image.width});
  const float *pixels = x.const_data_ptr<float>(), *u = weight.const_data_ptr<float>();
  const float* biases = bias ? bias->const_data_ptr<float>() : nullptr;
  float* results = out.mutable_data_ptr<float>();
  const int64_t plane = image.height * image.width, groups = (image.tiles() + kTiles - 1) / kTiles;

  torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    // Transformed input [16, C, tiles], and products of a block of output channels. Vectors write past the last tile.
    std::vector<float> input(16 * C * kStride + kStride), products(16 * kChannelBlock * kStride + kStride);
    float rows[4 * kRow];
    std::fill_n(rows, 4 * kRow, 0.0f);
    for (int64_t group = first; group < last; ++group) {
      const int64_t begin = group * kTiles, end = std::min(begin + kTiles, image.tiles());
      each_row(image, begin, end, [&](int64_t sample, int64_t row, int64_t column, int64_t count, int64_t at) {
        for (int64_t c = 0; c < C; ++c) {
          gather(pixels + (sample * C + c) * plane, image, row, column, count, rows);
          loops.transform_input(rows, count, &input[c * kStride + at], C * kStride);
        }
      });
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t e = 0; e < 16; ++e) {
          loops.multiply_tiles(u + (e * blocks + block) * C * kChannelBlock, &input[e * C * kStride], C,
                         &products[e * kChannelBlock * kStride]);
        }
        each_row(image, begin, end, [&](int64_t sample, int64_t row, int64_t column, int64_t count, int64_t at) {
          for (int64_t k = block * kChannelBlock; k < std::min((block + 1) * kChannelBlock, K); ++k) {
            loops.transform_output(&products[k % kChannelBlock * kStride + at], kChannelBlock * kStride,
                                   biases ? biases[k] : 0, count, rows);
            scatter(rows, image, row, column, count, results + (sample * K + k) * plane);
          }
        });
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gbci_fast, m) {
  m.def("conv3x3_weight(Tensor weight) -> Tensor");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, SymInt out_channels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CPU, m) {
  m.impl("conv3x3_weight", TORCH_BOX(&conv3x3_weight_cpu));
  m.impl("conv3x3", TORCH_BOX(&conv3x3_cpu));
}

}  // namespace gbci

#include "composite.h"

#include <algorithm>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "half.h"

namespace gbci {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A block paints a tile of one window, kRows pixels of a column per thread. The model rows behind the tile, resampled
// along x, lie in shared memory: up to one model row per native row they all fit, else it is painted in parts.
constexpr int kTileWidth = 32, kThreads = 256, kRows = 8, kRowStep = kThreads / kTileWidth;
constexpr int kTileHeight = kRowStep * kRows, kModelRows = kTileHeight + 4;
constexpr int kMaxWindows = 64;

// The windows of one launch, passed by value: no copy to the device, and none to wait for.
struct Windows {
  int32_t count;
  int32_t first_sample;
  int32_t first_tile[kMaxWindows + 1];
  CompositeWindow windows[kMaxWindows];
};
static_assert(sizeof(Windows) + 200 <= 4096, "CUDA before 12.1 passes at most 4 KB of arguments");

__device__ float load(const void* data, int64_t element, ScalarType dtype) {
  if (dtype == ScalarType::Float) {
    return static_cast<const float*>(data)[element];
  }
  if (dtype == ScalarType::BFloat16) {
    return widen(static_cast<const BFloat16*>(data)[element]);
  }
  return widen(static_cast<const Float16*>(data)[element]);
}

// A model row between the four model pixels of `taps`.
__device__ float resample_row(
    const Plane& synthetic, const Plane& original, ScalarType dtype, float white, int64_t sample, int row, int width,
    const Taps& taps) {
  float products[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float value = 0;
    if (taps.weights[i] != 0.0f) {
      const int column = min(max(taps.index - 1 + i, 0), width - 1);
      value = load(synthetic.data, sample * synthetic.batch + row * synthetic.row + column * synthetic.column, dtype);
      if (original.data != nullptr) {
        value -= load(original.data, sample * original.batch + row * original.row + column * original.column, dtype);
      }
      value *= white;
    }
    products[i] = tap(taps.weights[i], value);
  }
  return products[0] + products[1] + products[2] + products[3];
}

template <typename Pixel>
__global__ void __launch_bounds__(kThreads) composite_kernel(
    const __grid_constant__ Windows batch,
    const Pixel* __restrict__ pixels,   // [N]
    const float* __restrict__ weights,  // [N]
    const Plane synthetic,              // [B, 1, height, width]
    const Plane original,               // [B, 1, height, width], or null
    ScalarType dtype,                   // of both
    int height,
    int width,
    float white,
    Pixel* __restrict__ out) {  // [N]
  __shared__ Taps rows[kTileHeight], columns[kTileWidth];
  __shared__ float resampled[kModelRows][kTileWidth];
  const int tile = static_cast<int>(blockIdx.x);
  int index = 0;  // the last window that begins with or before this tile
  for (int step = kMaxWindows / 2; step > 0; step /= 2) {
    if (index + step < batch.count && batch.first_tile[index + step] <= tile) {
      index += step;
    }
  }
  const CompositeWindow& window = batch.windows[index];
  const int64_t sample = batch.first_sample + index;
  const int inside = tile - batch.first_tile[index], tiles_across = (window.width - 1) / kTileWidth + 1;
  const int left = inside % tiles_across * kTileWidth, top = inside / tiles_across * kTileHeight;
  const int num_rows = min(window.height - top, kTileHeight);
  const int x = threadIdx.x % kTileWidth, y = threadIdx.x / kTileWidth;

  if (threadIdx.x < kTileHeight) {
    rows[threadIdx.x] = cubic_taps(window.scale_y, window.offset_y, top + threadIdx.x, height);
  } else if (threadIdx.x < kTileHeight + kTileWidth) {
    const int i = threadIdx.x - kTileHeight;
    columns[i] = cubic_taps(window.scale_x, window.offset_x, left + i, width);
  }
  const int64_t start = window.start + static_cast<int64_t>(top) * window.width + left + x;
  Pixel pixel[kRows];
  float weight[kRows];
  bool any = false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {  // all loads are on their way before the first is needed
    const int row = y + i * kRowStep;
    const bool is_pixel = row < num_rows && left + x < window.width;
    pixel[i] = is_pixel ? pixels[start + static_cast<int64_t>(row) * window.width] : Pixel(0);
    weight[i] = is_pixel ? weights[start + static_cast<int64_t>(row) * window.width] : 0.0f;
    any |= weight[i] != 0.0f;
  }
  if (__syncthreads_or(any)) {
    // The lowest model row is behind the first native row or, upside down, behind the last.
    const auto lowest = [&](int begin, int end) { return min(rows[begin].index, rows[end - 1].index) - 1; };
    const auto highest = [&](int begin, int end) { return max(rows[begin].index, rows[end - 1].index) + 2; };
    for (int begin = 0, end = num_rows; begin < num_rows; begin = end, end = num_rows) {
      while (highest(begin, end) - lowest(begin, end) >= kModelRows) {
        end = begin + (end - begin) / 2;
      }
      const int first = lowest(begin, end), last = highest(begin, end);
      for (int row = first + y; row <= last; row += kRowStep) {
        resampled[row - first][x] = resample_row(
            synthetic, original, dtype, white, sample, min(max(row, 0), height - 1), width, columns[x]);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = y + i * kRowStep;
        if (weight[i] != 0.0f && row >= begin && row < end) {
          const Taps& taps = rows[row];
          const float(*behind)[kTileWidth] = resampled + (taps.index - 1 - first);
          const float sum = tap(taps.weights[0], behind[0][x]) + tap(taps.weights[1], behind[1][x]) +
                            tap(taps.weights[2], behind[2][x]) + tap(taps.weights[3], behind[3][x]);
          const float painted = blend(static_cast<float>(pixel[i]), sum, weight[i], original.data != nullptr);
          pixel[i] = quantize<Pixel>(clip<Pixel>(painted, white));
        }
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = y + i * kRowStep;
    if (row < num_rows && left + x < window.width) {
      out[start + static_cast<int64_t>(row) * window.width] = pixel[i];
    }
  }
}

int64_t num_tiles(const CompositeWindow& window) {
  const int64_t across = (window.width + int64_t{kTileWidth} - 1) / kTileWidth;
  return across * ((window.height + int64_t{kTileHeight} - 1) / kTileHeight);
}

template <typename Pixel>
void launch(const Composite& op, void* out, cudaStream_t stream) {
  const int64_t samples = static_cast<int64_t>(op.windows.size());
  Windows batch;
  for (int64_t next = 0; next < samples;) {
    batch.first_sample = static_cast<int32_t>(next);
    batch.first_tile[0] = 0;
    for (batch.count = 0; batch.count < kMaxWindows && next < samples; ++batch.count, ++next) {
      const int64_t tiles = batch.first_tile[batch.count] + num_tiles(op.windows[next]);
      STD_TORCH_CHECK(tiles <= INT32_MAX, "composite cannot launch ", tiles, " tiles at once; split the batch");
      batch.first_tile[batch.count + 1] = static_cast<int32_t>(tiles);
      batch.windows[batch.count] = op.windows[next];
    }
    const int32_t tiles = batch.first_tile[batch.count];
    if (tiles > 0) {
      composite_kernel<Pixel><<<tiles, kThreads, 0, stream>>>(
          batch, static_cast<const Pixel*>(op.pixels), op.weight, op.synthetic, op.original, op.plane_dtype, op.height,
          op.width, op.white, static_cast<Pixel*>(out));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
}

Tensor composite_cuda(
    const Tensor& pixels,
    const Tensor& weight,
    const Tensor& synthetic,
    const std::optional<Tensor>& original,
    const Tensor& sizes,
    const Tensor& affine,
    double white) {
  const Composite op = check_composite(pixels, weight, synthetic, original, sizes, affine, white);
  const torch::stable::accelerator::DeviceGuard guard(pixels.get_device_index());
  Tensor result = torch::stable::empty_like(pixels);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(pixels.get_device_index(), &stream));
  const auto run = op.pixel_dtype == ScalarType::Byte     ? launch<uint8_t>
                   : op.pixel_dtype == ScalarType::UInt16 ? launch<uint16_t>
                                                          : launch<float>;
  run(op, result.mutable_data_ptr(), static_cast<cudaStream_t>(stream));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CUDA, m) {
  m.impl("composite", TORCH_BOX(&composite_cuda));
}

}  // namespace gbci

#include "mask_to_latent.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

namespace gbci {

namespace {

using torch::stable::Tensor;

constexpr int kThreads = 1024;

// One block per sample, because in each phase a thread reads values that other threads wrote in the phase before. A
// sample's planes are a few tens of KB, and stay in the cache.
template <typename T>
__global__ void __launch_bounds__(kThreads) mask_to_latent_kernel(
    const T* __restrict__ mask,  // [B, 1, height * factor, width * factor], strided
    int64_t batch_stride,
    int64_t row_stride,
    int64_t column_stride,
    int height,
    int width,
    int factor,
    int radius,
    int64_t halo,
    float* latent_mask,  // [B, 1, height, width]
    float* weight,       // [B, 1, height, width]
    float* scratch,      // [B, 1, height, width]
    int64_t* window) {   // [B, 4]
  __shared__ CellBox box;
  const int cells = height * width;
  mask += blockIdx.x * batch_stride;
  latent_mask += static_cast<int64_t>(blockIdx.x) * cells;
  weight += static_cast<int64_t>(blockIdx.x) * cells;
  scratch += static_cast<int64_t>(blockIdx.x) * cells;
  if (threadIdx.x == 0) {
    box = {INT32_MAX, INT32_MAX, 0, 0};
  }
  __syncthreads();

  for (int64_t cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int y = static_cast<int>(cell) / width, x = static_cast<int>(cell) % width;
    const T* pixels = mask + y * (factor * row_stride) + x * (factor * column_stride);
    bool any = false;
    for (int i = 0; i < factor; ++i) {
      for (int j = 0; j < factor; ++j) {
        any |= is_masked(pixels[i * row_stride + j * column_stride]);
      }
    }
    latent_mask[cell] = any;
    if (radius == 0) {
      weight[cell] = any;
    }
    if (any) {
      atomicMin(&box.xmin, x);
      atomicMin(&box.ymin, y);
      atomicMax(&box.xmax, x + 1);
      atomicMax(&box.ymax, y + 1);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    write_window(box, 2 * radius + halo, height, width, window + 4 * static_cast<int64_t>(blockIdx.x));
  }
  if (radius == 0) {
    return;
  }

  // The mask grown by the radius, along columns and then along rows; 0 beyond the border.
  for (int64_t cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int y = static_cast<int>(cell) / width, x = static_cast<int>(cell) % width;
    float grown = 0;
    for (int i = max(y - radius, 0); i <= min(y + radius, height - 1); ++i) {
      grown = fmaxf(grown, latent_mask[i * width + x]);
    }
    scratch[cell] = grown;
  }
  __syncthreads();
  for (int64_t cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int y = static_cast<int>(cell) / width, x = static_cast<int>(cell) % width;
    float grown = 0;
    for (int i = max(x - radius, 0); i <= min(x + radius, width - 1); ++i) {
      grown = fmaxf(grown, scratch[y * width + i]);
    }
    weight[cell] = grown;
  }
  __syncthreads();

  // The grown mask averaged along rows, then along columns, with a replicated border.
  const float count = static_cast<float>(2 * radius + 1);
  for (int64_t cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int y = static_cast<int>(cell) / width, x = static_cast<int>(cell) % width;
    float sum = 0;
    for (int i = x - radius; i <= x + radius; ++i) {
      sum += weight[y * width + min(max(i, 0), width - 1)];
    }
    scratch[cell] = sum / count;
  }
  __syncthreads();
  for (int64_t cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int y = static_cast<int>(cell) / width, x = static_cast<int>(cell) % width;
    float sum = 0;
    for (int i = y - radius; i <= y + radius; ++i) {
      sum += scratch[min(max(i, 0), height - 1) * width + x];
    }
    weight[cell] = sum / count;
  }
}

std::tuple<Tensor, Tensor, Tensor> mask_to_latent_cuda(
    const Tensor& mask, int64_t factor, int64_t feather, int64_t halo) {
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  const MaskToLatent op = check_mask_to_latent(mask, factor, feather, halo);
  auto outputs = mask_to_latent_outputs(mask, op);
  const Tensor scratch = torch::stable::empty_like(std::get<1>(outputs));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(mask.get_device_index(), &stream));
  const auto launch = [&]<typename T>(const T* pixels) {
    mask_to_latent_kernel<T><<<static_cast<unsigned>(op.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        pixels, op.batch_stride, op.row_stride, op.column_stride, static_cast<int>(op.height),
        static_cast<int>(op.width), static_cast<int>(op.factor), static_cast<int>(op.feather), op.halo,
        std::get<0>(outputs).mutable_data_ptr<float>(), std::get<1>(outputs).mutable_data_ptr<float>(),
        scratch.mutable_data_ptr<float>(), std::get<2>(outputs).mutable_data_ptr<int64_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (op.of_floats) {
    launch(static_cast<const float*>(op.mask));
  } else {
    launch(static_cast<const uint8_t*>(op.mask));
  }
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CUDA, m) {
  m.impl("mask_to_latent", TORCH_BOX(&mask_to_latent_cuda));
}

}  // namespace gbci

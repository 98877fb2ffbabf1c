#include "philox_normal.h"

#include <algorithm>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "common/philox.h"

namespace gbci {

namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;

// One thread draws one Philox block, four neighboring elements; blockIdx.y walks over the samples.
__global__ void __launch_bounds__(kThreads) philox_normal_kernel(
    const int64_t* __restrict__ seeds,  // [batch], seed_stride apart
    int64_t seed_stride,
    int64_t batch,
    int64_t num_elements,
    uint32_t step,
    uint32_t stream,
    float* __restrict__ out) {  // [batch, num_elements]
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t element = 4 * block;
  if (element >= num_elements) {
    return;
  }
  for (int64_t sample = blockIdx.y; sample < batch; sample += gridDim.y) {
    const uint64_t seed = static_cast<uint64_t>(seeds[sample * seed_stride]);
    const Normals4 n = philox_normal4(seed, static_cast<uint32_t>(block), step, stream);
    float* row = out + sample * num_elements + element;
    if (num_elements % 4 == 0) {  // then every row starts at a multiple of 16 bytes
      *reinterpret_cast<float4*>(row) = make_float4(n.n0, n.n1, n.n2, n.n3);
    } else {
      const float normals[4] = {n.n0, n.n1, n.n2, n.n3};
      for (int lane = 0; lane < 4; ++lane) {
        if (element + lane < num_elements) {
          row[lane] = normals[lane];
        }
      }
    }
  }
}

Tensor philox_normal_cuda(const Tensor& seeds, int64_t num_elements, int64_t step, int64_t stream) {
  const torch::stable::accelerator::DeviceGuard guard(seeds.get_device_index());
  Tensor out = philox_normal_output(seeds, num_elements, step, stream);
  const int64_t batch = seeds.size(0), blocks = (num_elements + 3) / 4;
  if (batch == 0 || blocks == 0) {
    return out;
  }
  void* cuda_stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(seeds.get_device_index(), &cuda_stream));
  const dim3 grid((blocks + kThreads - 1) / kThreads, std::min<int64_t>(batch, 65535));
  philox_normal_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(cuda_stream)>>>(
      seeds.const_data_ptr<int64_t>(), seeds.stride(0), batch, num_elements, static_cast<uint32_t>(step),
      static_cast<uint32_t>(stream), out.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gbci_fast, CUDA, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal_cuda));
}

}  // namespace gbci

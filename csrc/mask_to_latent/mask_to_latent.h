// mask_to_latent: a lesion mask as blend weights per latent cell; kernels/ops/mask_to_latent.py defines it.

#pragma once

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#include "common/host_device.h"

namespace gbci {

// The arguments of mask_to_latent, checked.
struct MaskToLatent {
  int64_t batch, height, width;  // of the latent
  int64_t factor, feather, halo;
  int64_t batch_stride, row_stride, column_stride;  // of the mask, in elements
  bool of_floats;                                   // otherwise bytes: uint8 or bool
  const void* mask;
};

MaskToLatent check_mask_to_latent(const torch::stable::Tensor& mask, int64_t factor, int64_t feather, int64_t halo);

// Allocates the results on the device of the mask: latent mask and weight float32 [B, 1, height, width], window int64
// [B, 4].
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> mask_to_latent_outputs(
    const torch::stable::Tensor& mask, const MaskToLatent& op);

// Whether a pixel is above 0.5.
GBCI_INLINE bool is_masked(uint8_t value) { return value != 0; }
GBCI_INLINE bool is_masked(float value) { return value > 0.5f; }

// The smallest box around the masked cells of one sample, half-open; empty if xmax is 0.
struct CellBox {
  int32_t xmin, ymin, xmax, ymax;
};

// The box grown by `margin` cells and clipped to the latent, to window[0 .. 3].
GBCI_INLINE void write_window(CellBox box, int64_t margin, int64_t height, int64_t width, int64_t* window) {
  const bool empty = box.xmax == 0;
  window[0] = empty || box.xmin < margin ? 0 : box.xmin - margin;
  window[1] = empty || box.ymin < margin ? 0 : box.ymin - margin;
  window[2] = empty ? 0 : width - box.xmax < margin ? width : box.xmax + margin;
  window[3] = empty ? 0 : height - box.ymax < margin ? height : box.ymax + margin;
}

}  // namespace gbci

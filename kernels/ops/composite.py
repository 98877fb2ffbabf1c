"""A decoded window painted into native images: a batch of windows, each with a size and a grid of its own.

Per native pixel, whose center (X + 1/2, Y + 1/2) lies in the decoded window at (scale_x (X + 1/2) + offset_x,
scale_y (Y + 1/2) + offset_y), where model pixel i covers [i, i + 1)::

    painted = pixel + weight * R(synthetic - template)          with a template: the original keeps its finer grain
    painted = lerp(pixel, R(synthetic), weight)                 without

clipped to [0, 1], in integers scaled by `white` and rounded; where the weight is 0, the bits of the pixel. R is bicubic
resampling (Keys 1981, a = -3/4; beyond the border its pixel is repeated), along x and then along y: that of
``F.grid_sample(mode="bicubic", padding_mode="border")``. A tap of weight 0 is not read, so on a grid of whole pixels R
gives the pixel itself, whatever lies beside it.

Equivalent to `composite_ref`. Faster because every native pixel is read once and written once, where eager PyTorch
builds a grid and passes over memory for every operation; because a window's columns are resampled once per model row;
and because what has no weight is only copied. The CPU and the CUDA kernel give the same bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gbci_fast.ops import load_extension

load_extension()

Images = Tensor | Sequence[Tensor]
WHITE = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}
IDENTITY = (1.0, 0.0, 1.0, 0.0)


def _resampled(images: Tensor, affine: Sequence[float], height: int, width: int) -> Tensor:
    """R of one model image [1, 1, h, w], float64 [height, width]."""
    scale_x, offset_x, scale_y, offset_y = affine
    y, x = (torch.arange(size, dtype=torch.float64, device=images.device) + 0.5 for size in (height, width))
    y, x = (scale_y * y + offset_y) / images.shape[2], (scale_x * x + offset_x) / images.shape[3]
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
    return F.grid_sample(
        images.double(), 2 * grid[None] - 1, mode="bicubic", padding_mode="border", align_corners=False
    )[0, 0]


def composite_ref(
    originals: Images,
    weights: Images,
    synthetic: Tensor,
    *,
    template: Tensor | None = None,
    affine: Tensor | Sequence[Sequence[float]] | None = None,
    white: float | None = None,
) -> Images:
    """`composite` in plain PyTorch, image by image, in float64."""
    affine = [IDENTITY] * len(originals) if affine is None else torch.as_tensor(affine, dtype=torch.float64).tolist()
    painted = []
    for i, (original, weight) in enumerate(zip(originals, weights, strict=True)):
        dtype, (height, width) = original.dtype, original.shape[-2:]
        scale = WHITE[dtype] if white is None else white
        unit, weight = original.double().view(height, width) / scale, weight.double().view(height, width)
        new = _resampled(synthetic[i : i + 1], affine[i], height, width)
        if template is None:
            unit = torch.lerp(unit, new, weight)
        else:
            unit = unit + weight * (new - _resampled(template[i : i + 1], affine[i], height, width))
        levels = unit.clamp(0, 1) * scale
        levels = (levels if dtype == torch.float32 else levels.round()).to(dtype)
        painted.append(torch.where((weight == 0).view(original.shape), original, levels.view(original.shape)))
    return torch.stack(painted) if isinstance(originals, Tensor) else painted


@torch.library.register_fake("gbci_fast::composite")
def _(pixels, weight, synthetic, template, sizes, affine, white):
    return torch.empty_like(pixels)


def composite(
    originals: Images,
    weights: Images,
    synthetic: Tensor,
    *,
    sizes: Tensor | Sequence[tuple[int, int]] | None = None,
    template: Tensor | None = None,
    affine: Tensor | Sequence[Sequence[float]] | None = None,
    white: float | None = None,
) -> Images:
    """The synthesis in the original images. On CUDA it does not synchronize: a graph can hold it.

    Args:
        originals: native windows, uint8, uint16 or float32: a sequence of B tensors ``[H_i, W_i]`` of one dtype; or
            ``[B, 1, H, W]``; or with `sizes` ``[N]``, the pixels of all windows one after the other, which spares a
            sequence's copy into that form.
        weights: float32 in [0, 1] of the same shapes: how much of the synthesis counts; see
            `gbci_fast.model.masks.feather_pixels`.
        synthetic: float32, bfloat16 or float16 ``[B, 1, h, w]`` in [0, 1], of any strides: the decoded windows in model
            space. NaN stays NaN in float32 images, and turns into 0, a black spot, in integers: an integer cannot say
            it, and looking for it would synchronize.
        sizes: ``[B, 2]`` on the CPU, (H_i, W_i).
        template: like `synthetic`, what it was made from. With it the change is added, without it the synthesis
            replaces the pixels.
        affine: ``[B, 4]`` numbers on the CPU: scale_x, offset_x, scale_y, offset_y of each window, negative scales
            for mirrored ones; see `gbci_fast.data.frame.Frame.window_affine`. None: the grids are one.
        white: integer value of 1.0, 4095 for 12 bits; by default the dtype's largest. 1 for float32.

    Returns:
        The painted windows, in the form and dtype of `originals`.

    Raises:
        RuntimeError: a dtype, device, size or `white` is not as above, or the affine is not finite.
        ValueError: the batch is empty, its images differ in dtype or have the wrong shape, or those of `originals` and
            `weights` differ.
    """
    pixels, weight = originals, weights
    if sizes is not None:
        if not (isinstance(originals, Tensor) and isinstance(weights, Tensor)):
            raise ValueError("sizes was given beside a sequence; expected it with originals and weights of [N] pixels")
        sizes = torch.as_tensor(sizes)
    else:
        _check_images(originals, weights)
        if isinstance(originals, Tensor):
            pixels, weight = originals.reshape(-1), weights.reshape(-1)
            sizes = torch.tensor([originals.shape[-2:]]).expand(len(originals), 2)
        else:
            pixels, weight = (torch.cat([image.reshape(-1) for image in images]) for images in (originals, weights))
            sizes = torch.tensor([image.shape for image in originals])
    if affine is None:
        affine = torch.tensor([IDENTITY], dtype=torch.float64).expand(len(sizes), 4)
    else:
        affine = torch.as_tensor(affine, dtype=torch.float64)
    if white is None:
        white = WHITE.get(pixels.dtype, 1.0)
    painted = torch.ops.gbci_fast.composite(pixels, weight, synthetic, template, sizes, affine, white)
    if isinstance(originals, Tensor):
        return painted.view(originals.shape)
    parts = painted.split([image.numel() for image in originals])
    return [part.view(image.shape) for part, image in zip(parts, originals, strict=True)]


def _check_images(originals: Images, weights: Images) -> None:
    """What the operator cannot see once the images lie one after the other."""
    stacked = isinstance(originals, Tensor)
    if stacked != isinstance(weights, Tensor) or len(originals) != len(weights):
        raise ValueError("weights must come in the form of originals: as many, or likewise one tensor")
    if stacked and (originals.dim() != 4 or originals.shape[1] != 1):
        raise ValueError(f"originals must be [B, 1, H, W] or a sequence of [H, W], got {list(originals.shape)}")
    if not len(originals):
        raise ValueError("originals is empty; expected at least one image")
    pairs = [(originals, weights)] if stacked else zip(originals, weights, strict=True)
    for i, (original, weight) in enumerate(pairs):
        place = "" if stacked else f"[{i}]"
        if not stacked and (original.dim() != 2 or original.dtype != originals[0].dtype):
            raise ValueError(
                f"originals{place} is {original.dtype} {list(original.shape)}; expected {originals[0].dtype} [H, W]"
            )
        if weight.dtype != torch.float32:
            raise ValueError(f"weights{place} is {weight.dtype}; expected torch.float32")
        if weight.shape != original.shape:
            raise ValueError(
                f"weights{place} is {list(weight.shape)}; "
                f"expected the shape of originals{place}, {list(original.shape)}"
            )

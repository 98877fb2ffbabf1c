"""The two weights made of a lesion mask: one per latent cell for the known-region blend, one per pixel for the
composite. Eager and fast path both use these functions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """The mask at latent resolution, conservative: a cell is 1 when any of its pixels is.

    Args:
        mask: [B, 1, H, W] with 1 = synthesize.
        factor: pixels per latent cell along each side.

    Returns:
        [B, 1, H / factor, W / factor] of zeros and ones, in the dtype of `mask`.
    """
    return F.max_pool2d((mask > 0.5).to(mask.dtype), factor)


def feather_latent_mask(mask: Tensor, radius: int) -> Tensor:
    """Blend weight per latent cell: 1 inside the mask, falling linearly to 0 over ``2 * radius`` cells outside.

    The ramp lies outside, so that no masked cell is pulled back to the original.

    Args:
        mask: [B, 1, h, w] of zeros and ones, from `latent_mask`.
        radius: in latent cells; 0 keeps the mask hard.
    """
    if radius == 0:
        return mask
    width = 2 * radius + 1
    grown = F.max_pool2d(mask, width, stride=1, padding=radius)
    for kernel, padding in (((1, width), (radius, 0)), ((width, 1), (0, radius))):
        pad = (padding[0], padding[0], padding[1], padding[1])
        grown = F.avg_pool2d(F.pad(grown, pad, mode="replicate"), kernel, stride=1)
    return grown


def feather_pixels(mask: Tensor, radius: int) -> Tensor:
    """Composite weight per pixel: 0 outside the mask, rising to 1 over `radius` pixels *inside* it.

    The ramp lies inside, so that every pixel outside the mask keeps its own bits.

    Args:
        mask: [B, 1, H, W]; above 0.5 = synthesize.
        radius: in pixels; 0 keeps the mask hard.
    """
    hard = (mask > 0.5).to(mask.dtype)
    total, eroded = hard, hard
    for _ in range(radius):
        eroded = -F.max_pool2d(-eroded, 3, stride=1, padding=1)
        total = total + eroded
    return total / (radius + 1)


def composite(image: Tensor, synthetic: Tensor, mask: Tensor, radius: int) -> Tensor:
    """`synthetic` where the mask is, feathered over `radius` pixels inside its edge; elsewhere the bits of `image`.

    Args:
        image, synthetic: float [B, 1, H, W] in [0, 1].
        mask: [B, 1, H, W].
    """
    weight = feather_pixels(mask.to(image.dtype), radius)
    return torch.where(weight == 0, image, torch.lerp(image, synthetic, weight))

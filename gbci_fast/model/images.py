"""Images in and out of the pipeline: PIL, NumPy and torch to float32 [B, 1, H, W] in [0, 1], and back."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gbci_fast.data.mask_files import above_half
from gbci_fast.errors import GBCIError

ImageInput = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]
_GRAY_MODES = {"1": 255, "L": 255, "I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535}


def to_tensor(images: ImageInput, name: str) -> tuple[Tensor, int]:
    """Reads one image or several of one size.

    Args:
        images: PIL (gray, 8 or 16 bit); arrays uint8, uint16 or float in [0, 1], [H, W], [H, W, 1] or [B, H, W, 1];
            tensors float in [0, 1] or uint8, [H, W], [1, H, W] or [B, 1, H, W]; or a list of these.
        name: what the image is called in error messages.

    Returns:
        float32 [B, 1, H, W] in [0, 1], and the value that stands for 1.0 in the input's native depth
        (255 for 8-bit input, else 65535).

    Raises:
        GBCIError: color, wrong shape or type, values outside [0, 1], NaN, or sizes that differ.
    """
    items = list(images) if isinstance(images, Sequence) else [images]
    if not items:
        raise GBCIError(f"{name} is an empty list; expected at least one image")
    tensors, depths = zip(*(_one_to_tensor(item, name) for item in items), strict=True)
    sizes = sorted({tuple(tensor.shape[-2:]) for tensor in tensors})
    if len(sizes) > 1:
        raise GBCIError(f"{name} holds images of sizes {sizes}; expected one size")
    return torch.cat(tensors), max(depths)


def to_mask(masks: ImageInput, name: str) -> Tensor:
    """Reads one mask or several of one size: 1 where to synthesize, float32 [B, 1, H, W] of zeros and ones.

    A float mask counts above 0.5. An integer mask of any type counts above half of its largest value, as in mask files:
    0 and 1, 0 and 255, and 16 bits mean the same.

    Args:
        masks: as of `to_tensor`, and integers of any type.
        name: what the mask is called in error messages.

    Raises:
        GBCIError: as of `to_tensor`; negative integers, or a map of labels.
    """
    items = list(masks) if isinstance(masks, Sequence) else [masks]
    return (to_tensor([_drawn(item, name) for item in items], name)[0] > 0.5).float()


def from_tensor(images: Tensor, output_type: str, depth: int) -> Tensor | np.ndarray | list[Image.Image]:
    """float [B, 1, H, W] in [0, 1] to "pt" (as it is), "np" (float32 [B, H, W, 1]) or "pil" (gray, native depth).

    Raises:
        GBCIError: NaN or infinity, which "pil" cannot hold.
    """
    if output_type == "pt":
        return images
    array = images.float().cpu().numpy()
    if output_type == "np":
        return array.transpose(0, 2, 3, 1)
    if not np.isfinite(array).all():
        raise GBCIError(
            "the sampled image holds NaN or infinity; expected finite values: guidance_scale may be too large"
        )
    quantized = np.round(array[:, 0] * depth).astype(np.uint8 if depth == 255 else np.uint16)
    return [Image.fromarray(image) for image in quantized]


def _drawn(mask: Image.Image | np.ndarray | Tensor, name: str) -> Image.Image | np.ndarray | Tensor:
    """A mask of integers as truth values; any other as it is, for `to_tensor` to check."""
    if isinstance(mask, Tensor):
        whole = not (mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool)
        return torch.from_numpy(_drawn(mask.cpu().numpy(), name)).to(mask.device) if whole else mask
    if isinstance(mask, Image.Image) and mask.mode in _GRAY_MODES:
        mask = np.array(mask)
    if not isinstance(mask, np.ndarray) or not np.issubdtype(mask.dtype, np.integer) or mask.size == 0:
        return mask
    if mask.min() < 0:
        raise GBCIError(f"{name} has values from {mask.min()}; expected none below 0")
    each = mask if mask.ndim == 4 else mask[None]
    return np.stack([above_half(one, name) for one in each]).reshape(mask.shape)


def _one_to_tensor(image: Image.Image | np.ndarray | Tensor, name: str) -> tuple[Tensor, int]:
    if isinstance(image, Image.Image):
        if image.mode not in _GRAY_MODES:
            raise GBCIError(f"{name} has PIL mode {image.mode!r}; expected a gray image (L or I;16)")
        scale = 1 if image.mode == "1" else _GRAY_MODES[image.mode]
        array = np.array(image).astype(np.float32) / np.float32(scale)
        return _checked(torch.from_numpy(array)[None, None], name), _GRAY_MODES[image.mode]
    if isinstance(image, np.ndarray | Tensor) and image.ndim < 2:
        raise GBCIError(f"{name} has shape {list(image.shape)}; expected one channel, [B, 1, H, W]")
    tensor, depth = _scaled(image, name)
    if isinstance(image, np.ndarray) and tensor.ndim >= 3:
        if tensor.shape[-1] != 1:
            raise GBCIError(f"{name} has shape {list(tensor.shape)}; expected [H, W], [H, W, 1] or [B, H, W, 1]")
        tensor = tensor.movedim(-1, -3)
    while 2 <= tensor.ndim < 4:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[1] != 1:
        raise GBCIError(f"{name} has shape {list(tensor.shape)}; expected one channel, [B, 1, H, W]")
    return _checked(tensor, name), depth


def _scaled(image: np.ndarray | Tensor, name: str) -> tuple[Tensor, int]:
    """Integers to [0, 1]; floats as they are. NumPy's uint16 goes through float32, exactly."""
    if isinstance(image, np.ndarray):
        scale = {"uint8": 255, "uint16": 65535, "bool": 1}.get(image.dtype.name)
        if scale is not None:
            return torch.from_numpy(image.astype(np.float32) / np.float32(scale)), 255 if scale == 255 else 65535
        if not np.issubdtype(image.dtype, np.floating):
            raise GBCIError(f"{name} has dtype {image.dtype}; expected uint8, uint16 or float in [0, 1]")
        return torch.from_numpy(image.astype(np.float32)), 65535
    if not isinstance(image, Tensor):
        raise GBCIError(f"{name} is a {type(image).__name__}; expected a PIL image, an array or a tensor")
    if image.dtype == torch.uint8:
        return image.float() / 255, 255
    if not image.is_floating_point() and image.dtype != torch.bool:
        raise GBCIError(f"{name} has dtype {image.dtype}; expected uint8 or float in [0, 1]")
    return image.float(), 65535


def _checked(tensor: Tensor, name: str) -> Tensor:
    if tensor.numel() == 0:
        raise GBCIError(f"{name} has shape {list(tensor.shape)}; expected at least one pixel")
    low, high = tensor.min().item(), tensor.max().item()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise GBCIError(f"{name} has values from {low:g} to {high:g}; expected [0, 1]")
    return tensor

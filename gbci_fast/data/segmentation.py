"""Where the breast is, and where in it a lesion may lie: outline, pectoral muscle, placement. No learned weights."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.filters import threshold_otsu

from gbci_fast.errors import GBCIError

_MASK_SIDE = 256  # the breast outline is found at this resolution
_MIN_BREAST_FRACTION = 0.01


def breast_mask(unit: np.ndarray) -> np.ndarray:
    """The breast as the largest bright region, bool [H, W]; film labels and scanner borders are left out.

    Args:
        unit: float32 [H, W] in [0, 1], bright = dense.

    Raises:
        GBCIError: no region of at least 1 % of the image stands out.
    """
    height, width = unit.shape
    shrink = min(1.0, _MASK_SIDE / max(height, width))
    small_shape = max(1, round(height * shrink)), max(1, round(width * shrink))
    tensor = torch.from_numpy(np.array(unit, np.float32))[None, None]
    small = F.interpolate(tensor, small_shape, mode="area")[0, 0].numpy()
    small = ndimage.gaussian_filter(small, 1.0)
    if small.max() - small.min() < 1e-6:
        raise GBCIError("no breast found: the image has one value only")
    # Otsu separates dense tissue from the rest; fat is darker, but a third of the way up it is still above the air.
    threshold = small.min() + 0.3 * (threshold_otsu(small) - small.min())
    # The scanner's bright rim and light leaks touch the border as a thin frame: opening cuts them off the breast.
    foreground = ndimage.binary_opening(small > threshold, iterations=4)
    labels, count = ndimage.label(foreground)
    if count == 0:
        raise GBCIError("no breast found: nothing stands out from the background")
    areas = ndimage.sum_labels(foreground, labels, np.arange(1, count + 1))
    mask = labels == 1 + int(np.argmax(areas))
    mask = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(mask, 4, mode="edge"), iterations=3))[4:-4, 4:-4]
    if mask.mean() < _MIN_BREAST_FRACTION:
        raise GBCIError(f"no breast found: the largest region covers {mask.mean():.2%} of the image, expected >= 1 %")
    full = F.interpolate(torch.from_numpy(mask.astype(np.float32))[None, None], (height, width), mode="bilinear")
    return full[0, 0].numpy() > 0.5


def chest_wall_side(mask: np.ndarray) -> str:
    """The side, "L" or "R", on which the breast in the mask [H, W] is taller (pixels are trusted over tags)."""
    columns = np.trim_zeros(mask.sum(0))
    half = len(columns) // 2
    return "L" if columns[:half].sum() >= columns[len(columns) - half :].sum() else "R"


def placement_mask(breast: np.ndarray, pectoral: np.ndarray, skin: float) -> np.ndarray:
    """Where a lesion's pixels may lie: in the breast, off the muscle, `skin` pixels or more from the skin.

    Where the breast leaves the image (chest wall, axilla) there is no skin. In a breast so small that `skin` pixels
    reach deeper than half way into its tissue, the margin is half of that depth: it shrinks before anything else
    gives way, and no pixel on the muscle or outside the breast is ever part of the result.

    Args:
        breast, pectoral: bool [H, W].
        skin: margin in pixels, >= 0.

    Raises:
        GBCIError: no pixel of the breast is off the muscle, or a negative margin.
    """
    if not skin >= 0:
        raise GBCIError(f"the skin margin is {skin} pixels; expected 0 or more")
    tissue = breast & ~pectoral
    if not tissue.any():
        raise GBCIError("no place for a lesion: no pixel of the breast is off the pectoral muscle")
    # Distance to the nearest air in the image; a breast that fills the whole image has none.
    depth = ndimage.distance_transform_edt(breast) if not breast.all() else np.full(breast.shape, np.inf)
    return tissue & (depth > min(skin, depth[tissue].max() / 2))

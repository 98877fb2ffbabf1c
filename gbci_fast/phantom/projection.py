"""The X-ray image: Beer-Lambert at 20 keV, scatter, photon noise, logarithm, and processing for presentation."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from gbci_fast.phantom.anatomy import Anatomy, Grid

# Linear attenuation at 20 keV in 1/mm (Johns and Yaffe, Phys. Med. Biol. 32, 1987, for the first two).
MU_FAT = 0.0456
MU_GLAND = 0.0802
MU_SKIN = 0.0800
MU_MUSCLE = 0.0820
MU_CALCIFICATION = 2.0

SCATTER_FRACTION = 0.15
SCATTER_SIGMA = 8.0  # mm
PHOTONS = 3e5  # mean number of photons per mm^2 at the detector behind the breast
ELECTRONIC_NOISE = 5.0  # standard deviation in photons per pixel
EQUALIZATION = 0.85  # share of the thinning toward the edge that peripheral equalization compensates

STORED_FAT = 12800  # the stored value of full-thickness fat
STORED_PER_UNIT = 18400.0  # stored values per unit of log attenuation


def attenuation(
    thickness: np.ndarray, skin: np.ndarray, muscle: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The line integral of attenuation, and the coefficient (1/mm) of the tissue that a body displaces, both [H, W].

    Masses grow in gland more often than in fat. Where the glandular share of the column is s, that of the displaced
    tissue is taken as ``1 - (1 - s)^2``. So masses have little contrast in dense breasts.

    Args:
        thickness, skin, muscle: path lengths in mm, [H, W].
        share: glandular share of the interior, [H, W] in [0, 1].
    """
    fat, step = np.float32(MU_FAT), np.float32(MU_GLAND - MU_FAT)
    path = thickness - skin - muscle
    return MU_SKIN * skin + (fat + step * share) * path + MU_MUSCLE * muscle, fat + step * (1 - (1 - share) ** 2)


@dataclass(frozen=True)
class Beam:
    """The exposure of a breast: scatter at each pixel (share of the open beam), and photons per pixel (``gain``).

    The beam of the healthy breast is also used for the same breast with findings. So a finding changes neither exposure
    nor scatter, and both images are equal bit by bit wherever the tissue is equal.
    """

    scatter: np.ndarray  # [H, W]
    gain: np.float32


def set_beam(integral: np.ndarray, inside: np.ndarray, grid: Grid) -> Beam:
    """The beam for a healthy breast with this line integral, [H, W]; ``inside`` is the breast, bool [H, W]."""
    primary = np.exp(-integral)
    scatter = np.float32(SCATTER_FRACTION) * _blur(primary, SCATTER_SIGMA / grid.spacing)
    mean = ((1 - SCATTER_FRACTION) * primary + scatter)[inside].mean()
    return Beam(scatter, np.float32(PHOTONS * grid.spacing**2 / mean))


def expose(rng: np.random.Generator, integral: np.ndarray, beam: Beam) -> np.ndarray:
    """Log attenuation at the detector, [H, W], with scatter and noise."""
    photons = (np.float32(1 - SCATTER_FRACTION) * np.exp(-integral) + beam.scatter) * beam.gain
    # The normal limit of Poisson noise: hundreds of photons reach even the smallest, darkest pixel.
    photons += np.sqrt(photons + ELECTRONIC_NOISE**2) * rng.standard_normal(photons.shape, dtype=np.float32)
    return -np.log(np.maximum(photons, 1) / beam.gain)


def present(
    log_attenuation: np.ndarray, inside: np.ndarray, thickness: np.ndarray, slab: float, grid: Grid
) -> np.ndarray:
    """Stored values, uint16 [H, W], after a vendor's typical processing: peripheral equalization, air set to black.

    Args:
        log_attenuation: from `expose`, [H, W].
        inside, thickness: as in `Anatomy`, [H, W] in mm.
        slab: thickness of the compressed breast in mm.
    """
    edge = np.clip(inside / grid.spacing + 0.5, 0, 1)
    value = log_attenuation - MU_FAT * slab + edge * (EQUALIZATION * MU_FAT) * (slab - thickness)
    stored = np.clip(np.rint(STORED_FAT + STORED_PER_UNIT * value), 0, 65535).astype(np.uint16)
    stored[edge == 0] = 0
    return stored


def fit_window(integral: np.ndarray, beam: Beam, anatomy: Anatomy, slab: float, grid: Grid) -> tuple[float, float]:
    """The window (center, width) that fits the tissue of the healthy breast, from a coarse copy without noise."""
    thin = (slice(None, None, max(1, grid.height // 256)),) * 2
    primary = np.float32(1 - SCATTER_FRACTION) * np.exp(-integral[thin]) + beam.scatter[thin]
    stored = present(-np.log(primary), anatomy.inside[thin], anatomy.thickness[thin], slab, grid)
    tissue = (anatomy.inside[thin] > 2) & (anatomy.muscle[thin] == 0)
    dark, bright = np.quantile(stored[tissue], (0.02, 0.995))
    low, high = max(0.0, dark - 0.3 * (bright - dark)), bright + 0.15 * (bright - dark)
    return round((low + high) / 2), round(high - low)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """A wide Gaussian, computed on a coarse copy."""
    height, width = image.shape
    factor = max(1.0, sigma / 4)
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    coarse = np.asarray(Image.fromarray(image).resize(small, Image.Resampling.BOX))
    coarse = ndimage.gaussian_filter(coarse, (sigma * small[1] / height, sigma * small[0] / width), mode="nearest")
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))

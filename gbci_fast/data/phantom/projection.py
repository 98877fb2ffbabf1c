"""X-rays through tissue: Beer-Lambert at 20 keV, scatter, photon noise, logarithm, and the image for presentation."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from gbci_fast.data.phantom.anatomy import Anatomy, Grid

# Linear attenuation at 20 keV in 1/mm (Johns and Yaffe, Phys. Med. Biol. 32, 1987, for the first two).
MU_FAT = 0.0456
MU_GLAND = 0.0802
MU_SKIN = 0.0800
MU_MUSCLE = 0.0820
MU_CALCIFICATION = 2.0

SCATTER_FRACTION = 0.15
SCATTER_SIGMA = 8.0  # mm
PHOTONS = 3e5  # per mm^2 at the detector behind the breast, on average
ELECTRONIC_NOISE = 5.0  # photons per pixel, standard deviation
EQUALIZATION = 0.85  # of the thinning toward the edge that processing gives back

STORED_FAT = 12800  # the stored value of full-thickness fat
STORED_PER_UNIT = 18400.0  # stored values per unit of log attenuation


@dataclass(frozen=True)
class Presentation:
    """Stored values [H, W] uint16, and the window (center, width) to show them with."""

    stored: np.ndarray
    window: tuple[float, float]


def attenuation(anatomy: Anatomy, glandular: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The line integral of attenuation and the local mean coefficient of the interior (1/mm), both [H, W]."""
    interior = MU_FAT + (MU_GLAND - MU_FAT) * glandular
    path = anatomy.thickness - anatomy.skin - anatomy.muscle
    return MU_SKIN * anatomy.skin + interior * path + MU_MUSCLE * anatomy.muscle, interior


def expose(rng: np.random.Generator, integral: np.ndarray, inside: np.ndarray, grid: Grid) -> np.ndarray:
    """Log attenuation as the detector sees it: [H, W], scattered and noisy."""
    primary = np.exp(-integral)
    beam = (1 - SCATTER_FRACTION) * primary + SCATTER_FRACTION * _blur(primary, SCATTER_SIGMA / grid.spacing)
    gain = np.float32(PHOTONS * grid.spacing**2 / beam[inside].mean())
    photons = beam * gain
    # Poisson in its normal limit: hundreds of photons reach even the smallest, darkest pixel.
    photons += np.sqrt(photons + ELECTRONIC_NOISE**2) * rng.standard_normal(photons.shape, dtype=np.float32)
    return -np.log(np.maximum(photons, 1) / gain)


def present(log_attenuation: np.ndarray, anatomy: Anatomy, slab: float, grid: Grid) -> Presentation:
    """What a vendor's processing does: peripheral equalization, air to black, a window that fits this breast."""
    edge = np.clip(anatomy.inside / grid.spacing + 0.5, 0, 1)
    value = log_attenuation - MU_FAT * slab + edge * (EQUALIZATION * MU_FAT) * (slab - anatomy.thickness)
    stored = np.clip(np.rint(STORED_FAT + STORED_PER_UNIT * value), 0, 65535).astype(np.uint16)
    stored[edge == 0] = 0
    step = max(1, grid.height // 512)
    tissue = (anatomy.inside > 2) & (anatomy.muscle == 0)
    dark, bright = np.quantile(stored[::step, ::step][tissue[::step, ::step]], (0.02, 0.995))
    low, high = max(0.0, dark - 0.3 * (bright - dark)), bright + 0.15 * (bright - dark)
    return Presentation(stored, (round((low + high) / 2), round(high - low)))


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """A wide Gaussian, computed on a coarse copy."""
    height, width = image.shape
    factor = max(1.0, sigma / 4)
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    coarse = np.asarray(Image.fromarray(image).resize(small, Image.Resampling.BOX))
    coarse = ndimage.gaussian_filter(coarse, (sigma * small[1] / height, sigma * small[0] / width), mode="nearest")
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))

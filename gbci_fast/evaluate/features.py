"""The interface of feature extractors for lesion crops, radiomic features, and the energies of fine bands."""

import hashlib
import importlib.metadata
from typing import Protocol

import numpy as np
from scipy import stats
from skimage.feature import graycomatrix, graycoprops
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops

from gbci_fast.data.boxes import bounding_box
from gbci_fast.evaluate.detail import SCALES, SEAM, band_energies
from gbci_fast.evaluate.lesions import NATIVE_SIZE, Crops

GRAY_LEVELS = 32
DISTANCES = (1, 3)
ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
TEXTURES = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")
SHAPES = ("area_share", "eccentricity", "solidity", "extent")
FIRST_ORDER = ("mean", "sd", "skewness", "kurtosis", "p10", "median", "p90", "entropy")


class Extractor(Protocol):
    """Maps each crop to a feature vector.

    Attributes:
        name: of the extractor, in reports.
        digest: SHA-256 (hexadecimal) of all that decides the output: weights and settings, or the code's settings.
        standardized: whether the features have different units, so that each is standardized before sets are compared.
        gaussian: whether a Gaussian can be fitted to a few dozen crops: there are fewer features than crops. Without,
            sets are compared by the kernel distance alone.
    """

    name: str
    digest: str
    standardized: bool
    gaussian: bool

    def __call__(self, crops: Crops) -> np.ndarray:
        """The features, float64 [N, D]."""
        ...


class Radiomics:
    """First-order statistics, gray-level co-occurrence textures and shape, of the masked pixels only.

    Textures (Haralick et al. 1973; scikit-image) are computed from `GRAY_LEVELS` levels between 0 and 1, at the offsets
    of `DISTANCES`, averaged over `ANGLES`. Shape is that of the largest bright region that Otsu's threshold finds among
    the masked pixels, because the mask's own shape does not depend on the painting.
    """

    name = "radiomics"
    standardized = gaussian = True

    def __init__(self) -> None:
        version = importlib.metadata.version("scikit-image")
        settings = (version, GRAY_LEVELS, DISTANCES, ANGLES, TEXTURES, SHAPES, FIRST_ORDER)
        self.digest = hashlib.sha256(repr(settings).encode()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the D features, in order."""
        textures = tuple(f"glcm_{name}_{distance}" for distance in DISTANCES for name in TEXTURES)
        return tuple(f"first_order_{name}" for name in FIRST_ORDER) + textures + tuple(f"shape_{n}" for n in SHAPES)

    def __call__(self, crops: Crops) -> np.ndarray:
        """float64 [N, D]."""
        rows = [
            np.concatenate([_first_order(pixels[mask]), _textures(pixels, mask), _shape(pixels, mask)])
            for pixels, mask in zip(crops.pixels.astype(np.float64), crops.masks, strict=True)
        ]
        return np.stack(rows)


class Bands:
    """The energies of fine bands inside the lesions, at model pixels (see `band_energies`).

    Radiomics see no fine detail, because crops are resampled: real lesions blurred by a pixel look real to them.
    """

    name = "bands"
    standardized = gaussian = True

    def __init__(self) -> None:
        self.digest = hashlib.sha256(repr((NATIVE_SIZE, SEAM, SCALES)).encode()).hexdigest()

    def __call__(self, crops: Crops) -> np.ndarray:
        """float64 [N, D]."""
        return band_energies(crops)


def _first_order(values: np.ndarray) -> np.ndarray:
    shares = np.histogram(values, GRAY_LEVELS, (0, 1))[0] / len(values)
    flat = np.ptp(values) < 1e-6  # no skewness without a spread
    shape = (0.0, 0.0) if flat else (stats.skew(values), stats.kurtosis(values))
    return np.array([values.mean(), values.std(), *shape, *np.quantile(values, (0.1, 0.5, 0.9)), stats.entropy(shares)])


def _textures(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Textures of pairs of masked pixels; unmasked pixels get a level of their own, which is dropped."""
    levels = np.where(mask, np.minimum((pixels * GRAY_LEVELS).astype(np.uint8), GRAY_LEVELS - 1) + 1, 0).astype(
        np.uint8
    )
    xmin, ymin, xmax, ymax = bounding_box(mask)
    box = levels[ymin:ymax, xmin:xmax]
    counts = graycomatrix(box, DISTANCES, ANGLES, levels=GRAY_LEVELS + 1, symmetric=True)[1:, 1:].astype(np.float64)
    shares = counts / np.maximum(counts.sum((0, 1), keepdims=True), 1)
    return np.concatenate([[graycoprops(shares, name)[d].mean() for name in TEXTURES] for d in range(len(DISTANCES))])


def _shape(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    values = pixels[mask]
    if np.ptp(values) < 1e-6:
        return np.array([1.0, 0.0, 1.0, 1.0])  # no bright region: the whole mask, taken as a disk
    regions = regionprops(label(mask & (pixels > threshold_otsu(values))))
    largest = max(regions, key=lambda region: region.area)
    return np.array([largest.area / mask.sum(), largest.eccentricity, largest.solidity, largest.extent])

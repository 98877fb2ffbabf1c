"""Stored pixel values to display values and back: the grayscale pipeline of DICOM PS3.4 N.2 as one lookup table.

Mammograms store at most 16 bits, so every step (modality rescale or LUT, VOI window or LUT, MONOCHROME1 inversion,
padding) folds into a table with one entry per possible stored value. Applying it is one gather; inverting it is an
interpolation on the same table.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydicom import Dataset
from pydicom.uid import (
    BreastProjectionXRayImageStorageForProcessing,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForProcessing,
)
from scipy.special import expit

from gbci_fast.dicom.file import code_string, first_number, numbers
from gbci_fast.dicom.luts import lut_bits, lut_entries
from gbci_fast.errors import GBCIError

# Percentiles of the breast (percent) shown as black and white where the header states no VOI transformation.
BREAST_PERCENTILES = (0.5, 99.9)
FOR_PROCESSING_CLASSES = (
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForProcessing,
    BreastProjectionXRayImageStorageForProcessing,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Presentation:
    """The mapping between stored integers and display values in [0, 1] (0 = black, bright = dense).

    Attributes:
        levels: float32 [2 ** bits_stored], the display value of every stored value, before padding is set to 0. The
            index is the stored value; negative values index from the end, as two's complement does.
        signed: whether stored values are two's complement (PixelRepresentation 1).
        padding: lowest and highest stored value that mean "no image here" (PS3.3 C.7.5.1.1.2), or ``None``.
        kind: the VOI transformation: "window", "sigmoid", "lut", "percentiles", "for processing" or "full scale".
        window: WindowCenter and WindowWidth (LINEAR, of modality values) that a copy of the image must state in order
            to display alike; ``None`` if the header states a VOI transformation, or if `lut` is needed.
        lut: VOI LUT that a copy must state if no window displays alike: first input value, and uint16 [N] (65535 = 1).
    """

    levels: np.ndarray
    kind: str
    signed: bool = False
    padding: tuple[int, int] | None = None
    window: tuple[float, float] | None = None
    lut: tuple[int, np.ndarray] | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and highest value that BitsStored can hold."""
        return stored_range(len(self.levels).bit_length() - 1, signed=self.signed)

    def is_padding(self, stored: np.ndarray) -> np.ndarray:
        """bool [H, W]: where ``stored`` [H, W] holds padding instead of an image."""
        if self.padding is None:
            return np.zeros(stored.shape, bool)
        return (stored >= self.padding[0]) & (stored <= self.padding[1])

    def to_unit(self, stored: np.ndarray) -> np.ndarray:
        """Display values, float32 [H, W] in [0, 1], of native integers [H, W]; padding is 0."""
        return self._padded_levels[stored]

    def paste(self, stored: np.ndarray, unit_new: np.ndarray) -> np.ndarray:
        """New stored values whose display is ``unit_new``: stored + inverse(unit_new) - inverse(to_unit(stored)).

        Where the VOI transformation clips, its inverse ends at the clipping point, so the difference is added to
        what was stored. A pixel whose ``unit_new`` equals `to_unit` bit for bit, and padding, keep their value.

        Args:
            stored: integers [H, W] as read.
            unit_new: float [H, W] in [0, 1]; values outside are clipped.

        Returns:
            [H, W] in the dtype of ``stored``, within BitsStored, never on the padding value.

        Raises:
            GBCIError: ``unit_new`` has another shape or is not finite, or the transformation is not monotone.
        """
        if unit_new.shape != stored.shape:
            raise GBCIError(f"the new image has shape {unit_new.shape}; expected that of the original, {stored.shape}")
        unit_old = self.to_unit(stored)
        changed = (unit_new != unit_old) & ~self.is_padding(stored)
        target = unit_new[changed].astype(np.float64)
        if not np.isfinite(target).all():
            raise GBCIError("the new image holds NaN or infinity; expected values in [0, 1]")
        pasted = stored.copy()
        if target.size:
            pasted[changed] = self._to_stored(
                stored[changed] + self._inverse(target) - self._inverse(unit_old[changed])
            )
        return pasted

    def _to_stored(self, values: np.ndarray) -> np.ndarray:
        """Rounds float64 [N] to legal stored values, beside the padding range where they would fall into it."""
        lowest, highest = self.limits
        rounded = np.clip(np.rint(values), lowest, highest)
        if self.padding is None:
            return rounded
        below, above = self.padding[0] - 1, self.padding[1] + 1
        go_below = below >= lowest and ((above > highest) | (values - below < above - values))
        return np.where(self.is_padding(rounded), np.where(go_below, below, above), rounded)

    def _inverse(self, unit: np.ndarray) -> np.ndarray:
        """Stored values, float64 [N], whose display is ``unit`` [N]."""
        return np.interp(unit, *self._inverse_knots)

    @cached_property
    def _padded_levels(self) -> np.ndarray:
        levels = self.levels.copy()
        if self.padding is not None:
            levels[np.arange(self.padding[0], self.padding[1] + 1)] = 0.0
        return levels

    @cached_property
    def _inverse_knots(self) -> tuple[np.ndarray, np.ndarray]:
        """Strictly increasing display values and their stored values, both float64.

        A run of equal display values is represented by its middle; the clipped runs at the two ends by the edge at
        which clipping begins.
        """
        lowest, highest = self.limits
        values = np.arange(lowest, highest + 1)
        levels = self.levels[values].astype(np.float64)
        if levels[0] > levels[-1]:
            values, levels = values[::-1], levels[::-1]
        if (np.diff(levels) < 0).any():
            raise GBCIError("the image's lookup table is not monotone, so no change of brightness can be stored back")
        display, first, count = np.unique(levels, return_index=True, return_counts=True)
        last = first + count - 1
        middle = (values[first] + values[last]) / 2
        middle[0], middle[-1] = values[last[0]], values[first[-1]]
        return display, middle


def stored_range(bits_stored: int, *, signed: bool) -> tuple[int, int]:
    """The lowest and highest value of `bits_stored` bits."""
    return (-(2 ** (bits_stored - 1)), 2 ** (bits_stored - 1) - 1) if signed else (0, 2**bits_stored - 1)


def full_scale(bits_stored: int) -> Presentation:
    """A presentation of unsigned values in which 0 is black and ``2 ** bits_stored - 1`` is white."""
    size = 2**bits_stored
    return Presentation(levels=np.linspace(0, 1, size, dtype=np.float32), kind="full scale", window=(size / 2, size))


def presentation_of(dataset: Dataset, stored: np.ndarray) -> Presentation:
    """The presentation that a monochrome image's header states, or one by percentiles if the header states no VOI.

    The first of several VOI transformations is used, a VOI LUT before a window. PresentationLUTShape is ignored: it has
    to agree with PhotometricInterpretation (PS3.3 C.8.11.7), and MONOCHROME1 alone decides the inversion.

    An image For Processing holds X-ray intensity and states no VOI. PixelIntensityRelationship (LIN: the logarithm is
    taken) and its sign (1: larger values are less dense; PS3.3 C.8.11.3.1.2) then make dense tissue bright, whatever
    PhotometricInterpretation says.

    Args:
        dataset: header with PhotometricInterpretation, BitsStored and PixelRepresentation.
        stored: integers [H, W] within BitsStored.

    Raises:
        GBCIError: a window, rescale, LUT or padding value is illegal, or the image displays as a single value.
    """
    bits, signed = int(dataset.BitsStored), dataset.PixelRepresentation == 1
    padding = _padding(dataset, bits, signed)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"

    counts = np.bincount((stored.view(f"u{stored.itemsize}") & (2**bits - 1)).ravel(), minlength=2**bits)
    if padding is not None:
        counts[np.arange(padding[0], padding[1] + 1)] = 0

    values = np.arange(2**bits, dtype=np.float64)
    if signed:
        values[2 ** (bits - 1) :] -= 2**bits
    values = _modality(dataset, values)
    window = lut = None
    if is_for_processing(dataset) and not _displays_dense_bright(dataset, inverted):
        levels, lut = _processed(dataset, values, counts, inverted)
        kind = "for processing"
    elif dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        levels, kind = _lookup(dataset, item, values) / (2 ** lut_bits(item) - 1), "lut"
    elif first_number(dataset, "WindowCenter") is not None or first_number(dataset, "WindowWidth") is not None:
        levels, kind = _window(dataset, values)
    else:
        bottom, top = _breast_range(values, counts, inverted)
        levels, kind, window = _ramp(values, bottom, top), "percentiles", ((bottom + top + 1) / 2, top - bottom + 1)
    if inverted:
        levels = 1 - levels

    levels = levels.astype(np.float32)
    shown = levels[counts > 0]
    if shown.size == 0 or shown.min() == shown.max():
        raise GBCIError("every pixel displays as one and the same value; expected an image")
    return Presentation(levels=levels, kind=kind, signed=signed, padding=padding, window=window, lut=lut)


def is_for_processing(dataset: Dataset) -> bool:
    """Whether an image is raw detector data, by its SOP class or PresentationIntentType."""
    intent = code_string(dataset, "PresentationIntentType")
    return intent == "FOR PROCESSING" or dataset.get("SOPClassUID") in FOR_PROCESSING_CLASSES


def _displays_dense_bright(dataset: Dataset, inverted: bool) -> bool:
    """Whether an image For Processing states a VOI nevertheless, and that VOI shows dense tissue bright."""
    stated = dataset.get("VOILUTSequence") or first_number(dataset, "WindowCenter") is not None
    return bool(stated) and _falls(dataset, inverted) == inverted


def _falls(dataset: Dataset, inverted: bool) -> bool:
    """Whether larger values are less dense: by PixelIntensityRelationshipSign, else by MONOCHROME1 (``inverted``)."""
    sign = dataset.get("PixelIntensityRelationshipSign")
    return sign == 1 if sign in (1, -1) else inverted


def _processed(
    dataset: Dataset, values: np.ndarray, counts: np.ndarray, inverted: bool
) -> tuple[np.ndarray, tuple[int, np.ndarray]]:
    """VOI output [N] in [0, 1] and VOI LUT that show attenuation between percentiles of the breast.

    Of linear X-ray intensities ``values``, float64 [N], attenuation is minus the logarithm: a millimeter of tissue then
    changes the display by the same amount everywhere (Beer-Lambert). Intensities up to 0 were not exposed and do not
    count in the percentiles.
    """
    if dataset.get("ModalityLUTSequence") or (values != np.rint(values)).any() or np.ptp(values) != len(values) - 1:
        raise GBCIError("an image For Processing with a modality transformation; expected none (PS3.3 C.8.11.3)")
    falls = _falls(dataset, inverted)
    density = -values if falls else values
    if falls and code_string(dataset, "PixelIntensityRelationship") == "LIN":
        exposed = values > 0
        if not exposed.any():
            raise GBCIError("an image For Processing without a positive X-ray intensity; expected some")
        density = -np.log(np.where(exposed, values, values[exposed].min()))
        counts = np.where(exposed, counts, 0)
    table = np.rint(_ramp(density, *_breast_range(density, counts, inverted=False)) * 65535)
    if inverted:
        table = 65535 - table
    order = np.argsort(values)
    return table / 65535, (int(values[order[0]]), table[order].astype(np.uint16))


def _padding(dataset: Dataset, bits: int, signed: bool) -> tuple[int, int] | None:
    """PixelPaddingValue to PixelPaddingRangeLimit, in either order, inclusive (PS3.3 C.7.5.1.1.2)."""
    value, other = (_whole_number(dataset, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return None
    ends = sorted(_as_stored(end, signed) for end in (value, value if other is None else other))
    lowest, highest = stored_range(bits, signed=signed)
    # No pixel can hold a value outside BitsStored.
    if ends[0] > highest or ends[1] < lowest:
        return None
    return max(ends[0], lowest), min(ends[1], highest)


def _whole_number(dataset: Dataset, keyword: str) -> int | None:
    """The single integer of an attribute; ``None`` where absent or blank."""
    values = numbers(dataset, keyword)
    if len(values) > 1 or not all(map(float.is_integer, values)):
        raise GBCIError(f"{keyword} holds {values}; expected one integer")
    return int(values[0]) if values else None


def _as_stored(value: int, signed: bool) -> int:
    """A padding value with the sign of the pixels. Its VR (US or SS) often contradicts PixelRepresentation."""
    value &= 0xFFFF
    return value - 0x10000 if signed and value >= 0x8000 else value


def _modality(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Modality LUT or rescale (PS3.3 C.11.1) of stored values, float64 [N] -> [N]."""
    if dataset.get("ModalityLUTSequence"):
        return _lookup(dataset, dataset.ModalityLUTSequence[0], values)
    slope, intercept = first_number(dataset, "RescaleSlope"), first_number(dataset, "RescaleIntercept")
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    with np.errstate(over="ignore"):
        rescaled = values * slope + intercept
    if slope == 0 or not np.isfinite(rescaled).all():
        raise GBCIError(f"RescaleSlope is {slope} and RescaleIntercept {intercept}; expected finite, non-zero scaling")
    return rescaled


def _window(dataset: Dataset, values: np.ndarray) -> tuple[np.ndarray, str]:
    """VOI window (PS3.3 C.11.2.1.2 and C.11.2.1.3) of modality values, float64 [N] -> [0, 1] [N]."""
    center, width = first_number(dataset, "WindowCenter"), first_number(dataset, "WindowWidth")
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise GBCIError(f"VOILUTFunction is {function!r}; expected LINEAR, LINEAR_EXACT or SIGMOID")
    narrowest = 1 if function == "LINEAR" else np.finfo(float).tiny
    if center is None or width is None or not np.isfinite(center) or not narrowest <= width < np.inf:
        raise GBCIError(f"WindowCenter is {center} and WindowWidth {width}; expected numbers that {function} allows")
    if function == "SIGMOID":
        return expit(4 * (values - center) / width), "sigmoid"
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return _ramp(values, center - width / 2, center + width / 2), "window"


def _breast_range(values: np.ndarray, counts: np.ndarray, inverted: bool) -> tuple[float, float]:
    """Lowest and highest modality value of the breast, cut at `BREAST_PERCENTILES`.

    Every pixel that is not of the darkest value counts as breast.

    Args:
        values: float64 [N], modality value of each stored value.
        counts: int [N], number of pixels that hold each stored value.
        inverted: whether larger values are darker.
    """
    present = np.flatnonzero(counts)
    present = present[np.argsort(-values[present] if inverted else values[present], kind="stable")]
    breast = present[values[present] != values[present[:1]]]
    if breast.size == 0:
        raise GBCIError("every pixel has one and the same value; expected an image")
    share = 100 * np.cumsum(counts[breast]) / counts[breast].sum()
    dark, bright = (values[breast[np.searchsorted(share, percent)]] for percent in BREAST_PERCENTILES)
    if dark == bright:
        dark = values[present[0]]
    return float(min(dark, bright)), float(max(dark, bright))


def _ramp(values: np.ndarray, bottom: float, top: float) -> np.ndarray:
    """0 up to ``bottom``, 1 above ``top``, linear between; a step where they are equal."""
    if bottom == top:
        return (values > top).astype(np.float64)
    return np.clip((values - bottom) / (top - bottom), 0, 1)


def _lookup(dataset: Dataset, item: Dataset, values: np.ndarray) -> np.ndarray:
    """The entries of a Modality or VOI LUT item at ``values``, float64 [N] -> [N]."""
    table = lut_entries(item, big_endian=dataset.original_encoding[1] is False)
    first = int(item.LUTDescriptor[1])
    # The first input value is signed if the LUT's input is; after a rescale neither VR nor PixelRepresentation tells.
    if first >= 0x8000 and values.min() < 0:
        first -= 0x10000
    return table.astype(np.float64)[np.clip(np.rint(values) - first, 0, len(table) - 1).astype(np.intp)]

"""Segmentation of the breast in unusual files: labels beside it, contradicting sides, raw images."""

from functools import partial

import numpy as np
import pytest

from gbci_fast.data.frame import whole_breast_frame
from gbci_fast.data.segmentation import breast_mask, chest_wall_side
from gbci_fast.dicom.acquisition import side_contradiction
from gbci_fast.dicom.reading import read_mammogram

from .classes import BREAST, FULL_12, RAW, with_label
from .files import make

LABEL = np.s_[6:16, 74:90]


@pytest.fixture
def read(tmp_path):
    def read(build):
        (tmp_path / "image.dcm").write_bytes(build())
        return read_mammogram(tmp_path / "image.dcm")

    return read


def overlap(a, b):
    """Dice coefficient."""
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_label_beside_the_breast_is_no_breast(read):
    plain = breast_mask(read(partial(make, BREAST, **FULL_12)).unit())
    labeled = read(partial(make, with_label(), **FULL_12)).unit()
    assert labeled[LABEL].max() > labeled[BREAST > 1000].max()  # brighter than all of it
    mask = breast_mask(labeled)
    assert not mask[LABEL].any()
    assert overlap(mask, plain) > 0.98
    frame, expected = whole_breast_frame(mask), whole_breast_frame(plain)
    corners = np.array([(f.x0, f.y0, f.x1, f.y1) for f in (frame, expected)])
    assert np.abs(corners[0] - corners[1]).max() <= 2
    assert frame.flip == expected.flip


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("side", ["L", "R", None])
def test_pixels_decide_the_flip_and_a_contradiction_is_said(read, mirrored, side):
    pixels = np.ascontiguousarray(BREAST[:, ::-1]) if mirrored else BREAST
    mammogram = read(partial(make, pixels, ImageLaterality=side, **FULL_12))
    mask = breast_mask(mammogram.unit())
    assert mammogram.laterality == side
    assert whole_breast_frame(mask).flip == mirrored
    said = side_contradiction(mammogram.laterality, chest_wall_side(mask))
    names = {"L": "left", "R": "right"}
    if side is None or side == "LR"[mirrored]:
        assert said is None
    else:
        assert said == f"stated to be a {names[side]} breast, but the chest wall lies on the {names['LR'[mirrored]]}"


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_raw_image_shows_the_breast_of_the_processed_one(read, photometric):
    # Beer-Lambert: 3900 in air, and e^-3 of that behind the densest tissue.
    processed = read(partial(make, BREAST, **FULL_12)).unit()
    density = processed / processed.max()
    intensity = np.rint(3900 * np.exp(-3 * density)).astype(np.uint16)
    tags = {"PixelIntensityRelationship": "LIN", "PixelIntensityRelationshipSign": 1}
    raw = read(partial(make, intensity, PhotometricInterpretation=photometric, **tags, **RAW))
    unit = raw.unit()
    inside = (unit > 0.05) & (unit < 0.95)
    slope, offset = np.polyfit(density[inside], unit[inside], 1)
    # Proportional to the attenuation, up to the rounding of the smallest intensities.
    np.testing.assert_allclose(unit[inside], slope * density[inside] + offset, atol=2e-3)
    assert slope > 0
    assert overlap(breast_mask(unit), breast_mask(processed)) > 0.97

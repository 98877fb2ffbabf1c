"""The box around a mask, and the ellipse in a box."""

import numpy as np
import pytest

from gbci_fast.data.boxes import bounding_box, box_ellipse


def test_bounding_box():
    mask = np.zeros((6, 10), bool)
    mask[1, 7] = mask[4, 2] = True
    assert bounding_box(mask) == (2, 1, 8, 5)


def test_box_ellipse():
    ellipse = box_ellipse((2, 1, 8, 5), (6, 10))
    assert bounding_box(ellipse) == (2, 1, 8, 5)
    assert ellipse.sum() == pytest.approx(np.pi * 3 * 2, rel=0.15)
    assert np.array_equal(ellipse, ellipse[:, ::-1])  # centered
    for low, pixel in ((3.4, 3), (3.1, 3), (3.9, 4), (9.0, 9)):  # smaller than a pixel, at any offset
        drawn = box_ellipse((low, low, low + 0.2, low + 0.2), (10, 10))
        assert np.argwhere(drawn).tolist() == [[pixel, pixel]]
    assert not box_ellipse((10, 3, 12, 5), (6, 10)).any()

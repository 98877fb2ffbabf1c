"""Boxes (xmin, ymin, xmax, ymax) in pixels, half-open: around a mask, and the ellipse in a box."""

import numpy as np

Box = tuple[float, float, float, float]


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box that holds all pixels of a mask, bool [H, W] with at least one pixel."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def box_ellipse(box: Box, shape: tuple[int, int]) -> np.ndarray:
    """The ellipse inscribed in a box (xmin, ymin, xmax, ymax), bool [H, W]: all pixels whose centers lie inside.

    An ellipse that contains no pixel center gives the pixel at its own center, if that lies inside the image.
    """
    xmin, ymin, xmax, ymax = box
    y, x = np.ogrid[: shape[0], : shape[1]]
    rx, ry = max(0.5, (xmax - xmin) / 2), max(0.5, (ymax - ymin) / 2)
    center_x, center_y = (xmin + xmax) / 2, (ymin + ymax) / 2
    inside = ((x + 0.5 - center_x) / rx) ** 2 + ((y + 0.5 - center_y) / ry) ** 2 <= 1.0
    if not inside.any() and 0 <= center_x < shape[1] and 0 <= center_y < shape[0]:
        inside[int(center_y), int(center_x)] = True
    return inside

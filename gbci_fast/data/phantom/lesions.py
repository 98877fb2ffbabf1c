"""Lesions as path lengths: round, lobulated and spiculated masses, and clusters of calcifications."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from skimage.morphology import convex_hull_image

from gbci_fast.data.phantom.anatomy import Grid
from gbci_fast.data.phantom.projection import MU_CALCIFICATION, MU_GLAND

MASS_RADII = (5.0, 7.0, 9.0)  # mm
LEAST_PATH = 0.1  # mm: thinner than this is no lesion, so that the mask is exact


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One lesion and its description: VinDr category, BI-RADS, report sentence and pathology.

    ``radius`` is in mm, ``density`` relative to glandular tissue (masses only).
    """

    kind: str
    radius: float
    density: float
    category: str
    birads: int
    pathology: str
    report: str


@dataclass(frozen=True, kw_only=True)
class LesionPatch:
    """Rows and columns of the image, and there: the attenuation that the lesion adds, and where it is (bool)."""

    window: tuple[slice, slice]
    added: np.ndarray
    mask: np.ndarray


def draw_lesion(rng: np.random.Generator) -> Lesion:
    """Masses three times in four, clusters of calcifications otherwise."""
    kind = rng.choice(("round", "lobulated", "spiculated", "calcifications"))
    suspicion = rng.uniform()
    if kind == "calcifications":
        return Lesion(
            kind=str(kind),
            radius=5.0,
            density=0.0,
            category="Suspicious Calcification",
            birads=4 if suspicion < 0.7 else 5,
            pathology="benign" if suspicion < 0.5 else "malignant",
            report="pleomorphic calcifications with clustered distribution",
        )
    spiculated = kind == "spiculated"
    return Lesion(
        kind=str(kind),
        radius=float(rng.choice(MASS_RADII)),
        density=rng.uniform(1.0, 1.1),
        category="Mass",
        birads=3 if not spiculated else 4 if suspicion < 0.4 else 5,
        pathology="malignant" if spiculated else "benign",
        report="irregular mass with spiculated margins" if spiculated else f"{kind} mass with circumscribed margins",
    )


def render_lesion(
    rng: np.random.Generator,
    lesion: Lesion,
    center: tuple[float, float],  # (x, y) mm
    duct: float,  # radians, the direction to the nipple
    interior: np.ndarray,  # [H, W] attenuation of the tissue that a mass displaces, 1/mm
    room: np.ndarray,  # [H, W] path between the skins, mm: no lesion is thicker
    grid: Grid,
) -> LesionPatch:
    """The lesion at ``center``; outside the mask it adds exactly nothing."""
    window = _window(center, 3.2 * lesion.radius, grid)
    dx = grid.x[:, window[1]] - np.float32(center[0])
    dy = grid.y[window[0], :] - np.float32(center[1])
    path = _PATHS[lesion.kind](rng, lesion.radius, dx, dy, duct, grid.spacing)
    if lesion.kind == "calcifications":
        path[path < 0.02 * path.max()] = 0
        return LesionPatch(window=window, added=MU_CALCIFICATION * path, mask=convex_hull_image(path > 0))
    path = np.minimum(path, room[window])
    path[path < LEAST_PATH] = 0
    added = (lesion.density * MU_GLAND - interior[window]) * path
    return LesionPatch(window=window, added=added, mask=path > 0)


def _window(center: tuple[float, float], reach: float, grid: Grid) -> tuple[slice, slice]:
    column, row = center[0] / grid.spacing, center[1] / grid.spacing + grid.height / 2
    pixels = reach / grid.spacing
    return (
        slice(max(0, int(row - pixels)), min(grid.height, int(row + pixels) + 1)),
        slice(max(0, int(column - pixels)), min(grid.width, int(column + pixels) + 1)),
    )


def _round_path(rng, radius, dx, dy, duct, spacing) -> np.ndarray:
    return _solid(dx, dy, radius * _ripple(rng, np.arctan2(dy, dx), range(2, 4), 0.05))


def _lobulated_path(rng, radius, dx, dy, duct, spacing) -> np.ndarray:
    angle = np.arctan2(dy, dx)
    lobes = np.abs(np.cos(rng.integers(3, 6) * angle / 2 + rng.uniform(0, np.pi)))
    return _solid(dx, dy, radius * (0.8 + 0.25 * lobes) * _ripple(rng, angle, range(1, 4), 0.1))


def _spiculated_path(rng, radius, dx, dy, duct, spacing) -> np.ndarray:
    """An irregular core, and strands that leave it, taper and fork."""
    path = _solid(dx, dy, 0.85 * radius * _ripple(rng, np.arctan2(dy, dx), range(2, 12), 0.16))
    count = int(rng.integers(14, 23))
    for i in range(count):
        angle = 2 * np.pi * (i + rng.uniform(-0.35, 0.35)) / count
        length = radius * rng.uniform(0.9, 2.0)
        width = rng.uniform(0.6, 1.2)
        start = 0.6 * radius * _direction(angle)
        fork = start + 0.6 * length * _direction(angle)
        path = np.maximum(path, _strand(dx, dy, start, fork, width, 0.7 * width, spacing))
        for turn in (rng.uniform(0.1, 0.4), -rng.uniform(0.1, 0.4)):
            tip = fork + 0.5 * length * _direction(angle + turn)
            path = np.maximum(path, _strand(dx, dy, fork, tip, 0.7 * width, 0.2 * width, spacing))
    return path


def _cluster_path(rng, radius, dx, dy, duct, spacing) -> np.ndarray:
    """Specks along a duct; each keeps its volume however coarse the pixels."""
    path = np.zeros(np.broadcast_shapes(dx.shape, dy.shape), np.float32)
    for _ in range(int(rng.integers(7, 18))):
        along, across = np.clip(rng.normal(0, (0.5, 0.25)), -1, 1) * radius
        x = along * np.cos(duct) - across * np.sin(duct)
        y = along * np.sin(duct) + across * np.cos(duct)
        speck = rng.uniform(0.12, 0.38)
        variance = (speck / 2) ** 2 + (spacing / 2) ** 2
        volume = 4 / 3 * np.pi * speck**3
        path += volume / (2 * np.pi * variance) * np.exp(-((dx - x) ** 2 + (dy - y) ** 2) / (2 * variance))
    return path


# (rng, radius in mm, dx [1, w] and dy [h, 1] in mm, angle of the duct, mm per pixel) -> path [h, w] in mm
_PATHS: dict[str, Callable[..., np.ndarray]] = {
    "round": _round_path,
    "lobulated": _lobulated_path,
    "spiculated": _spiculated_path,
    "calcifications": _cluster_path,
}


def _ripple(rng: np.random.Generator, angle: np.ndarray, orders: range, amplitude: float) -> np.ndarray:
    """1 plus a random Fourier series over the angle, of about that standard deviation."""
    weights = np.array([1 / k for k in orders])
    weights *= amplitude * np.sqrt(2) / np.linalg.norm(weights)
    terms = (w * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k, w in zip(orders, weights, strict=True))
    return (1 + sum(terms)).astype(np.float32)


def _solid(dx: np.ndarray, dy: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    """Path through a body that is as thick in the middle as it is wide on average."""
    return 2 * boundary.mean() * np.sqrt(np.maximum(1 - (dx**2 + dy**2) / boundary**2, 0))


def _strand(dx, dy, start, end, width, end_width, spacing) -> np.ndarray:
    """Path through a tapering strand twice as deep as wide, with half widths in mm, softened to the pixel."""
    delta = end - start
    along = np.clip(((dx - start[0]) * delta[0] + (dy - start[1]) * delta[1]) / (delta @ delta), 0, 1)
    squared = (dx - start[0] - along * delta[0]) ** 2 + (dy - start[1] - along * delta[1]) ** 2
    half = width + (end_width - width) * along
    variance = (half / 1.5) ** 2 + (0.4 * spacing) ** 2
    return 3 * half**2 / np.sqrt(variance) * np.exp(-squared / (2 * variance))


def _direction(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])

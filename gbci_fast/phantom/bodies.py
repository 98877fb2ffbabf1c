"""Three-dimensional bodies of lesions: level set, volume, and path length along X-rays.

Coordinates are mm from the lesion's center, in the frame of a left breast (a right breast is its mirror image):
x toward the nipple, y toward the side of the body (lateral +, medial -), z upward (superior +, inferior -).
"""

from dataclasses import dataclass, field, replace
from functools import cache, cached_property, reduce
from typing import Protocol

import numpy as np
from scipy import ndimage

# Rows: the image's right, the image's down, and the ray, as directions in the body's frame. CC looks from above, with
# the lateral side up in the image. MLO looks at 45 degrees from the upper inner to the lower outer side, with the upper
# outer side up in the image.
_HALF = np.sqrt(0.5)
VIEW_AXES = {
    "CC": np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]]),
    "MLO": np.array([[1.0, 0.0, 0.0], [0.0, -_HALF, -_HALF], [0.0, _HALF, -_HALF]]),
}
FINEST_STEP = 0.25  # mm: smallest sampling step of cores
SUBPIXEL = 0.12  # mm: smallest sampling step of thin parts within a pixel


class Body(Protocol):
    """The shape of a lesion with a volume.

    ``kind`` names the shape; a ball of ``radius`` mm around the center contains it; ``volume_mm3`` is its volume.
    """

    @property
    def kind(self) -> str: ...
    @property
    def radius(self) -> float: ...
    @property
    def volume_mm3(self) -> float: ...

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """A function that is positive inside and negative outside; ``x``, ``y``, ``z`` in mm broadcast together."""
        ...

    def path(self, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The path length (mm) of each pixel's ray inside the body, float32 [h, w].

        Args:
            axes: one of `VIEW_AXES`.
            u: [w], evenly spaced pixel centers in mm to the right of the lesion's center.
            v: [h], the same downward.
        """
        ...

    def scaled(self, factor: float) -> "Body":
        """The same shape, ``factor`` times as large in every direction."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Ellipsoid:
    """All p with |to_unit (p - center)| < 1; ``to_unit`` is [3, 3] in 1/mm, ``center`` [3] in mm."""

    to_unit: np.ndarray
    center: np.ndarray = field(default_factory=lambda: np.zeros(3))
    kind: str = "ellipsoid"

    @cached_property
    def from_unit(self) -> np.ndarray:
        return np.linalg.inv(self.to_unit)

    @cached_property
    def radius(self) -> float:
        return float(np.linalg.norm(self.center) + np.linalg.svd(self.from_unit, compute_uv=False)[0])

    @cached_property
    def volume_mm3(self) -> float:
        return float(4 / 3 * np.pi / abs(np.linalg.det(self.to_unit)))

    @cached_property
    def thinnest(self) -> float:
        """The smallest semi-axis in mm."""
        return float(np.linalg.svd(self.from_unit, compute_uv=False)[-1])

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        offset = (x - self.center[0], y - self.center[1], z - self.center[2])
        a, b, c = (row[0] * offset[0] + row[1] * offset[1] + row[2] * offset[2] for row in self.to_unit)
        return 1 - (a**2 + b**2 + c**2)

    def chord(self, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chords of the rays through (u, v): middle and half length, in mm along the ray. A miss has length 0."""
        a, b, c, d = (self.to_unit @ each for each in (axes[0], axes[1], self.center, axes[2]))
        start = [a[i] * u + b[i] * v - c[i] for i in range(3)]
        squared = d @ d
        along = sum(start[i] * d[i] for i in range(3))
        discriminant = along**2 - squared * (sum(each**2 for each in start) - 1)
        return -along / squared, np.sqrt(np.maximum(discriminant, 0)) / squared

    def window(self, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[slice, slice]:
        """Rows and columns of the pixels that the ellipsoid's projection touches."""
        middle = axes @ self.center
        reach = np.linalg.norm(axes @ self.from_unit, axis=1)
        return _pixels(v, middle[1], reach[1]), _pixels(u, middle[0], reach[0])

    def path(self, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return _add_path(np.zeros((len(v), len(u)), np.float32), self, axes, u, v, None)

    def scaled(self, factor: float) -> "Ellipsoid":
        return replace(self, to_unit=self.to_unit / factor, center=self.center * factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class StarBody:
    """A stretched Gaussian random sphere: radius r(n) = size exp(sum_k s_k(n . a_k)) in direction n before stretching.

    Each s_k is a random Legendre series about its own random axis a_k, so that their sum is a smooth random function on
    the sphere (Muinonen, "Introducing the Gaussian shape hypothesis", 1998).

    Args:
        to_unit: [3, 3], maps mm to the unit frame, in which the body is not stretched.
        size: scale of the radius in mm.
        axes: [K, 3] unit vectors a_k.
        series: [K, N] coefficients of the polynomials s_k in powers of the cosine.
    """

    kind: str
    to_unit: np.ndarray
    size: float
    axes: np.ndarray
    series: np.ndarray

    @cached_property
    def _sphere(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Directions [n, 3], their solid angles [n] and radii [n] in the unit frame."""
        directions, solid_angle = _sphere_rule()
        return directions, solid_angle, self.reach(*directions.T)

    @cached_property
    def radius(self) -> float:
        directions, _, reach = self._sphere
        points = np.linalg.solve(self.to_unit, (directions * reach[:, None]).T)
        return float(1.03 * np.linalg.norm(points, axis=0).max())  # it may bulge slightly between the directions

    @cached_property
    def volume_mm3(self) -> float:
        _, angle, reach = self._sphere
        return float((angle * reach**3).sum() / 3 / abs(np.linalg.det(self.to_unit)))

    def reach(self, nx: np.ndarray, ny: np.ndarray, nz: np.ndarray) -> np.ndarray:
        """The radius r in the direction of unit vectors, both in the unit frame."""
        total = 0.0
        for axis, series in zip(self.axes.astype(np.float32), self.series.astype(np.float32), strict=True):
            cosine = axis[0] * nx + axis[1] * ny + axis[2] * nz
            value = series[-1] * cosine + series[-2]
            for coefficient in series[-3::-1]:
                value *= cosine
                value += coefficient
            total = total + value
        return np.float32(self.size) * np.exp(total)

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        px, py, pz = (row[0] * x + row[1] * y + row[2] * z for row in self.to_unit.astype(np.float32))
        length = np.sqrt(px**2 + py**2 + pz**2) + np.float32(1e-6)
        return self.reach(px / length, py / length, pz / length) - length

    def path(self, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        u, v, factor = _finer(u, v, max(FINEST_STEP, self.radius / 8))
        step = max(FINEST_STEP, min(u[1] - u[0], self.radius / 12))
        count = int(np.ceil(self.radius / step)) + 1
        ticks = (np.arange(-count, count + 1) * step).astype(np.float32)
        points = [
            axes[0][i] * ticks[None, :, None] + axes[1][i] * ticks[:, None, None] + axes[2][i] * ticks for i in range(3)
        ]
        coarse = _length_above_zero(self.level(*(point.astype(np.float32) for point in points)), step)
        rows, columns = np.meshgrid(v / step + count, u / step + count, indexing="ij")
        return _block_mean(ndimage.map_coordinates(coarse, [rows, columns], order=1, output=np.float32), factor)

    def surface(self, direction: np.ndarray) -> np.ndarray:
        """The point of the surface, [3] in mm, in a direction [3]."""
        unit = self.to_unit @ direction
        unit /= np.linalg.norm(unit)
        return np.linalg.solve(self.to_unit, unit * float(self.reach(*unit.astype(np.float32))))

    def scaled(self, factor: float) -> "StarBody":
        return replace(self, to_unit=self.to_unit / factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpiculatedBody:
    """A core with strands, each a slender ellipsoid; without a core, a star of strands.

    The parts of strands inside the core do not count. Crossings of strands count twice, a few thousandths of the
    volume.
    """

    kind: str
    core: StarBody | None
    strands: tuple[Ellipsoid, ...]

    @cached_property
    def radius(self) -> float:
        return max(part.radius for part in (self.core, *self.strands) if part is not None)

    @cached_property
    def volume_mm3(self) -> float:
        if self.core is None:
            return sum(strand.volume_mm3 for strand in self.strands)
        outside = sum(strand.volume_mm3 * (1 - _share_inside(strand, self.core, 12)) for strand in self.strands)
        return self.core.volume_mm3 + outside

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        parts = [part for part in (self.core, *self.strands) if part is not None]
        level = parts[0].level(x, y, z)
        for part in parts[1:]:
            level = np.maximum(level, part.level(x, y, z))
        return level

    def path(self, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        path = np.zeros((len(v), len(u)), np.float32) if self.core is None else self.core.path(axes, u, v)
        for strand in self.strands:
            _add_path(path, strand, axes, u, v, self.core)
        return path

    def scaled(self, factor: float) -> "SpiculatedBody":
        core = None if self.core is None else self.core.scaled(factor)
        return replace(self, core=core, strands=tuple(strand.scaled(factor) for strand in self.strands))


@dataclass(frozen=True, kw_only=True, eq=False)
class LymphNode:
    """An ellipsoid (the cortex) minus a smaller ellipsoid that notches it (the fatty hilum)."""

    outer: Ellipsoid
    hilum: Ellipsoid
    kind: str = "lymph node"

    @property
    def radius(self) -> float:
        return self.outer.radius

    @cached_property
    def volume_mm3(self) -> float:
        return self.outer.volume_mm3 - self.hilum.volume_mm3 * _share_inside(self.hilum, self.outer, 48)

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.minimum(self.outer.level(x, y, z), -self.hilum.level(x, y, z))

    def path(self, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        u, v, factor = _finer(u, v, SUBPIXEL * 4)
        middle, half = self.outer.chord(axes, u[None, :], v[:, None])
        hole, hole_half = self.hilum.chord(axes, u[None, :], v[:, None])
        overlap = np.minimum(middle + half, hole + hole_half) - np.maximum(middle - half, hole - hole_half)
        return _block_mean(2 * half - np.where(hole_half > 0, np.maximum(overlap, 0), 0), factor)

    def scaled(self, factor: float) -> "LymphNode":
        return replace(self, outer=self.outer.scaled(factor), hilum=self.hilum.scaled(factor))


@dataclass(frozen=True, kw_only=True, eq=False)
class Cluster:
    """A cluster of calcifications: ``specks`` [n, 4] are x, y, z and radius in mm. Specks do not touch."""

    specks: np.ndarray
    kind: str = "calcifications"

    @cached_property
    def radius(self) -> float:
        return float((np.linalg.norm(self.specks[:, :3], axis=1) + self.specks[:, 3]).max())

    @cached_property
    def volume_mm3(self) -> float:
        return float(4 / 3 * np.pi * (self.specks[:, 3] ** 3).sum())

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        levels = (r - np.sqrt((x - sx) ** 2 + (y - sy) ** 2 + (z - sz) ** 2) for sx, sy, sz, r in self.specks)
        return reduce(np.maximum, levels)

    def path(self, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        path = np.zeros((len(v), len(u)), np.float32)
        for *center, radius in self.specks:
            speck = Ellipsoid(to_unit=np.eye(3) / radius, center=np.array(center))
            _add_path(path, speck, axes, u, v, None)
        return path

    def scaled(self, factor: float) -> "Cluster":
        return replace(self, specks=self.specks * factor)


def draw_mass(rng: np.random.Generator, kind: str, radius: float) -> StarBody | SpiculatedBody:
    """Draws a mass whose core has the volume of a ball of ``radius`` mm.

    ``kind`` is "round", "oval", "lobular", "irregular" or "spiculated" (an irregular core with strands).
    """
    if kind == "spiculated":
        core = draw_core(rng, "irregular", radius)
        return SpiculatedBody(kind=kind, core=core, strands=_draw_strands(rng, core, radius))
    return draw_core(rng, kind, radius)


# Per kind: random axes, Legendre orders, standard deviation of log r, range of the stretch.
_CORES = {
    "round": (4, (2, 4), 0.03, (1.0, 1.08)),
    "oval": (4, (2, 4), 0.03, (1.3, 1.7)),
    "lobular": (6, (3, 5), 0.13, (1.0, 1.25)),
    "irregular": (8, (2, 9), 0.17, (1.0, 1.3)),
}


def draw_core(rng: np.random.Generator, kind: str, radius: float) -> StarBody:
    """Draws a star-shaped body of a kind in `_CORES` with the volume of a ball of ``radius`` mm."""
    count, (low, high), spread, stretches = _CORES[kind]
    axes = _random_directions(rng, count)
    orders = np.arange(low, high + 1)
    weights = rng.standard_normal((count, len(orders))) * orders**-1.0
    # The mean square of the Legendre polynomial P_l over the sphere is 1 / (2l + 1).
    weights *= spread / np.sqrt((weights**2 / (2 * orders + 1)).sum())
    legendre = np.zeros((count, high + 1))
    legendre[:, low:] = weights
    series = np.stack([np.polynomial.legendre.leg2poly(row) for row in legendre])
    stretch = rng.uniform(*stretches)
    turn = _random_rotation(rng)
    to_unit = np.diag([1 / stretch, stretch**0.5, stretch**0.5]) @ turn
    body = StarBody(kind=kind, to_unit=to_unit, size=1.0, axes=axes, series=series)
    return replace(body, size=radius * float((4 / 3 * np.pi / body.volume_mm3) ** (1 / 3)))


def draw_star(rng: np.random.Generator, radius: float) -> SpiculatedBody:
    """Draws fine strands that point at an empty center: the spicules of an architectural distortion."""
    strands = []
    for direction in _even_directions(rng, int(rng.integers(28, 40))):
        start = direction * radius * rng.uniform(0.0, 0.12)
        end = direction * radius * rng.uniform(0.6, 0.95)
        strands.append(_strand(start, end, rng.uniform(0.5, 0.85)))
    return SpiculatedBody(kind="star", core=None, strands=tuple(strands))


def draw_node(rng: np.random.Generator, radius: float) -> LymphNode:
    """Draws a lymph node with semi-axes of 0.8 to 1.3 times ``radius`` and a small hilum at one side."""
    semi_axes = radius * np.array([rng.uniform(1.05, 1.3), rng.uniform(0.85, 1.0), rng.uniform(0.8, 0.95)])
    turn = _random_rotation(rng)
    outer = Ellipsoid(to_unit=np.diag(1 / semi_axes) @ turn)
    away = turn[1] * semi_axes[1]  # from the center to the waist
    hilum = Ellipsoid(to_unit=np.diag(1 / (semi_axes * rng.uniform(0.25, 0.4))) @ turn, center=0.75 * away)
    return LymphNode(outer=outer, hilum=hilum)


def draw_cluster(rng: np.random.Generator, radius: float, duct: np.ndarray) -> Cluster:
    """Draws 7 to 20 specks of radius 0.1 to 0.4 mm along ``duct`` [3], all within ``radius`` mm of the center."""
    duct = duct / np.linalg.norm(duct)
    specks: list[np.ndarray] = []
    count = int(rng.integers(7, 21))
    while len(specks) < count:
        offset = rng.normal(0, 0.2 * radius, 3)
        place = offset - duct * (duct @ offset) + duct * rng.normal(0, 0.45 * radius)
        size = rng.uniform(0.1, 0.4)
        apart = all(np.linalg.norm(place - other[:3]) > size + other[3] + 0.2 for other in specks)
        if apart and np.linalg.norm(place) + size < radius:
            specks.append(np.append(place, size))
    return Cluster(specks=np.stack(specks))


def _draw_strands(rng: np.random.Generator, core: StarBody, radius: float) -> tuple[Ellipsoid, ...]:
    strands = []
    for direction in _even_directions(rng, int(rng.integers(32, 46))):
        root = core.surface(direction)
        length = radius * rng.uniform(0.6, 1.5)
        width = rng.uniform(0.5, 1.0)
        # Slender ellipsoids taper at both ends. One end is hidden in the core.
        strands.append(_strand(root - 0.5 * length * direction, root + length * direction, width))
        if rng.uniform() < 0.6:
            fork = root + 0.4 * length * direction
            turned = direction + 0.45 * _random_directions(rng, 1)[0]
            tip = fork + 0.6 * length * turned / np.linalg.norm(turned)
            strands.append(_strand(fork, tip, 0.6 * width))
    return tuple(strands)


def _strand(start: np.ndarray, end: np.ndarray, half_width: float) -> Ellipsoid:
    along = end - start
    length = np.linalg.norm(along)
    along = along / length
    across = np.cross(along, np.eye(3)[np.argmin(np.abs(along))])
    across /= np.linalg.norm(across)
    frame = np.stack([along, across, np.cross(along, across)])
    semi_axes = np.array([length / 2, half_width, half_width])
    return Ellipsoid(to_unit=frame / semi_axes[:, None], center=(start + end) / 2)


@cache
def _sphere_rule() -> tuple[np.ndarray, np.ndarray]:
    """Directions [n, 3] and solid angles [n] of a quadrature over the sphere: Gauss-Legendre times even angles."""
    cosine, weight = np.polynomial.legendre.leggauss(48)
    angle = np.arange(96) * (2 * np.pi / 96)
    sine = np.sqrt(1 - cosine**2)[:, None]
    axes = (sine * np.cos(angle), sine * np.sin(angle), np.repeat(cosine[:, None], 96, axis=1))
    return np.stack(axes, axis=-1).reshape(-1, 3), np.repeat(weight * (2 * np.pi / 96), 96)


def _random_directions(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _even_directions(rng: np.random.Generator, count: int) -> np.ndarray:
    """At most ``count`` directions [n, 3] spread over the sphere (Fibonacci lattice), randomly rotated and jittered."""
    z = 1 - (2 * np.arange(count) + 1) / count
    angle = np.arange(count) * np.pi * (3 - np.sqrt(5))
    ring = np.sqrt(1 - z**2)
    vectors = np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1) @ _random_rotation(rng)
    vectors += rng.normal(0, 0.5 / np.sqrt(count), vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # Strands along a view's rays are left out: a real spicule is not straight enough to appear as a bright dot.
    end_on = np.max([np.abs(vectors @ axes[2]) for axes in VIEW_AXES.values()], axis=0)
    return vectors[end_on < 0.92]


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation [3, 3], uniformly distributed."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q *= np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def _length_above_zero(level: np.ndarray, step: float) -> np.ndarray:
    """The length along the last axis on which linearly interpolated values are positive."""
    before, after = level[..., :-1], level[..., 1:]
    above = np.maximum(before, 0) + np.maximum(after, 0)
    return step * (above / (np.abs(before) + np.abs(after) + np.float32(1e-12))).sum(axis=-1)


def _share_inside(ellipsoid: Ellipsoid, other: Ellipsoid | StarBody, count: int) -> float:
    """The share of the ellipsoid's volume inside the other body, sampled on a grid of ``count`` points per axis."""
    ticks = (np.arange(count) + 0.5) * (2 / count) - 1
    ball = np.stack(np.meshgrid(ticks, ticks, ticks), axis=-1).reshape(-1, 3)
    ball = ball[(ball**2).sum(axis=1) < 1]
    x, y, z = ellipsoid.from_unit @ ball.T + ellipsoid.center[:, None]
    return float((other.level(x, y, z) > 0).mean())


def _add_path(
    path: np.ndarray, part: Ellipsoid, axes: np.ndarray, u: np.ndarray, v: np.ndarray, core: StarBody | None
) -> np.ndarray:
    """Adds to ``path`` [h, w], in place, the length of each ray that lies in the part and outside the core."""
    window = part.window(axes, u, v)
    if not path[window].size:
        return path
    fine_u, fine_v, factor = _finer(u, v, max(SUBPIXEL, part.thinnest / 3), window)
    middle, half = part.chord(axes, fine_u[None, :], fine_v[:, None])
    length = 2 * half
    if core is not None:
        rows, columns = np.nonzero(half)
        share = np.linspace(-0.875, 0.875, 8)[:, None]
        s = middle[rows, columns] + share * half[rows, columns]
        at = [axes[0][i] * fine_u[columns] + axes[1][i] * fine_v[rows] + axes[2][i] * s for i in range(3)]
        length[rows, columns] *= (core.level(*at) < 0).mean(axis=0)
    path[window] += _block_mean(length, factor)
    return path


def _pixels(centers: np.ndarray, middle: float, reach: float) -> slice:
    """The indices of the pixels (evenly spaced centers) that touch the interval middle - reach to middle + reach."""
    spacing = centers[1] - centers[0]
    first = np.floor((middle - reach - centers[0]) / spacing + 0.5)
    last = np.floor((middle + reach - centers[0]) / spacing + 0.5)
    return slice(int(np.clip(first, 0, len(centers))), int(np.clip(last + 1, 0, len(centers))))


def _finer(
    u: np.ndarray, v: np.ndarray, step: float, window: tuple[slice, slice] = (slice(None), slice(None))
) -> tuple[np.ndarray, np.ndarray, int]:
    """Subpixel centers of a window, at most ``step`` apart, and the number of subpixels per pixel and axis."""
    spacing = u[1] - u[0]
    factor = max(1, int(np.ceil(spacing / step)))
    offsets = ((np.arange(factor) + 0.5) / factor - 0.5) * spacing
    return (u[window[1], None] + offsets).ravel(), (v[window[0], None] + offsets).ravel(), factor


def _block_mean(values: np.ndarray, factor: int) -> np.ndarray:
    height, width = values.shape
    return values.reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3), dtype=np.float32)

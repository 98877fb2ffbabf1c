"""Draws findings into one view of a breast, each with the exact mask of the pixels that it changes.

A finding changes the outline and the skin, the glandular tissue, or the X-rays' paths, to which a body adds its own.
All changes have compact support, and changes too thin to see (`LEAST_PATH`) are left out. So the mask is exact: outside
it the line integral of the breast equals the healthy one bit by bit.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image

from gbci_fast.phantom.anatomy import SKIN_THICKNESS, Anatomy, BreastShape, Grid, chord
from gbci_fast.phantom.bodies import VIEW_AXES, Body, Ellipsoid
from gbci_fast.phantom.findings import PhantomFinding
from gbci_fast.phantom.placement import skin_point
from gbci_fast.phantom.projection import MU_CALCIFICATION, MU_GLAND, attenuation
from gbci_fast.phantom.texture import DENSEST, Tissue, share_of, threshold

LEAST_PATH = 0.1  # mm: smallest visible path through a body (for specks: the path of gland with equal attenuation)
LEAST_SHARE = 0.04  # smallest visible change of the glandular share
LEAST_SKIN = 0.3  # mm: smallest visible change of the path through skin
SKIN_FADE = 4.0  # mm: depth under thickened skin over which the thickening fades out
FINE_GRAIN = 0.3  # standard deviation of the fine structure that an asymmetry adds to the texture


@dataclass(kw_only=True)
class Scene:
    """One view of one breast, which findings change.

    The maps are [H, W]: ``inside``, ``thickness`` and ``skin`` as in `Anatomy`, ``share`` as in `Tissue`, ``integral``
    and ``interior`` as `attenuation` returns them.
    """

    view: str
    grid: Grid
    shape: BreastShape
    anatomy: Anatomy
    tissue: Tissue
    inside: np.ndarray
    thickness: np.ndarray
    skin: np.ndarray
    share: np.ndarray
    integral: np.ndarray
    interior: np.ndarray

    @classmethod
    def healthy(cls, view: str, grid: Grid, shape: BreastShape, anatomy: Anatomy, tissue: Tissue) -> "Scene":
        """The breast without findings."""
        integral, interior = attenuation(anatomy.thickness, anatomy.skin, anatomy.muscle, tissue.share)
        return cls(
            view=view,
            grid=grid,
            shape=shape,
            anatomy=anatomy,
            tissue=tissue,
            inside=anatomy.inside,
            thickness=anatomy.thickness,
            skin=anatomy.skin,
            share=tissue.share,
            integral=integral,
            interior=interior,
        )

    def copy(self) -> "Scene":
        """A copy whose maps can be changed."""
        changing = ("inside", "thickness", "skin", "share", "integral", "interior")
        return replace(self, **{name: getattr(self, name).copy() for name in changing})

    def add(self, findings: tuple[PhantomFinding, ...], rngs: list[np.random.Generator]) -> list[np.ndarray]:
        """Draws the findings that this view shows: first outline and tissue, then bodies.

        Args:
            findings: all findings of the breast.
            rngs: one random stream per finding.

        Returns:
            One mask, bool [H, W], per finding. It is empty if the finding is too small to see or if this view does not
            show it.
        """
        masks = [np.zeros(self.integral.shape, bool) for _ in findings]
        shown = [item for item in zip(findings, rngs, masks, strict=True) if self.view in item[0].views]
        for finding, rng, mask in shown:
            if finding.kind in _TISSUE:
                _TISSUE[finding.kind](self, rng, finding, mask)
            if finding.distortion:
                _distort(self, rng, finding, mask)
        for finding, rng, mask in shown:
            for body in _bodies(self, rng, finding):
                _add_body(self, body, mask)
        return masks

    def window(self, point: tuple[float, float], reach: float) -> tuple[slice, slice]:
        """Rows and columns within ``reach`` mm of the point (x, y), clipped to the image."""
        column, row = point[0] / self.grid.spacing, point[1] / self.grid.spacing + self.grid.height / 2
        pixels = reach / self.grid.spacing + 1
        return (
            slice(max(0, int(row - pixels)), max(0, min(self.grid.height, int(row + pixels) + 1))),
            slice(max(0, int(column - pixels)), max(0, min(self.grid.width, int(column + pixels) + 1))),
        )

    def offsets(self, window: tuple[slice, slice], point: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Pixel centers relative to the point: dx [1, w] and dy [h, 1] in mm."""
        return self.grid.x[:, window[1]] - np.float32(point[0]), self.grid.y[window[0]] - np.float32(point[1])

    def repaint(self, window: tuple[slice, slice], changed: np.ndarray, **maps: np.ndarray) -> None:
        """Replaces maps of the window where ``changed`` (bool [h, w]) is set, and updates the attenuation there."""
        for name, values in maps.items():
            whole = getattr(self, name)
            whole[window] = np.where(changed, values, whole[window])
        integral, interior = attenuation(
            self.thickness[window], self.skin[window], self.anatomy.muscle[window], self.share[window]
        )
        self.integral[window] = np.where(changed, integral, self.integral[window])
        self.interior[window] = np.where(changed, interior, self.interior[window])


@dataclass(frozen=True)
class _Placed:
    """A body at a point (x, y) of the view; ``mu`` (1/mm) replaces the tissue's, or is added to it if ``alone``."""

    body: Body
    point: tuple[float, float]
    mu: float
    alone: bool = False


def _bodies(scene: Scene, rng: np.random.Generator, finding: PhantomFinding) -> list[_Placed]:
    if finding.body is not None:
        calcified = finding.kind == "calcifications"
        mu = finding.strength * (MU_CALCIFICATION if calcified else MU_GLAND)
        return [_Placed(finding.body, scene.shape.point(finding.place, scene.view), mu, calcified)]
    if finding.kind == "skin retraction":
        return _tether(scene, rng, finding)
    if finding.kind == "nipple retraction":
        return _inverted_nipple(scene, finding)
    return []


def _add_body(scene: Scene, placed: _Placed, mask: np.ndarray) -> None:
    window = scene.window(placed.point, placed.body.radius)
    dx, dy = scene.offsets(window, placed.point)
    if dx.shape[1] < 2 or dy.shape[0] < 2:
        return  # outside the image
    path = placed.body.path(VIEW_AXES[scene.view], dx[0].astype(float), dy[:, 0].astype(float))
    room = scene.thickness[window] - scene.skin[window]
    if placed.alone:
        if path.max() * placed.mu < LEAST_PATH * MU_GLAND:
            return  # even its densest pixel is too faint to see
        path[(path < 0.02 * path.max()) | (room <= 0)] = 0
        scene.integral[window] += np.float32(placed.mu) * path
        mask[window] |= convex_hull_image(path > 0) if path.any() else False
        return
    path = np.minimum(path, room)
    path[path < LEAST_PATH] = 0
    scene.integral[window] += (np.float32(placed.mu) - scene.interior[window]) * path
    mask[window] |= path > 0


def _distort(scene: Scene, rng: np.random.Generator, finding: PhantomFinding, mask: np.ndarray) -> None:
    """Pulls the tissue toward the finding, more strongly in some directions than in others."""
    point, radius = scene.shape.point(finding.place, scene.view), finding.distortion
    window = scene.window(point, radius)
    dx, dy = scene.offsets(window, point)
    rho = np.hypot(dx, dy) / np.float32(radius)
    folds, phase = rng.integers(5, 9), rng.uniform(0, 2 * np.pi)
    pull = 0.75 + 0.5 * np.cos(folds * np.arctan2(dy, dx) + phase) * np.minimum(2 * rho, 1)
    stretch = 1 + np.float32(1.1) * pull * np.maximum(1 - rho, 0) ** 2  # 1 at the rim
    rows = (dy * stretch + point[1]) / scene.grid.spacing + (scene.grid.height - 1) / 2
    columns = (dx * stretch + point[0]) / scene.grid.spacing - 0.5
    pulled = ndimage.map_coordinates(scene.share, [rows, columns], order=1, mode="nearest")
    changed = (rho < 1) & (scene.inside[window] > 0)
    scene.repaint(window, changed, share=pulled)
    mask[window] |= changed


def _add_gland(scene: Scene, rng: np.random.Generator, finding: PhantomFinding, mask: np.ndarray) -> None:
    """Adds gland by a lower threshold between fat and gland; the tissue's texture gives concave borders and fat."""
    point, radius = scene.shape.point(finding.place, scene.view), finding.radius
    window = scene.window(point, 1.4 * radius)
    dx, dy = scene.offsets(window, point)
    angle = np.arctan2(dy, dx)
    cusps, phase = rng.integers(3, 6), rng.uniform(0, 2 * np.pi, 2)
    scallops = 1.15 - 0.25 * np.abs(np.sin(cusps * angle / 2 + phase[0]))  # a concave border
    reach = radius * scallops * (1 + 0.2 * np.cos(2 * angle + phase[1]))
    rho = np.hypot(dx, dy) / reach.astype(np.float32)
    envelope = np.maximum(1 - rho**2, 0)
    texture, offset, share = scene.tissue.texture[window], scene.tissue.offset[window], scene.share[window]
    core = (rho < 0.5) & (scene.inside[window] > 0)
    if not core.any():
        return  # outside the image
    # The fine structure decides where fat remains and where the border runs. It is amplified, because it is too weak in
    # a field of this size.
    fine = texture - ndimage.gaussian_filter(texture, 0.3 * radius / scene.grid.spacing)
    grained = texture + np.float32(FINE_GRAIN / fine.std()) * fine * np.sqrt(envelope)
    target = min(DENSEST - 0.12, max(finding.strength, float(share[core].mean()) + 0.2))
    level = threshold(grained[core], offset[core], np.ones(core.sum(), np.float32), target)
    # In the densest breasts little gland can be added; then the lift is one standard deviation of the texture.
    lifted = share_of(grained, offset + np.float32(max(-level, 1.0)) * envelope)
    room = scene.thickness[window] - scene.skin[window] - scene.anatomy.muscle[window]
    changed = (lifted > share + LEAST_SHARE) & (room > 1) & (envelope > 0)
    scene.repaint(window, changed, share=lifted)
    mask[window] |= ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(changed, 3), iterations=2))[3:-3, 3:-3]


def _thicken_skin(scene: Scene, rng: np.random.Generator, finding: PhantomFinding, mask: np.ndarray) -> None:
    point = skin_point(scene.shape, finding.place, scene.view)
    window = scene.window(point, finding.radius)
    along = _bump((np.hypot(*scene.offsets(window, point)) / np.float32(finding.radius)) ** 2)  # flat in the middle
    skin, changed = _skin_of(scene, window, (finding.strength - SKIN_THICKNESS) * along)
    scene.repaint(window, changed, skin=skin)
    mask[window] |= changed


def _skin_of(scene: Scene, window: tuple[slice, slice], extra: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Path length through skin that is ``extra`` mm thicker at the outline, and the pixels that visibly change."""
    inside, thickness = scene.inside[window], scene.thickness[window]
    depth = SKIN_THICKNESS + extra * _bump(np.maximum(inside - SKIN_THICKNESS - extra, 0) / np.float32(SKIN_FADE))
    slab = np.float32(scene.shape.thickness)
    skin = np.minimum(thickness - chord(inside - depth, slab - 2 * depth), thickness)
    return skin, (skin > scene.skin[window] + LEAST_SKIN) & (inside > 0)


def _retract_skin(scene: Scene, rng: np.random.Generator, finding: PhantomFinding, mask: np.ndarray) -> None:
    point = skin_point(scene.shape, finding.place, scene.view)
    window = scene.window(point, finding.radius)
    bump = _bump(np.hypot(*scene.offsets(window, point)) / np.float32(finding.radius))
    _dent(scene, window, scene.inside[window] - np.float32(finding.strength) * bump, bump, mask)


def _retract_nipple(scene: Scene, rng: np.random.Generator, finding: PhantomFinding, mask: np.ndarray) -> None:
    point = (scene.shape.depth, scene.shape.nipple_y)
    window = scene.window(point, finding.radius)
    rho = np.hypot(*scene.offsets(window, point)) / np.float32(finding.radius)
    # A narrow dent with its rim at the edge of the areola.
    dent = np.float32(finding.strength) * _bump(rho / 0.7)
    flat = np.where(rho < 1, scene.anatomy.without_nipple[window], scene.inside[window])
    _dent(scene, window, flat - dent, _bump(rho), mask)


def _dent(scene: Scene, window: tuple[slice, slice], inside: np.ndarray, bump: np.ndarray, mask: np.ndarray) -> None:
    """Applies a new outline, with 1.5 mm of skin in the dent; adds changed pixels of old and new breast to the mask."""
    before = scene.inside[window]
    slab = np.float32(scene.shape.thickness)
    thickness = chord(inside, slab)
    depth = SKIN_THICKNESS + np.float32(0.75) * bump
    skin = np.minimum(thickness - chord(inside - depth, slab - 2 * depth), thickness)
    edge = 0.5 * scene.grid.spacing  # the outline is drawn with a soft edge of half a pixel on either side
    breast = np.maximum(before, inside) > -edge
    changed = breast & ((np.abs(thickness - scene.thickness[window]) > LEAST_PATH) | (inside <= edge) & (bump > 0))
    scene.repaint(window, changed, inside=inside, thickness=thickness, skin=skin)
    mask[window] |= changed


def _tether(scene: Scene, rng: np.random.Generator, finding: PhantomFinding) -> list[_Placed]:
    """Three strands from the dent into the breast."""
    x, y = skin_point(scene.shape, finding.place, scene.view)
    inward = np.array([0.45 * scene.shape.depth - x, 0.8 * (scene.shape.nipple_y - y)])
    inward /= np.linalg.norm(inward)
    strands = []
    for turn in (-0.35, 0.0, 0.3):
        turned = turn + rng.uniform(-0.1, 0.1)
        direction = np.array(
            [
                inward[0] * np.cos(turned) - inward[1] * np.sin(turned),
                inward[0] * np.sin(turned) + inward[1] * np.cos(turned),
            ]
        )
        length = finding.radius * rng.uniform(0.9, 1.5)
        middle = np.array([x, y]) + direction * (0.8 * finding.strength + length / 2)
        axes = VIEW_AXES[scene.view]
        frame = np.stack([direction[0] * axes[0] + direction[1] * axes[1], axes[2]])
        frame = np.stack([frame[0], frame[1], np.cross(frame[0], frame[1])])
        body = Ellipsoid(to_unit=frame / np.array([length / 2, 3.0, rng.uniform(0.5, 0.9)])[:, None])
        strands.append(_Placed(body, (float(middle[0]), float(middle[1])), MU_GLAND))
    return strands


def _inverted_nipple(scene: Scene, finding: PhantomFinding) -> list[_Placed]:
    """The dense nipple behind the skin, with a cord of ducts that pulls it in."""
    x, y = scene.shape.depth - finding.strength - 5.0, scene.shape.nipple_y
    nipple = Ellipsoid(to_unit=np.diag(1 / np.array([5.5, 3.6, 3.6])))
    cord = Ellipsoid(to_unit=np.diag(1 / np.array([13.0, 1.6, 1.6])), center=np.array([-9.0, 0.0, 0.0]))
    return [_Placed(nipple, (x, y), 1.05 * MU_GLAND), _Placed(cord, (x, y), MU_GLAND)]


def _bump(rho: np.ndarray) -> np.ndarray:
    """A bump that is 1 at ``rho`` = 0 and falls to 0, with zero slope, at ``rho`` = 1."""
    return np.maximum(1 - rho**2, 0) ** 2


_TISSUE = {
    "focal asymmetry": _add_gland,
    "asymmetry": _add_gland,
    "global asymmetry": _add_gland,
    "skin thickening": _thicken_skin,
    "skin retraction": _retract_skin,
    "nipple retraction": _retract_nipple,
}

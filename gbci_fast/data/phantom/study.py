"""Draws a study (who, which breasts, which lesions) and renders its four images.

Every random choice has its own stream, named by what it decides. So a study depends on (seed, index) alone, and leaving
out the lesion, or changing it, leaves the rest of the image as it is.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from gbci_fast.data.attributes import LATERALITIES, VIEW_POSITIONS
from gbci_fast.data.dicom_writer import MammogramHeader, uid_from_seed
from gbci_fast.data.phantom.anatomy import Anatomy, BreastShape, Grid, draw_shape, map_anatomy
from gbci_fast.data.phantom.lesions import Lesion, LesionPatch, draw_lesion, render_lesion
from gbci_fast.data.phantom.projection import attenuation, expose, present
from gbci_fast.data.phantom.texture import glandular_map
from gbci_fast.errors import GBCIError

MODEL_VERSION = "phantom 1"
SMALLEST, LARGEST = 128, 4096  # pixels

# Per density class: its share of women, fat fraction, compressed thickness in mm.
DENSITIES = {"A": (0.1, 0.95, 60.0), "B": (0.4, 0.85, 55.0), "C": (0.4, 0.66, 45.0), "D": (0.1, 0.40, 35.0)}
# Power spectrum 1/f^beta; soft thresholding keeps the exponent.
FIELD_BETA = {"CC": 3.17, "MLO": 3.30}
LESION_PROBABILITY = 0.5  # per breast


@dataclass(frozen=True, kw_only=True)
class BreastPlan:
    """One breast: depth in mm, and the lesion with the share of that depth at which it lies, alike in both views."""

    laterality: str
    depth: float
    lesion: Lesion | None
    lesion_depth: float


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Everything about a study but its pixels. One study is one patient; ``split`` follows from its hash."""

    seed: int
    index: int
    age: int
    breast_density: str
    breasts: tuple[BreastPlan, ...]

    @property
    def split(self) -> str:
        return "test" if int(digest("split", self.seed, self.index), 16) % 5 == 0 else "training"


@dataclass(frozen=True, kw_only=True)
class PhantomImage:
    """One rendered image: pixels and exact truth.

    ``stored`` is [H, W] uint16 and ``mask`` [H, W] bool, True on the lesion; ``window`` is (center, width).
    """

    study_id: str
    series_id: str
    image_id: str
    header: MammogramHeader
    stored: np.ndarray
    window: tuple[float, float]
    mask: np.ndarray
    lesion: Lesion | None
    breast_density: str
    split: str

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """xmin, ymin, xmax, ymax of the mask in pixels, the last two exclusive."""
        if self.lesion is None:
            return None
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def render_study(seed: int, index: int, size: int | tuple[int, int] = 512) -> list[PhantomImage]:
    """The four images (CC and MLO of the left, then of the right breast) of study ``index``.

    Args:
        seed: of the data set; with ``index`` it decides everything.
        size: height (and width) in pixels, 128 to 4096 each; the height always spans 240 mm.

    Raises:
        GBCIError: a size outside these limits, or too narrow for a breast.
    """
    grid = make_grid(size)
    plan = draw_study(seed, index)
    return [render_image(plan, breast, view, grid) for breast in plan.breasts for view in VIEW_POSITIONS]


def make_grid(size: int | tuple[int, int]) -> Grid:
    """Checks the size and gives the pixel grid (see `render_study`)."""
    height, width = (size, size) if isinstance(size, int) else size
    if not (SMALLEST <= height <= LARGEST and SMALLEST <= width <= LARGEST and width >= 0.6 * height):
        raise GBCIError(
            f"phantom size is {height}x{width}; expected height and width from {SMALLEST} to {LARGEST} pixels "
            "and a width of at least 0.6 times the height"
        )
    return Grid(height, width)


def draw_study(seed: int, index: int) -> StudyPlan:
    """The plan of study ``index`` of the data set ``seed``."""
    rng = stream(seed, index, "study")
    density = str(rng.choice(list(DENSITIES), p=[share for share, _, _ in DENSITIES.values()]))
    depth = rng.uniform(80, 115)
    breasts = []
    for laterality in LATERALITIES:
        rng_breast = stream(seed, index, "breast", laterality)
        breasts.append(
            BreastPlan(
                laterality=laterality,
                depth=depth * rng_breast.uniform(0.95, 1.05),
                lesion=draw_lesion(rng_breast) if rng_breast.uniform() < LESION_PROBABILITY else None,
                lesion_depth=rng_breast.uniform(0.4, 0.68),
            )
        )
    age = int(np.clip(rng.normal(55, 9), 40, 75))
    return StudyPlan(seed=seed, index=index, age=age, breast_density=density, breasts=tuple(breasts))


def render_image(plan: StudyPlan, breast: BreastPlan, view: str, grid: Grid) -> PhantomImage:
    """One view of one breast of the plan."""
    _, fat_fraction, thickness = DENSITIES[plan.breast_density]

    def image_stream(purpose: str) -> np.random.Generator:
        return stream(plan.seed, plan.index, breast.laterality, view, purpose)

    shape = draw_shape(image_stream("shape"), view_position=view, depth=breast.depth, thickness=thickness)
    anatomy = map_anatomy(shape, grid)
    glandular = glandular_map(
        image_stream("texture"), shape, anatomy, grid, beta=FIELD_BETA[view], fat_fraction=fat_fraction
    )
    integral, interior = attenuation(anatomy, glandular)
    mask = np.zeros(integral.shape, bool)
    if breast.lesion is not None:
        patch = _place_lesion(image_stream("lesion"), breast, view, shape, anatomy, interior, grid)
        integral[patch.window] += patch.added
        mask[patch.window] = patch.mask
    exposure = expose(image_stream("noise"), integral, anatomy.inside > 0, grid)
    image = present(exposure, anatomy, thickness, grid)
    # Chest wall left for L, right for R.
    mirror = slice(None, None, 1 if breast.laterality == "L" else -1)
    names = (plan.seed, plan.index, grid.height, grid.width)
    return PhantomImage(
        study_id=digest("study", *names)[:32],
        series_id=digest("series", *names)[:32],
        image_id=digest("image", *names, breast.laterality, view)[:32],
        header=_header(plan, breast.laterality, view, grid),
        stored=np.ascontiguousarray(image.stored[:, mirror]),
        window=image.window,
        mask=np.ascontiguousarray(mask[:, mirror]),
        lesion=breast.lesion,
        breast_density=plan.breast_density,
        split=plan.split,
    )


def stream(*names: object) -> np.random.Generator:
    """An independent random stream for every tuple of names."""
    return np.random.default_rng(int(digest(*names), 16))


def digest(*names: object) -> str:
    """64 hexadecimal digits that name these names."""
    return hashlib.sha256("\x1f".join(map(str, ("gbci_fast", MODEL_VERSION, *names))).encode()).hexdigest()


def _place_lesion(
    rng: np.random.Generator,
    breast: BreastPlan,
    view: str,
    shape: BreastShape,
    anatomy: Anatomy,
    interior: np.ndarray,
    grid: Grid,
) -> LesionPatch:
    """Both views see a lesion equally far from the nipple; its height is free between the skin and the muscle."""
    x = breast.lesion_depth * shape.depth
    reach = rng.uniform(-0.4, 0.45) if view == "CC" else rng.uniform(-0.2, 0.45)
    y = shape.nipple_line(x) + reach * (shape.upper if reach < 0 else shape.lower)
    duct = float(np.arctan2(shape.nipple_y - y, shape.depth - x))
    room = anatomy.thickness - anatomy.skin
    return render_lesion(rng, breast.lesion, (x, y), duct, interior, room, grid)


def _header(plan: StudyPlan, laterality: str, view: str, grid: Grid) -> MammogramHeader:
    names = (MODEL_VERSION, plan.seed, plan.index, grid.height, grid.width)
    day = int(digest("day", plan.seed, plan.index), 16) % 3650
    return MammogramHeader(
        view_position=view,
        laterality=laterality,
        study_uid=uid_from_seed("study", *names),
        series_uid=uid_from_seed("series", *names),
        instance_uid=uid_from_seed("image", *names, laterality, view),
        study_datetime=datetime(2000, 1, 1, 9) + timedelta(days=day),
        patient_id=digest("patient", plan.seed, plan.index)[:12],
        patient_age=plan.age,
        software_version=MODEL_VERSION,
        derivation="Procedural phantom; no patient was imaged.",
        spacing=(grid.spacing, grid.spacing),
        instance_number=1 + 2 * LATERALITIES.index(laterality) + VIEW_POSITIONS.index(view),
        from_scratch=True,
    )

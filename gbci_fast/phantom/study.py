"""Draws a study (patient, breasts, findings) and renders its four images.

Every random choice has its own stream, named by its purpose. So a study depends on (seed, index) alone, and removing or
changing a finding does not change the rest of the image.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np

from gbci_fast.attributes import LATERALITIES, VIEW_POSITIONS
from gbci_fast.data.boxes import bounding_box
from gbci_fast.dicom.writing import MammogramHeader, uid_from_seed
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import digest_of
from gbci_fast.phantom.anatomy import BreastShape, Grid, draw_shape, map_anatomy
from gbci_fast.phantom.findings import PhantomFinding, draw_findings
from gbci_fast.phantom.lesions import Scene
from gbci_fast.phantom.placement import Room
from gbci_fast.phantom.population import AGE_SHARES, AGES, DENSITIES, draw_categories, relative_hazard
from gbci_fast.phantom.projection import expose, fit_window, present, set_beam
from gbci_fast.phantom.settings import Population
from gbci_fast.phantom.texture import glandular_map

MODEL_VERSION = "phantom 2"
SMALLEST, LARGEST = 128, 4096  # pixels
MUSCLE_PATH = 0.5  # mm: longer paths through muscle are in the pectoral mask

# Power spectrum 1/f^beta; soft thresholding keeps the exponent.
FIELD_BETA = {"CC": 3.17, "MLO": 3.30}


@dataclass(frozen=True, kw_only=True)
class BreastPlan:
    """One breast: its shape per view, and its findings."""

    laterality: str
    shapes: dict[str, BreastShape]
    findings: tuple[PhantomFinding, ...]


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Everything about a study except its pixels. One index is one patient, whose hash decides the ``split``.

    Attributes:
        age: years.
        population: the distribution from which the study was drawn.
        timepoint: number of the study in a growth series, from 0.
        days: days since the first study of the series.
        days_left: days until the last study of the series.
    """

    seed: int
    index: int
    age: int
    breast_density: str
    breasts: tuple[BreastPlan, ...]
    population: Population
    timepoint: int = 0
    days: int = 0
    days_left: int = 0

    @property
    def split(self) -> str:
        return "test" if int(digest("split", self.seed, self.index), 16) % 5 == 0 else "training"

    @property
    def patient_id(self) -> str:
        return digest("patient", self.seed, self.index)[:12]

    @property
    def hazard(self) -> float:
        """Hazard of breast cancer relative to the population's mean; see `population.log_hazard`."""
        return relative_hazard(self.breast_density, self.age)


@dataclass(frozen=True, kw_only=True)
class LesionTruth:
    """One finding in one image; its ``mask``, bool [H, W], is not empty."""

    finding: PhantomFinding
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """xmin, ymin, xmax, ymax of the mask in pixels, the last two exclusive."""
        return bounding_box(self.mask)


@dataclass(frozen=True, kw_only=True)
class PhantomImage:
    """One rendered image: pixels and exact truth.

    Attributes:
        stored: uint16 [H, W].
        window: (center, width).
        breast, pectoral: masks, bool [H, W].
        twin: ``stored`` of the same breast without findings under the same exposure, noise and window, or None if not
            requested. It differs from ``stored`` only inside the findings' masks.
    """

    study_id: str
    series_id: str
    image_id: str
    header: MammogramHeader
    stored: np.ndarray
    window: tuple[float, float]
    breast: np.ndarray
    pectoral: np.ndarray
    lesions: tuple[LesionTruth, ...]
    twin: np.ndarray | None
    plan: StudyPlan
    breast_plan: BreastPlan

    @property
    def mask(self) -> np.ndarray:
        """The union of all findings' masks, bool [H, W]."""
        union = np.zeros(self.stored.shape, bool)
        for lesion in self.lesions:
            union |= lesion.mask
        return union


def render_study(
    seed: int,
    index: int,
    size: int | tuple[int, int] = 512,
    *,
    population: Population | None = None,
    twins: bool = False,
) -> list[PhantomImage]:
    """The four images (CC and MLO of the left, then of the right breast) of study ``index``.

    Args:
        seed: seed of the data set; ``seed`` and ``index`` decide every random choice.
        size: height (and width) in pixels, 128 to 4096 each; the height always spans 240 mm.
        population: the distribution from which the study is drawn.
        twins: render the healthy twins as well.

    Raises:
        GBCIError: a size outside these limits, or too narrow for a breast.
    """
    return render_plan(draw_study(seed, index, population), make_grid(size), twins=twins)


def render_plan(plan: StudyPlan, grid: Grid, *, twins: bool = False) -> list[PhantomImage]:
    """The four images of a plan, in the order of `render_study`."""
    return [render_image(plan, breast, view, grid, twins) for breast in plan.breasts for view in VIEW_POSITIONS]


def make_grid(size: int | tuple[int, int]) -> Grid:
    """The pixel grid of a size (see `render_study`).

    Raises:
        GBCIError: a size outside the limits, or too narrow for a breast.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not (SMALLEST <= height <= LARGEST and SMALLEST <= width <= LARGEST and width >= 0.6 * height):
        raise GBCIError(
            f"phantom size is {height}x{width}; expected height and width from {SMALLEST} to {LARGEST} pixels "
            "and a width of at least 0.6 times the height"
        )
    return Grid(height, width)


def draw_study(seed: int, index: int, population: Population | None = None) -> StudyPlan:
    """The plan of study ``index`` of the data set ``seed``."""
    population = population or Population()
    rng = stream(seed, index, "study")
    density = str(rng.choice(list(DENSITIES), p=[share for share, _, _ in DENSITIES.values()]))
    depth = rng.uniform(80, 115)
    age = int(rng.choice(AGES, p=AGE_SHARES))
    hazard = relative_hazard(density, age)
    breasts: list[BreastPlan] = []
    for laterality in LATERALITIES:
        breast_depth = depth * stream(seed, index, "breast", laterality).uniform(0.95, 1.05)
        shapes = {
            view: draw_shape(
                stream(seed, index, laterality, view, "shape"),
                view_position=view,
                depth=breast_depth,
                thickness=DENSITIES[density][2],
            )
            for view in VIEW_POSITIONS
        }
        categories = draw_categories(population, stream(seed, index, laterality, "categories"), hazard)
        # A global asymmetry is denser than the other breast, so at most one breast has it.
        if breasts and any("Global Asymmetry" in finding.categories for finding in breasts[0].findings):
            categories = [item for item in categories if item[0] != "Global Asymmetry"]
        findings = ()
        if categories:
            findings = draw_findings(stream(seed, index, laterality, "findings"), categories, Room(shapes))
        breasts.append(BreastPlan(laterality=laterality, shapes=shapes, findings=findings))
    return StudyPlan(
        seed=seed, index=index, age=age, breast_density=density, breasts=tuple(breasts), population=population
    )


def growth_series(plan: StudyPlan, timepoints: int, interval: int) -> list[StudyPlan]:
    """``timepoints`` plans of one patient, ``interval`` days apart; the last has the lesion sizes of ``plan``.

    Anatomy, places and shapes stay the same; masses, nodes and calcifications with ``doubling_days`` grow. The noise is
    new at each timepoint.
    """
    series = []
    for timepoint in range(timepoints):
        before = (timepoints - 1 - timepoint) * interval
        breasts = tuple(
            replace(breast, findings=tuple(finding.earlier(before) for finding in breast.findings))
            for breast in plan.breasts
        )
        days = timepoint * interval
        age = plan.age - round(before / 365.25)
        series.append(replace(plan, breasts=breasts, timepoint=timepoint, days=days, days_left=before, age=age))
    return series


def render_image(plan: StudyPlan, breast: BreastPlan, view: str, grid: Grid, twins: bool = False) -> PhantomImage:
    """One view of one breast of the plan."""
    _, fat_fraction, slab = DENSITIES[plan.breast_density]

    def image_stream(*purpose: object) -> np.random.Generator:
        return stream(plan.seed, plan.index, breast.laterality, view, *purpose)

    shape = breast.shapes[view]
    anatomy = map_anatomy(shape, grid)
    tissue = glandular_map(
        image_stream("texture"), shape, anatomy, grid, beta=FIELD_BETA[view], fat_fraction=fat_fraction
    )
    healthy = Scene.healthy(view, grid, shape, anatomy, tissue)
    beam = set_beam(healthy.integral, anatomy.inside > 0, grid)

    def photograph(scene: Scene) -> np.ndarray:
        exposure = expose(image_stream("noise", plan.timepoint), scene.integral, beam)
        return present(exposure, scene.inside, scene.thickness, slab, grid)

    scene, masks = healthy, []
    if breast.findings:
        scene = healthy.copy()
        masks = scene.add(breast.findings, [image_stream("finding", i) for i in range(len(breast.findings))])
    stored = photograph(scene)
    differs = any(mask.any() for mask in masks)
    twin = photograph(healthy) if twins and differs else stored if twins else None
    # Chest wall left for L, right for R.
    mirror = slice(None, None, 1 if breast.laterality == "L" else -1)

    def mirrored(image: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(image[:, mirror])

    names = _names(plan, grid)
    return PhantomImage(
        study_id=digest("study", *names)[:32],
        series_id=digest("series", *names)[:32],
        image_id=digest("image", *names, breast.laterality, view)[:32],
        header=_header(plan, breast.laterality, view, grid),
        stored=mirrored(stored),
        window=fit_window(healthy.integral, beam, anatomy, slab, grid),
        breast=mirrored(scene.inside > 0),
        pectoral=mirrored(anatomy.muscle > MUSCLE_PATH),
        lesions=tuple(
            LesionTruth(finding=finding, mask=mirrored(mask))
            for finding, mask in zip(breast.findings, masks, strict=True)
            if mask.any()
        ),
        twin=None if twin is None else mirrored(twin),
        plan=plan,
        breast_plan=breast,
    )


def stream(*names: object) -> np.random.Generator:
    """An independent random stream for every tuple of names."""
    return np.random.default_rng(int(digest(*names), 16))


def digest(*names: object) -> str:
    """SHA-256 of the names and the model's version: 64 hexadecimal digits."""
    return digest_of("gbci_fast", MODEL_VERSION, *names)


def _names(plan: StudyPlan, grid: Grid) -> tuple[object, ...]:
    """Everything that decides the pixels of a study, so that no two different images share a UID."""
    drawn_from = float(plan.population.prevalence), plan.population.balance
    return plan.seed, plan.index, *drawn_from, plan.timepoint, plan.days, plan.days_left, grid.height, grid.width


def _header(plan: StudyPlan, laterality: str, view: str, grid: Grid) -> MammogramHeader:
    names = (MODEL_VERSION, *_names(plan, grid))
    day = int(digest("day", plan.seed, plan.index), 16) % 3650 + plan.days
    return MammogramHeader(
        view_position=view,
        laterality=laterality,
        study_uid=uid_from_seed("study", *names),
        series_uid=uid_from_seed("series", *names),
        instance_uid=uid_from_seed("image", *names, laterality, view),
        study_datetime=datetime(2000, 1, 1, 9) + timedelta(days=day),
        patient_id=plan.patient_id,
        patient_age=plan.age,
        software_version=MODEL_VERSION,
        derivation="Procedural phantom; no patient was imaged.",
        from_scratch=True,
        spacing=(grid.spacing, grid.spacing),
        instance_number=1 + 2 * LATERALITIES.index(laterality) + VIEW_POSITIONS.index(view),
    )

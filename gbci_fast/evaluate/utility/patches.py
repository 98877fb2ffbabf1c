"""Windows of fixed size for a lesion detector: lesions, normal tissue, and masks moved into normal tissue."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gbci_fast.data.boxes import bounding_box
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import image_seed
from gbci_fast.evaluate.lesions import LesionCase

PATCH_SIZE = 64  # model pixels, never resampled
NEAREST = 0.1  # share of an image's normal windows to draw from: those nearest to the wanted breast share
TRIES = 40  # places tried per mask in one host image
DONORS = 25  # masks tried in one host image

Window = tuple[int, int]
"""(top, left) of a square of `PATCH_SIZE` that lies within the image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Patches:
    """Windows of images.

    Attributes:
        pixels: float32 [N, P, P] in [0, 1], or [N, C, P, P] of several channels.
        patients: the patient of every window, N.
    """

    pixels: np.ndarray
    patients: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def of_patients(self, patients: set[str]) -> "Patches":
        """The windows of some patients, in the same order."""
        rows = [i for i, patient in enumerate(self.patients) if patient in patients]
        return Patches(pixels=self.pixels[rows], patients=tuple(self.patients[i] for i in rows))

    def __add__(self, other: "Patches") -> "Patches":
        return Patches(pixels=np.concatenate([self.pixels, other.pixels]), patients=self.patients + other.patients)


class Site:
    """The normal tissue of an image.

    Args:
        cases: all lesions of one image; pixels and breast are taken from the first.

    Raises:
        GBCIError: the image is smaller than a patch.
    """

    def __init__(self, cases: Sequence[LesionCase]) -> None:
        self.case = cases[0]
        self.occupied = np.logical_or.reduce([case.mask for case in cases])
        """bool [S, S]: the masks of all lesions."""
        if min(self.occupied.shape) < PATCH_SIZE:
            raise GBCIError(f"images are {len(self.occupied)} pixels wide; expected at least {PATCH_SIZE}, a patch")

    @cached_property
    def lesion_pixels(self) -> np.ndarray:
        """The number of lesion pixels in every window, int [S - P + 1, S - P + 1]."""
        return _window_sums(self.occupied)

    def is_free(self, window: Window) -> bool:
        """Whether a window lies in the image and touches no lesion; unlike a `Window`, it may lie outside."""
        rows, columns = self.lesion_pixels.shape
        return 0 <= window[0] < rows and 0 <= window[1] < columns and self.lesion_pixels[window] == 0

    @cached_property
    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """All windows that are centered in the breast and touch no lesion, int [N, 2], and their breast shares [N]."""
        half = PATCH_SIZE // 2
        lesions, breast = self.lesion_pixels, _window_sums(self.case.breast)
        centers = self.case.breast[half : half + len(lesions), half : half + lesions.shape[1]]
        free = (lesions == 0) & centers
        return np.argwhere(free), breast[free] / PATCH_SIZE**2

    def draw(self, share: float, count: int, rng: np.random.Generator) -> list[Window]:
        """Up to `count` different windows, in random order, out of those `NEAREST` to the breast share `share`."""
        places, shares = self.windows
        if not len(places):
            return []
        nearest = np.argsort(np.abs(shares - share), kind="stable")[: max(1, round(NEAREST * len(places)))]
        return [(int(y), int(x)) for y, x in places[rng.permutation(nearest)[:count]]]


def sites(cases: Sequence[LesionCase]) -> list[Site]:
    """One `Site` per image, in the order of the cases."""
    grouped: dict[tuple[str, str], list[LesionCase]] = {}
    for case in cases:
        grouped.setdefault((case.root, case.image_id), []).append(case)
    return [Site(group) for group in grouped.values()]


def lesion_window(case: LesionCase, offset: int = 0) -> Window:
    """The window around the mask's box, shifted into the image where it would cross the edge.

    Along each axis, its middle lies up to `offset` pixels from the box's, as the case's seed says. A box that fits into
    the window stays inside; of a larger one, the middle does.
    """
    rng = np.random.default_rng(case.seed)
    starts = []
    for axis in (1, 0):
        hits = np.flatnonzero(case.mask.any(axis))
        room = (PATCH_SIZE - int(hits[-1] + 1 - hits[0])) // 2
        largest = min(offset, room if room >= 0 else PATCH_SIZE // 2 - 1)
        start = int(hits[0] + hits[-1] + 1 - PATCH_SIZE) // 2 + int(rng.integers(-largest, largest + 1))
        starts.append(min(max(start, 0), case.mask.shape[1 - axis] - PATCH_SIZE))
    return starts[0], starts[1]


def cut(image: np.ndarray, window: Window) -> np.ndarray:
    """The pixels [P, P] of a window of an image [S, S]."""
    top, left = window
    return image[top : top + PATCH_SIZE, left : left + PATCH_SIZE]


def lesion_patches(
    cases: Sequence[LesionCase], images: Sequence[np.ndarray] | None = None, *, offset: int = 0
) -> Patches:
    """The window of every case (see `lesion_window`).

    Args:
        cases: the lesions.
        images: float32 [S, S] in [0, 1], one per case; None = the cases' own.
        offset: as for `lesion_window`.
    """
    images = [case.pixels for case in cases] if images is None else images
    pixels = [cut(image, lesion_window(case, offset)) for case, image in zip(cases, images, strict=True)]
    return Patches(pixels=_stack(pixels), patients=tuple(case.patient for case in cases))


def normal_patches(
    cases: Sequence[LesionCase], seed: int, *, offset: int = 0, others: Sequence[LesionCase] = ()
) -> Patches:
    """For every lesion, a window of normal tissue of the same image with about the same breast share.

    The window is off the place that is drawn by as much as the lesion's own window is off the lesion. An image without
    room for a window gives none.

    Args:
        cases: the lesions.
        seed: of the places.
        offset: as for `lesion_window`.
        others: further lesions of the same images, which the windows do not touch.
    """
    places = {(site.case.root, site.case.image_id): site for site in sites([*cases, *others])}
    pixels, patients = [], []
    for case in cases:
        site = places[case.root, case.image_id]
        rng = np.random.default_rng(image_seed(seed, case.root, f"normal-{case.name}"))
        (top, left), (middle_top, middle_left) = lesion_window(case, offset), lesion_window(case)
        for y, x in site.draw(_breast_share(case), TRIES, rng):
            window = y + top - middle_top, x + left - middle_left
            if site.is_free(window):
                pixels.append(cut(case.pixels, window))
                patients.append(case.patient)
                break
    return Patches(pixels=_stack(pixels), patients=tuple(patients))


def moved_lesions(cases: Sequence[LesionCase], count: int, seed: int, *, offset: int = 0) -> list[LesionCase]:
    """Cases of `count` new lesions in normal tissue: the mask of one patient (donor) in the breast of another (host).

    Hosts are the images of `cases`, each about equally often. The mask lies in the breast; it and its window (by
    `lesion_window` with `offset`) touch no lesion. The breast share around the mask is about that around the donor's.
    Laterality, view, density, age and pixel spacing are described as the host's, the rest as the donor's. For one seed,
    a longer list begins with the shorter one.

    Raises:
        GBCIError: no mask fits in any image, or all cases are of one patient.
    """
    if len({case.patient for case in cases}) < 2:
        raise GBCIError("all training lesions are of one patient; expected at least 2, for masks come from another one")
    hosts = sites(cases)
    order = np.random.default_rng(seed).permutation(len(hosts))
    shares = [_breast_share(case) for case in cases]
    moved: list[LesionCase] = []
    failed = 0
    while len(moved) < count:
        turn = len(moved) + failed
        host = hosts[order[turn % len(hosts)]]
        own = image_seed(seed, host.case.root, f"moved-{turn}-{host.case.image_id}")
        case = _host_lesion(host, cases, shares, np.random.default_rng([seed, turn]), own, offset)
        if case is not None:
            moved.append(case)
            continue
        failed += 1
        if failed >= len(hosts) and not moved:
            raise GBCIError(f"no lesion's mask fits into the normal tissue of any of {len(hosts)} images")
    return moved


def _host_lesion(
    host: Site,
    cases: Sequence[LesionCase],
    shares: Sequence[float],
    rng: np.random.Generator,
    seed: int,
    offset: int,
) -> LesionCase | None:
    """A donor's mask in one host image, as a case with `seed`; None where none of `DONORS` masks fits."""
    others = [i for i, case in enumerate(cases) if case.patient != host.case.patient]
    alike = [i for i in others if cases[i].root == host.case.root] or others  # film and digital images differ
    for i in rng.permutation(alike)[:DONORS]:
        donor = cases[i]
        for window in host.draw(shares[i], TRIES, rng):
            mask = _moved(donor.mask, donor.mask, window)
            if mask is None or (mask & ~host.case.breast).any() or (mask & host.occupied).any():
                continue
            case = _described_by(donor, replace(host.case, mask=mask, seed=seed), window)
            if host.is_free(lesion_window(case, offset)):
                return case
    return None


def _described_by(donor: LesionCase, host: LesionCase, window: Window) -> LesionCase:
    """The case of `host` with the donor's lesion at `window`, and the donor's description of it."""
    return replace(
        host,
        lesion=_moved(donor.lesion & donor.mask, donor.mask, window),
        attributes=replace(
            host.attributes,
            breast_birads=donor.attributes.breast_birads,
            finding_categories=donor.attributes.finding_categories,
            finding_birads=donor.attributes.finding_birads,
            shape=donor.attributes.shape,
            margin=donor.attributes.margin,
            pathology=donor.attributes.pathology,
            subtlety=donor.attributes.subtlety,
        ),
        report=donor.report,
    )


def _moved(pixels: np.ndarray, mask: np.ndarray, window: Window) -> np.ndarray | None:
    """`pixels` [S, S] moved so that the mask's box is centered in a window; None if the box then leaves the image."""
    xmin, ymin, xmax, ymax = bounding_box(mask)
    height, width = ymax - ymin, xmax - xmin
    # Rounded as in `lesion_window`, so that `window` is the moved mask's centered window.
    top, left = window[0] - (height - PATCH_SIZE) // 2, window[1] - (width - PATCH_SIZE) // 2
    if top < 0 or left < 0 or top + height > mask.shape[0] or left + width > mask.shape[1]:
        return None
    out = np.zeros_like(pixels)
    out[top : top + height, left : left + width] = pixels[ymin:ymax, xmin:xmax]
    return out


def _breast_share(case: LesionCase) -> float:
    return float(cut(case.breast, lesion_window(case)).mean())


def _window_sums(mask: np.ndarray) -> np.ndarray:
    """The number of a mask's pixels in every window, int [S - P + 1, S - P + 1]."""
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    size = PATCH_SIZE
    return sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]


def _stack(pixels: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(pixels).astype(np.float32) if pixels else np.empty((0, PATCH_SIZE, PATCH_SIZE), np.float32)

"""Synthetic lesions with and without spicules, a painter that obeys and one that does not, and a reader."""

from dataclasses import replace

import numpy as np
import pytest

from gbci_fast.attributes import Attributes
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.obedience.measures import MEASURES, measure

SIZE, GRAY, BRIGHT = 160, 0.3, 0.3
SPICULES, REACH = 9, 6  # number, and how far they leave the disk, pixels


def _lesion_image(case, spiculated, seed):
    """A disk at the case's place, with or without spicules, in noise; float32 [S, S]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((SIZE, SIZE))
    y, x = (axis - center for axis, center in zip((rows, columns), np.argwhere(case.lesion).mean(0), strict=True))
    radius, angle = np.hypot(y, x), np.arctan2(y, x)
    body = case.diameter / 2 - 2
    image = GRAY + BRIGHT / (1 + np.exp(2 * (radius - body)))
    if spiculated:
        turns = (angle + rng.uniform(0, 2 * np.pi)) * SPICULES / (2 * np.pi)
        near = np.abs(turns - np.round(turns)) * 2 * np.pi / SPICULES * radius < 0.8  # pixels from a spicule's axis
        image[near & (radius > body - 4) & (radius < body + REACH)] += 0.15
    return (image + rng.normal(0, 0.02, image.shape)).clip(0, 1).astype(np.float32)


def _disk_case(index, spiculated, root="set"):
    """A real mass, one of two of its patient."""
    rng = np.random.default_rng([index, 7])
    rows, columns = np.indices((SIZE, SIZE))
    distance = np.hypot(rows - rng.integers(30, 66), columns - rng.integers(30, 66))
    radius = rng.uniform(9, 14)
    told = Attributes(
        finding_categories=("Mass",),
        margin="spiculated" if spiculated else "circumscribed",
        shape="irregular" if spiculated else "oval",
        finding_birads=4,
        breast_density="AD"[index % 2],  # shows in nothing
    )
    case = LesionCase(
        root=root,
        image_id=f"image{index}",
        number=0,
        patient=f"{root}/{index // 2}",
        split="training",
        seed=index,
        image=np.zeros((SIZE, SIZE), np.uint16),
        breast=np.ones((SIZE, SIZE), bool),
        lesion=distance <= radius,
        mask=distance <= radius + 3,
        attributes=told,
        report="a mass",
    )
    return replace(case, image=(_lesion_image(case, spiculated, [index, 1]) * 65535).astype(np.uint16))


def _obedient(cases, descriptions):
    """Paints spicules where they are told."""
    margins = [told.attributes.margin for told in descriptions]
    painted = [
        _lesion_image(case, margin == "spiculated", case.seed) for case, margin in zip(cases, margins, strict=True)
    ]
    return [np.where(case.mask, image, case.pixels) for case, image in zip(cases, painted, strict=True)]


def _deaf(cases, descriptions):
    """Paints by the seed alone."""
    painted = [_lesion_image(case, case.seed % 2 == 0, case.seed) for case in cases]
    return [np.where(case.mask, image, case.pixels) for case, image in zip(cases, painted, strict=True)]


class _Reader:
    """Reads the margin by the measured spiculation, and nothing else."""

    tasks = ("margin",)

    def read(self, cases, images=None):
        return {"margin": measure(cases, images)[:, MEASURES.index("spiculation")]}


@pytest.fixture(scope="session")
def lesion_image():
    """`lesion_image(case, spiculated, seed)`: a disk at the case's place, with or without spicules, in noise."""
    return _lesion_image


@pytest.fixture(scope="session")
def disk_case():
    """`disk_case(index, spiculated, root="set")`: a real mass, one of two of its patient."""
    return _disk_case


@pytest.fixture(scope="session")
def obedient():
    """A painter that paints spicules where they are told."""
    return _obedient


@pytest.fixture(scope="session")
def deaf():
    """A painter that paints by the seed alone."""
    return _deaf


@pytest.fixture(scope="session")
def reader():
    """Reads the margin by the measured spiculation, and nothing else."""
    return _Reader()


@pytest.fixture(scope="session")
def masses():
    """48 masses of 24 patients, every second patient's spiculated."""
    return [_disk_case(i, i // 2 % 2 == 1) for i in range(48)]

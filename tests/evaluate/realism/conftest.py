"""Lesions in noise, with plain or planted fillings."""

import numpy as np
import pytest

from gbci_fast.attributes import Attributes
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.realism.boosting import SETTINGS
from gbci_fast.evaluate.realism.judging import Side
from gbci_fast.evaluate.realism.paintings import under_masks
from gbci_fast.evaluate.realism.regions import Place

SIZE = 64


@pytest.fixture(scope="session", autouse=True)
def few_trees():
    """Boosting is fast; planted differences are large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "max_iter", 30)
        yield


@pytest.fixture(scope="session")
def noisy_cases():
    """`noisy_cases(count, seed=0, roots=("film",), patients=None)`: bright disks in white noise, one per image."""

    def make(count, seed=0, roots=("film",), patients=None):
        cases = []
        for i in range(count):
            rng = np.random.default_rng([seed, i])
            y, x = np.mgrid[:SIZE, :SIZE]
            center, radius = rng.uniform(24, 40, 2), rng.uniform(8, 12)
            lesion = (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2
            pixels = rng.uniform(0.3, 0.5) + 0.2 * lesion + rng.normal(0, 0.03, (SIZE, SIZE))
            patient = f"{roots[i % len(roots)]}/s{seed}p{i % (patients or count)}"
            cases.append(
                LesionCase(
                    root=roots[i % len(roots)],
                    image_id=f"image{seed}_{i}",
                    number=0,
                    patient=patient,
                    split="training",
                    seed=i,
                    image=np.rint(pixels.clip(0, 1) * 65535).astype(np.uint16),
                    breast=np.ones((SIZE, SIZE), bool),
                    lesion=lesion,
                    mask=lesion,
                    attributes=Attributes(),
                    report=None,
                )
            )
        return cases

    return make


@pytest.fixture(scope="session")
def side():
    """`side(cases, **images)`: a `Side` of the real lesions and of images by kind, one per case."""

    def make(cases, **images):
        fillings = {"real": [case.image[case.mask] for case in cases]}
        fillings |= {kind: under_masks(cases, found) for kind, found in images.items()}
        return Side(cases=cases, places=[Place.of(case) for case in cases], fillings=fillings)

    return make

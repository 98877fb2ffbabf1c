"""The painted pixels of many lesions in one small file, so that a judge can be checked against one model for good.

The file holds the pixels under the masks alone. They are synthetic; all other pixels are the real images' and are taken
from the data set.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.settings import PaintSettings
from gbci_fast.jobs.files import atomically_open

FORMAT = 1
WHITE = 65535

Filling = list[np.ndarray]
"""One array per case: the pixels under its mask, row by row, uint16 [M] with 65535 = 1.0."""


def under_masks(cases: Sequence[LesionCase], images: Sequence[np.ndarray]) -> Filling:
    """The pixels under the masks of images, float [S, S] in [0, 1], one per case; rounded to 16 bits."""
    pairs = zip(cases, images, strict=True)
    return [np.rint(image[case.mask].clip(0, 1) * np.float64(WHITE)).astype(np.uint16) for case, image in pairs]


def fill(case: LesionCase, pixels: np.ndarray) -> np.ndarray:
    """The case's image with `pixels` (an entry of a `Filling`) under its mask, float32 [S, S] in [0, 1]."""
    image = case.image.copy()
    image[case.mask] = pixels
    return image.astype(np.float32) / WHITE


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredPaintings:
    """Painted lesions of a file.

    Attributes:
        path: of the file.
        weights: digest of the weights that painted.
        painting: settings of the sampler.
        pixels: {key of a lesion: an entry of a `Filling`}, see `key_of`.
    """

    path: Path
    weights: str
    painting: dict[str, Any]
    pixels: dict[str, np.ndarray]

    def of(self, cases: Sequence[LesionCase]) -> Filling:
        """The paintings of the cases.

        Raises:
            GBCIError: the file lacks a lesion, or holds it for another image or mask.
        """
        return [self._find(case) for case in cases]

    def _find(self, case: LesionCase) -> np.ndarray:
        found = self.pixels.get(key_of(case))
        if found is None or len(found) != case.mask.sum():
            raise GBCIError(
                f"{self.path} holds no painting of {case.root}/{case.name} with this image and mask; expected one of "
                "every lesion: use the roots, folds and preparation that the file was written from"
            )
        return found


def key_of(case: LesionCase) -> str:
    """The lesion's root, name, and a digest of its image and mask."""
    digest = hashlib.sha256(case.image.tobytes())
    digest.update(np.packbits(case.mask).tobytes())
    return f"{case.root}/{case.name}/{digest.hexdigest()[:16]}"


def save_paintings(
    path: Path, cases: Sequence[LesionCase], filling: Filling, *, weights: str, painting: PaintSettings
) -> None:
    """Writes the paintings of the cases; the file is written whole or not at all."""
    about = {"format": FORMAT, "weights": weights, "painting": asdict(painting)}
    arrays = {
        "about": np.array(json.dumps(about)),
        "keys": np.array([key_of(case) for case in cases]),
        "counts": np.array([len(pixels) for pixels in filling], np.int32),
        # The differences of neighbors need fewer bytes.
        "steps": np.diff(np.concatenate(filling), prepend=np.uint16(0)),
    }
    atomically_open(path, partial(np.savez_compressed, **arrays))


def read_paintings(path: Path) -> StoredPaintings:
    """Reads a file of `save_paintings`.

    Raises:
        GBCIError: the file cannot be read, or is not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            keys, counts, steps = file["keys"].tolist(), file["counts"], file["steps"]
        if about["format"] != FORMAT or steps.dtype != np.uint16 or counts.sum() != len(steps):
            raise ValueError(f"format {about['format']}")
        pixels = np.split(np.cumsum(steps, dtype=np.uint16), np.cumsum(counts)[:-1])
        found = dict(zip(keys, pixels, strict=True))
        return StoredPaintings(path=path, weights=about["weights"], painting=about["painting"], pixels=found)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise GBCIError(f"{path} cannot be read as paintings: {error}; expected a file of --save-paintings") from error

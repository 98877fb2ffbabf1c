"""Patient folds inside the training split: models, their judges and all choices share no patient."""

import zlib

from gbci_fast.errors import GBCIError

FOLDS = ("A", "B", "C")
TRAINED = "AB"  # folds that generators learn from
SHARE_OF_C = 3, 20  # of the patients


def patient_fold(patient: str) -> str:
    """The fold of a patient, A, B or C (15 %), by a hash of the id.

    A and B train generators; A alone trains the readers that judge, B alone a model that selects. C trains nothing:
    thresholds and settings are chosen on it.
    """
    number = zlib.crc32(patient.encode())
    part, whole = SHARE_OF_C
    return "C" if (number >> 1) % whole < part else "AB"[number & 1]


def check_folds(folds: str) -> None:
    """Raises GBCIError unless `folds` are letters of `FOLDS`, each once, such as "AB"."""
    if not folds or len(set(folds)) < len(folds) or set(folds) - set(FOLDS):
        raise GBCIError(f"folds are {folds!r}; expected letters out of {', '.join(FOLDS)}, such as AB")

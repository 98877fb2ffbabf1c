"""One case of the corpus: a file and its expected result."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One file and its expected result.

    Attributes:
        group, name: first two columns of the table's row.
        build: returns the file's bytes.
        display: expected display values, float64 [H, W], worked out by hand from the standard's formula; ``None`` if
            the file is refused.
        refused: beginning of the expected error, after the file's name.
        tolerance: largest absolute difference to ``display``; the default allows only rounding.
        notes: expected notes.
        spacing, laterality: expected values; the view is always CC.
        second: dcmtk's tool and options for the same display; empty if dcmtk cannot render the file.
        second_tolerance: largest difference to dcmtk's display, in levels of 16 bits.
        padding: bool [H, W], pixels of padding, which dcmtk displays as if they were image.
    """

    group: str
    name: str
    build: Callable[[], bytes]
    display: np.ndarray | None = None
    refused: str = ""
    tolerance: float = 1e-6
    notes: tuple[str, ...] = ()
    spacing: tuple[float, float] | None = None
    laterality: str = "L"
    second: tuple[str, ...] = ()
    second_tolerance: int = 1
    padding: np.ndarray | None = None

    def __post_init__(self):
        if (self.display is None) != bool(self.refused):
            raise ValueError(f"{self.name}: either displays, or is refused")

    @property
    def id(self) -> str:
        """The test id that pytest shows."""
        return f"{self.group}-{self.name}".replace(" ", "_")

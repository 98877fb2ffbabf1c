"""What a case of the corpus is."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One file and what must become of it.

    Attributes:
        group, name: of the table's row.
        build: makes the file.
        display: float64 [H, W], values worked out by hand from the standard's formula; ``None`` where it is refused.
        refused: how the sentence begins, after the file's name.
        tolerance: of `display`; 16 bits suffice for an exact one.
        notes: of the mammogram.
        spacing, laterality: of the mammogram, whose view is CC.
        second: dcmtk's tool and options that display the same; empty where it has none.
        second_tolerance: of the difference to it, in levels of 16 bits.
        padding: bool [H, W]: where dcmtk displays padding as if it were the image.
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
        """The name as pytest shows it."""
        return f"{self.group}-{self.name}".replace(" ", "_")

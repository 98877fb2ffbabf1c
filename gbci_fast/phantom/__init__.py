"""A procedural mammography phantom: images with pixel-exact truth, in the VinDr-Mammo layout.

- `population`: distributions of density, age, hazard and finding categories.
- `anatomy`, `texture`: the breast's shape and its tissue.
- `findings`, `placement`, `bodies`: the findings of a breast, their places, and their three-dimensional shapes.
- `lesions`: draws findings into one view.
- `projection`, `ultrasound`: the X-ray image, and a B-mode slice through the same lesion.
- `study`: draws and renders one study.
- `dataset`, `ultrasound_files`, `preview`: write a data set's files and its contact sheet.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gbci_fast.phantom.dataset import generate_phantom
    from gbci_fast.phantom.settings import Population
    from gbci_fast.phantom.study import LesionTruth, PhantomImage, render_study
    from gbci_fast.phantom.ultrasound import UltrasoundSlice, render_ultrasound

__all__ = [
    "LesionTruth",
    "PhantomImage",
    "Population",
    "UltrasoundSlice",
    "generate_phantom",
    "render_study",
    "render_ultrasound",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that the command line starts without numpy."""
    for home in ("dataset", "settings", "study", "ultrasound") if name in __all__ else ():
        module = importlib.import_module(f"gbci_fast.phantom.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'gbci_fast.phantom' has no attribute {name!r}")

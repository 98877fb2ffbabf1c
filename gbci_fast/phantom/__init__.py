"""A procedural mammography phantom: images with pixel-exact truth, in the VinDr-Mammo layout.

`anatomy` draws the breast and `texture` its tissue; `population` decides who has what, `bodies` are lesions in three
dimensions, `placement` says where they lie, `findings` what they are, and `lesions` draws them; `projection` is the
X-ray image, `ultrasound` a B-mode slice of the same lesion. `study` puts one study together, `dataset` (with
`ultrasound_files`) writes the files and `preview` a contact sheet.
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

"""A procedural mammography phantom: images with pixel-exact truth, in the VinDr-Mammo layout.

`anatomy` draws the breast and `texture` its tissue; `population` decides who has what, `bodies` are lesions in three
dimensions, `placement` says where they lie, `findings` what they are, and `lesions` draws them; `projection` is the
X-ray image, `ultrasound` a B-mode slice of the same lesion. `study` puts one study together, `dataset` (with
`ultrasound_files`) writes the files and `preview` a contact sheet.
"""

from gbci_fast.phantom.dataset import generate_phantom
from gbci_fast.phantom.population import Population
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

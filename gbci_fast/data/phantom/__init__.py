"""A procedural mammography phantom: images with pixel-exact truth, in the VinDr-Mammo layout.

`anatomy` draws the breast, `texture` its tissue, `lesions` what is wrong with it, `projection` its X-ray image; `study`
decides who has what, and `dataset` writes the files.
"""

from gbci_fast.data.phantom.dataset import generate_phantom
from gbci_fast.data.phantom.study import PhantomImage, render_study

__all__ = ["PhantomImage", "generate_phantom", "render_study"]

"""Generative Breast Cancer Imaging, fast: synthetic lesions in real mammograms, for research data sets only."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; `__getattr__` imports them otherwise
    from gbci_fast.attributes import Attributes
    from gbci_fast.errors import GBCIError
    from gbci_fast.fast.accelerate import accelerate
    from gbci_fast.model.conditioning import ConditionEncoder
    from gbci_fast.model.pipeline import GBCIPipeline

__version__ = "0.1.0"
__all__ = ["Attributes", "ConditionEncoder", "GBCIError", "GBCIPipeline", "accelerate"]

_HOMES = {
    "Attributes": "gbci_fast.attributes",
    "ConditionEncoder": "gbci_fast.model.conditioning",
    "GBCIError": "gbci_fast.errors",
    "GBCIPipeline": "gbci_fast.model.pipeline",
    "accelerate": "gbci_fast.fast.accelerate",
}


def __getattr__(name: str):
    """Imports a public name when it is first used, so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gbci_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

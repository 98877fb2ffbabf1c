"""Opens a pipeline folder for the command line: without log output, on a device, with one clear error message."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import logging

from gbci_fast.errors import GBCIError
from gbci_fast.model.pipeline import PACKAGED_WEIGHTS, GBCIPipeline


def checkpoint_folder(given: Path | None) -> Path:
    """The given pipeline folder; None = the packaged one.

    Raises:
        GBCIError: the folder holds no pipeline.
    """
    folder = given or PACKAGED_WEIGHTS
    if not (folder / "model_index.json").is_file():
        raise GBCIError(f"{folder} has no model_index.json; expected a pipeline folder as `gbci-fast train ldm` writes")
    return folder


def load_pipeline(folder: Path, *, device: torch.device | str = "cpu") -> GBCIPipeline:
    """Loads a pipeline folder without progress bars, in float32 on `device`; safetensors only.

    Raises:
        GBCIError: the folder holds no pipeline, or a damaged one.
    """
    checkpoint_folder(folder)
    logging.disable_progress_bar()
    with _errors_are_raised():
        pipe = GBCIPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def _errors_are_raised() -> Iterator[None]:
    """Silences diffusers' log: the errors in it are raised as exceptions, too."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)

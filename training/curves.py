"""Training curves for TensorBoard."""

from pathlib import Path
from types import TracebackType

from gbci_fast.errors import GBCIError

FOLDER = "tensorboard"


class Curves:
    """Context that writes scalars to ``<output>/tensorboard``.

    Args:
        output: folder of the run.
        start: step that the run starts from; points of later steps, from an interrupted run, are dropped.

    Raises:
        GBCIError: tensorboard is not installed.
    """

    def __init__(self, output: Path, start: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise GBCIError("tensorboard is not installed: pip install 'gbci_fast[train]'") from error
        self._writer = SummaryWriter(str(output / FOLDER), purge_step=start + 1)

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()

    def add(self, step: int, **values: float) -> None:
        """Adds a point to every named curve, after `step` optimizer steps."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

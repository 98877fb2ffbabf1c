"""Training curves as TensorBoard reads them."""

from pathlib import Path
from types import TracebackType

from gbci_fast.errors import GBCIError

FOLDER = "tensorboard"


class Curves:
    """Context that writes scalars to ``<output>/tensorboard``; a resumed run goes on where its weights are.

    Raises:
        GBCIError: the package is not installed.
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
        """One point of every curve, at `step` finished optimizer steps."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

"""Checks of a job's inputs before sampling: files, headers, sizes and views. Pixels are not read."""

from collections.abc import Sequence
from pathlib import Path

from gbci_fast.data.vindr import ImageRecord
from gbci_fast.dicom.reading import ImageHeader, read_header
from gbci_fast.errors import GBCIError
from gbci_fast.generate.mask_sources import BoxMask, EllipseMask, FileMask
from gbci_fast.generate.plan import PlanItem


class InputChecks:
    """Checks items against the headers of their templates, which are read once, in about a millisecond each.

    Args:
        formats: of the job's output.
    """

    def __init__(self, formats: Sequence[str]):
        self._formats = formats
        self._headers: dict[Path, ImageHeader | GBCIError] = {}

    def fault(self, item: PlanItem) -> GBCIError | None:
        """Why the item cannot be made, in a message that names the file; None if its header tells nothing."""
        path = item.template.path
        if path not in self._headers:
            self._headers[path] = _header(item.template)
        header = self._headers[path]
        return header if isinstance(header, GBCIError) else _fault(item, header, self._formats)


def check_view(path: Path, view_position: str | None, laterality: str | None, other_view: str | None) -> None:
    """Refuses a DICOM output without view or side: the standard requires both.

    Args:
        path: the input, for the message.
        view_position: "CC" or "MLO"; None = unknown.
        laterality: "L" or "R"; None = unknown.
        other_view: the view that the header states, where it is neither CC nor MLO.

    Raises:
        GBCIError: view or side is unknown; the message says how to proceed.
    """
    if view_position is None and other_view is not None:
        raise GBCIError(
            f"{path}: its header states the view {other_view!r}, whatever names and tables say; DICOM copies are CC or "
            "MLO: pass --set view_position=MLO if that is right for every input, leave such inputs out with "
            "--skip-bad, or take --format png"
        )
    if view_position is None or laterality is None:
        raise GBCIError(
            f"{path}: view is {view_position or 'unknown'} and side {laterality or 'unknown'}; DICOM needs both: "
            "write them into the file's name (such as scan_LCC.png), pass --set view_position=CC --set laterality=L if "
            "that holds for every input, leave such inputs out with --skip-bad, or take --format png"
        )


def _header(record: ImageRecord) -> ImageHeader | GBCIError:
    try:
        if fault := record.file_fault():
            raise GBCIError(fault if record.fault else f"{fault}; expected every image of the input")
        header = read_header(record.path)
        record.check_shape(header.shape)
    except GBCIError as error:
        return error
    return header


def _fault(item: PlanItem, header: ImageHeader, formats: Sequence[str]) -> GBCIError | None:
    record, attributes = item.template, item.attributes
    try:
        told = {
            "view_position": header.view_position or (None if header.other_view else record.view_position),
            "laterality": header.laterality or record.laterality,
        }
        view, side = (
            getattr(attributes, name) or (None if name in item.withheld else value) for name, value in told.items()
        )
        if "dicom" in formats:
            check_view(record.path, view, side, header.other_view)
        if item.view not in (None, view):
            raise GBCIError(f"view is {item.view} in the plan and {view or 'unknown'} in the image; expected the same")
        if item.lesion.laterality not in (None, side):
            lies = item.lesion.laterality
            raise GBCIError(f"side is {lies} in the lesion and {side or 'unknown'} in the image; expected the same")
        if isinstance(item.mask, FileMask):
            item.mask.on(header.shape, None)
        if isinstance(item.mask, BoxMask):
            _check_box(item.mask.box, header.shape)
        if isinstance(item.mask, EllipseMask):
            item.mask.check(header.shape)
    except GBCIError as error:
        return error if str(record.path) in str(error) else GBCIError(f"{record.path}: {error}")
    return None


def _check_box(box: tuple[float, float, float, float], shape: tuple[int, int]) -> None:
    xmin, ymin, xmax, ymax = box
    if max(xmin, 0) >= min(xmax, shape[1]) or max(ymin, 0) >= min(ymax, shape[0]):
        raise GBCIError(f"the box {box} lies outside the image of {shape[1]} x {shape[0]} pixels")

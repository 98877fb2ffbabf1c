"""Reads one mammogram from a DICOM file or a gray PNG: stored integers, presentation, view, side and spacing."""

import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset

from gbci_fast.dicom.acquisition import age, notes, spacing
from gbci_fast.dicom.bounds import BoundedFile, check_native, check_png, check_regular
from gbci_fast.dicom.file import (
    MAGIC_LENGTH,
    flatten_functional_groups,
    is_bare_dicom,
    is_dicom,
    read_dataset,
    trim_luts,
)
from gbci_fast.dicom.kinds import kind_notes
from gbci_fast.dicom.pixels import check_header, check_size, decode
from gbci_fast.dicom.presentation import Presentation, full_scale, presentation_of
from gbci_fast.dicom.view_positions import laterality, laterality_in_text, other_view, view_in_text, view_position
from gbci_fast.errors import GBCIError

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
IMAGE_SUFFIXES = (".dicom", ".dcm", ".png")


@dataclass(frozen=True, kw_only=True, eq=False)
class Mammogram:
    """A decoded mammogram; ``None`` means unknown.

    Attributes:
        path: the file.
        stored: integers [H, W] as stored (uint8, uint16, int8 or int16), without the unused bits of their cells.
        presentation: the mapping between stored and display values.
        spacing: mm per pixel (between rows, between columns), in the plane of the breast.
        view_position: "CC" or "MLO".
        other_view: the view that the header states if it is neither CC nor MLO. It takes precedence over file names and
            tables.
        laterality: "L" or "R".
        patient_id: PatientID.
        age: years.
        dataset: the DICOM header without PixelData; ``None`` for PNG. It states lossy compression where the decoded
            frame was lossy.
        notes: short phrases on what is unusual about the image, such as "breast implant".
    """

    path: Path
    stored: np.ndarray
    presentation: Presentation
    spacing: tuple[float, float] | None = None
    view_position: str | None = None
    other_view: str | None = None
    laterality: str | None = None
    patient_id: str | None = None
    age: float | None = None
    dataset: Dataset | None = None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.stored.shape

    def unit(self) -> np.ndarray:
        """Display values, float32 [H, W] in [0, 1], bright = dense, padding 0; computed once, read-only."""
        return self._unit

    @cached_property
    def _unit(self) -> np.ndarray:
        unit = self.presentation.to_unit(self.stored)
        unit.flags.writeable = False
        return unit


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """The header of an image file, read without decoding its pixels; ``None`` means unknown.

    Attributes:
        shape: (height, width) in pixels.
        view_position, laterality, other_view: as in `Mammogram`.
    """

    shape: tuple[int, int]
    view_position: str | None
    laterality: str | None
    other_view: str | None = None


def read_header(path: str | Path) -> ImageHeader:
    """Reads the header before the pixels of a DICOM file or PNG, in about a millisecond.

    Raises:
        GBCIError: as `read_mammogram`, as far as the header shows it.
    """
    path = Path(path)
    with _one_sentence(path):
        if _checked_magic(path) == "png":
            width, height = _png_size(path)
            return ImageHeader(
                shape=(height, width), view_position=view_in_text(path.stem), laterality=laterality_in_text(path.stem)
            )
        dataset = read_dataset(path, stop_before_pixels=True)
        check_header(dataset, has_pixels=True)
        flatten_functional_groups(dataset)
        shape = int(dataset.Rows), int(dataset.Columns)
        syntax = dataset.file_meta.TransferSyntaxUID
        if not (syntax.is_encapsulated or syntax.is_deflated):
            check_native(path.stat().st_size, *shape, dataset.BitsAllocated)
        return ImageHeader(
            shape=shape,
            view_position=view_position(dataset, path.stem),
            laterality=laterality(dataset, path.stem),
            other_view=other_view(dataset),
        )


def read_mammogram(path: str | Path) -> Mammogram:
    """Reads a DICOM file or an 8- or 16-bit gray PNG; the content, not the name, decides which.

    Raises:
        GBCIError: the file is absent, damaged, of another format, without pixels, not a mammogram, in color, has
            several frames, or displays as a single value.
    """
    path = Path(path)
    with _one_sentence(path):
        return _read_png(path) if _checked_magic(path) == "png" else _read_dicom(path)


def looks_like_image(path: Path) -> bool:
    """Whether a file is a DICOM or PNG image by its name or content. A DICOMDIR is an index, not an image."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    with suppress(OSError):
        return _magic(path) is not None
    return False


def _checked_magic(path: Path) -> str:
    # The user named this file, so the weaker evidence of a data set without a preamble is enough. In a folder it is not
    # (`looks_like_image`).
    magic = _magic(path) or ("dicom" if is_bare_dicom(_head(path)) else None)
    if magic is None:
        found = "an empty file" if path.stat().st_size == 0 else "neither DICOM nor PNG by its content"
        raise GBCIError(f"{found}; expected a DICOM or PNG file")
    return magic


def _magic(path: Path) -> str | None:
    head = _head(path)
    if head.startswith(PNG_MAGIC):
        return "png"
    return "dicom" if is_dicom(head) else None


def _head(path: Path) -> bytes:
    check_regular(path)
    with path.open("rb") as file:
        return file.read(MAGIC_LENGTH)


class _Silence:
    """Suppresses warnings while any thread reads. Overlapping `warnings.catch_warnings` restore the wrong filters."""

    def __init__(self):
        self._lock = threading.Lock()
        self._readers = 0

    def __enter__(self):
        with self._lock:
            if self._readers == 0:
                self._filters = warnings.catch_warnings(action="ignore")
                self._filters.__enter__()
            self._readers += 1

    def __exit__(self, *error):
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._filters.__exit__(*error)


_silence = _Silence()


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Suppresses the libraries' warnings and turns any failure into a `GBCIError` that begins with the file's path."""
    with _silence:
        try:
            yield
        except GBCIError as error:
            raise GBCIError(f"{path}: {error}") from None
        except OSError as error:
            raise GBCIError(f"{path}: {error.strerror or error}; expected a readable DICOM or PNG file") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except RecursionError as error:
            raise GBCIError(f"{path}: its sequences are nested too deeply; expected an image") from error
        except BaseException as error:  # decoders raise anything; a Rust panic is not even an Exception
            reason = " ".join(str(error).split()) or type(error).__name__
            raise GBCIError(f"{path}: damaged or not decodable ({reason})") from error


def _read_dicom(path: Path) -> Mammogram:
    dataset = read_dataset(path)
    check_header(dataset, has_pixels=bool(dataset.get("PixelData")))
    flatten_functional_groups(dataset)
    trim_luts(dataset)
    stored, unlike = decode(dataset)
    del dataset.PixelData
    presentation = presentation_of(dataset, stored)
    return Mammogram(
        path=path,
        stored=stored,
        presentation=presentation,
        spacing=spacing(dataset),
        view_position=view_position(dataset, path.stem),
        other_view=other_view(dataset),
        laterality=laterality(dataset, path.stem),
        patient_id=str(dataset.get("PatientID") or "").strip() or None,
        age=age(dataset),
        dataset=dataset,
        notes=(*kind_notes(dataset), *unlike, *notes(dataset, presentation)),
    )


def _read_png(path: Path) -> Mammogram:
    """Reads a gray PNG; white is the largest value of its type if it has an sBIT chunk (PNG, 11.3.2.7).

    Without sBIT, white is the largest value of the fewest bits (at least 8) that hold the largest pixel: 12- or 14-bit
    images are often stored unscaled in 16-bit files.
    """
    _png_size(path)
    with BoundedFile(path) as file, Image.open(file, formats=("PNG",)) as image:
        stored = np.array(image)
    if stored.min() == stored.max():
        raise GBCIError("every pixel has one and the same value; expected an image")
    bits = 8 * stored.itemsize if _has_sbit(path) else max(8, int(stored.max()).bit_length())
    guessed = stored.dtype == np.uint16 and bits < 16
    return Mammogram(
        path=path,
        stored=stored,
        presentation=full_scale(bits),
        notes=(f"a PNG states no bit depth: {2**bits - 1} is taken as white",) if guessed else (),
        view_position=view_in_text(path.stem),
        laterality=laterality_in_text(path.stem),
    )


def _has_sbit(path: Path) -> bool:
    """Whether the file has an sBIT chunk before the pixels, its only legal place."""
    with path.open("rb") as file:
        file.seek(8)  # the signature
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind in (b"sBIT", b"IDAT"):
                return kind == b"sBIT"
            file.seek(length + 4, 1)  # the data and a checksum of 4 bytes
    return False


def _png_size(path: Path) -> tuple[int, int]:
    """(width, height) of a gray PNG in pixels, from its checked header."""
    with path.open("rb") as file:
        header = file.read(26)
    width, height, bit_depth, color_type = struct.unpack(">IIBB", header[16:26])
    check_size(width, height)
    if color_type != 0 or bit_depth not in (8, 16):
        raise GBCIError(f"a PNG of color type {color_type} with {bit_depth} bits; expected gray (0) with 8 or 16")
    check_png(path, width, height, bit_depth)
    return width, height

"""One mammogram from a DICOM file or a gray PNG: stored integers, how to present them, view, side and spacing."""

import re
import struct
import threading
import warnings
import zlib  # noqa: F401  (before pydicom loads GDCM: its zlib would corrupt the system's if that were loaded later)
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import generate_frames
from pydicom.multival import MultiValue
from pydicom.pixels import get_decoder
from pydicom.uid import JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes

from gbci_fast.data.bounds import (
    BoundedFile,
    check_frame,
    check_jpeg2000,
    check_native,
    check_png,
    check_short_values,
)
from gbci_fast.data.jpeg import check_jpeg
from gbci_fast.data.presentation import Presentation, full_scale, presentation_of
from gbci_fast.data.views import laterality, laterality_in_text, view_in_text, view_position
from gbci_fast.errors import GBCIError

# Several times the largest detector; a header that claims more is damaged, and would exhaust memory when decoded.
MAX_PIXELS = 150_000_000
# Plausible spacing in mm per pixel, from a fine film scan to a thumbnail.
MIN_SPACING, MAX_SPACING = 0.01, 10.0

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
DICOM_MAGIC = b"DICM"  # after a preamble of 128 bytes, PS3.10 section 7.1
IMAGE_SUFFIXES = (".dicom", ".dcm", ".png")
# Where there is a choice (RLE, JPEG 2000) this one is the fastest, up to 4 times, and prints nothing of its own.
PREFERRED_PLUGIN = "pylibjpeg"


@dataclass(frozen=True, kw_only=True, eq=False)
class Mammogram:
    """A decoded mammogram; ``None`` means unknown.

    Attributes:
        path: the file.
        stored: integers [H, W] as stored (uint8, uint16, int8 or int16), bits above HighBit removed.
        presentation: stored <-> display values.
        spacing: mm per pixel (between rows, between columns), at the detector.
        view_position: "CC" or "MLO".
        laterality: "L" or "R".
        patient_id: PatientID.
        age: years.
        dataset: the DICOM header without PixelData; ``None`` for PNG.
    """

    path: Path
    stored: np.ndarray
    presentation: Presentation
    spacing: tuple[float, float] | None = None
    view_position: str | None = None
    laterality: str | None = None
    patient_id: str | None = None
    age: float | None = None
    dataset: Dataset | None = None

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
    """What an image file says before its pixels are decoded; ``None`` means unknown.

    Attributes:
        shape: (height, width) in pixels.
        view_position, laterality: as in `Mammogram`.
    """

    shape: tuple[int, int]
    view_position: str | None
    laterality: str | None


def read_header(path: str | Path) -> ImageHeader:
    """Reads what stands before the pixels of a DICOM file or PNG, in a millisecond.

    Raises:
        GBCIError: as `read_mammogram`, as far as the header can tell.
    """
    path = Path(path)
    with _one_sentence(path):
        if _checked_magic(path) == "png":
            width, height = _png_size(path)
            return ImageHeader(
                shape=(height, width), view_position=view_in_text(path.stem), laterality=laterality_in_text(path.stem)
            )
        with BoundedFile(path) as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
        _check_header(dataset, has_pixels=True)
        shape = int(dataset.Rows), int(dataset.Columns)
        syntax = dataset.file_meta.TransferSyntaxUID
        if not (syntax.is_encapsulated or syntax.is_deflated):
            check_native(path.stat().st_size, *shape, dataset.BitsAllocated)
        return ImageHeader(
            shape=shape,
            view_position=view_position(dataset, path.stem),
            laterality=laterality(dataset, path.stem),
        )


def read_mammogram(path: str | Path) -> Mammogram:
    """Reads a DICOM file or an 8- or 16-bit gray PNG, told apart by content.

    Raises:
        GBCIError: the file is absent, damaged, of another format, without pixels, in color, of several frames, or
            displays as a single value.
    """
    path = Path(path)
    with _one_sentence(path):
        return _read_png(path) if _checked_magic(path) == "png" else _read_dicom(path)


def looks_like_image(path: Path) -> bool:
    """Whether a file's name or content is that of a DICOM or PNG image; a DICOMDIR is an index, not an image."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    with suppress(OSError):
        return _magic(path) is not None
    return False


def _checked_magic(path: Path) -> str:
    magic = _magic(path)
    if magic is None:
        found = "an empty file" if path.stat().st_size == 0 else "neither DICOM nor PNG by its content"
        raise GBCIError(f"{found}; expected a DICOM or PNG file")
    return magic


def _magic(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(132)
    if head.startswith(PNG_MAGIC):
        return "png"
    return "dicom" if head[128:] == DICOM_MAGIC else None


class _Silence:
    """No warnings while any thread reads (overlapping `warnings.catch_warnings` would restore the wrong filters)."""

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
    """Silences the libraries' warnings and makes any failure one sentence that begins with the file."""
    with _silence:
        try:
            yield
        except GBCIError as error:
            raise GBCIError(f"{path}: {error}") from None
        except OSError as error:
            raise GBCIError(f"{path}: {error.strerror or error}; expected a readable DICOM or PNG file") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # decoders fail in any way they like; a Rust panic is not even an Exception
            reason = " ".join(str(error).split()) or type(error).__name__
            raise GBCIError(f"{path}: damaged or not decodable ({reason})") from error


def _read_dicom(path: Path) -> Mammogram:
    with BoundedFile(path) as file:
        dataset = pydicom.dcmread(file)
    _check_header(dataset, has_pixels=bool(dataset.get("PixelData")))
    stored = _decode(dataset)
    del dataset.PixelData
    return Mammogram(
        path=path,
        stored=stored,
        presentation=presentation_of(dataset, stored),
        spacing=_spacing(dataset),
        view_position=view_position(dataset, path.stem),
        laterality=laterality(dataset, path.stem),
        patient_id=str(dataset.get("PatientID") or "").strip() or None,
        age=_age(dataset),
        dataset=dataset,
    )


def _check_header(dataset: Dataset, *, has_pixels: bool) -> None:
    """Refuses, before anything is decoded, what is not one gray image of 8 to 16 bits."""
    check_short_values(dataset)
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise GBCIError("floating-point pixels; expected integers in PixelData")
    if not has_pixels:
        raise GBCIError("no PixelData, or cut short before its end; expected an image")
    photometric, samples = dataset.get("PhotometricInterpretation"), dataset.get("SamplesPerPixel", 1)
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise GBCIError(
            f"a color image ({photometric}, {samples} samples per pixel); expected MONOCHROME1 or MONOCHROME2"
        )
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise GBCIError(f"{dataset.NumberOfFrames} frames; expected a single image")
    _check_size(dataset.get("Columns"), dataset.get("Rows"))
    allocated, bits, high = (dataset.get(key) for key in ("BitsAllocated", "BitsStored", "HighBit"))
    # HighBit is BitsStored - 1 in every legal file (PS3.5 section 8.1.1).
    if allocated not in (8, 16) or not bits or not 8 <= bits <= allocated or high != bits - 1:
        raise GBCIError(
            f"BitsAllocated, BitsStored and HighBit are {allocated}, {bits} and {high}; "
            "expected 8 or 16, 8 to BitsAllocated, and BitsStored - 1"
        )
    if dataset.get("PixelRepresentation") not in (0, 1):
        raise GBCIError(f"PixelRepresentation is {dataset.get('PixelRepresentation')}; expected 0 or 1")


def _decode(dataset: Dataset) -> np.ndarray:
    """Integers [H, W] in the type that the header states, with the bits above HighBit cleared or sign-extended."""
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    if not decoder.is_available:
        raise GBCIError(f"no decoder for {decoder.UID.name} is installed; expected python-gdcm or a pylibjpeg plugin")
    rows, columns, allocated = dataset.Rows, dataset.Columns, dataset.BitsAllocated
    if not decoder.UID.is_encapsulated:
        check_native(len(dataset.PixelData), rows, columns, allocated)
    else:
        frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
        check_frame(frame, decoder.UID, rows, columns, allocated)
        if decoder.UID in (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes):
            check_jpeg(frame, rows=rows, columns=columns, bits=allocated)
        elif decoder.UID in JPEG2000TransferSyntaxes:
            check_jpeg2000(frame, rows=rows, columns=columns)
    plugin = PREFERRED_PLUGIN if PREFERRED_PLUGIN in decoder.available_plugins else ""
    stored, _ = decoder.as_array(dataset, decoding_plugin=plugin)
    # Some decoders choose the narrowest type that holds the data, or leave the unused bits as they find them.
    stored = stored.astype(f"{'ui'[dataset.PixelRepresentation]}{dataset.BitsAllocated // 8}", copy=False)
    unused = dataset.BitsAllocated - dataset.BitsStored
    return (stored << unused) >> unused if unused else stored


def _check_size(width: int | None, height: int | None) -> None:
    if not width or not height or width * height > MAX_PIXELS:
        raise GBCIError(f"the header claims {width} x {height} pixels; expected 1 to {MAX_PIXELS} in all")


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    """The first spacing that is stated, at the detector where possible; an absurd one is an error, not unknown.

    A missing spacing has a documented default downstream, but a wrong one would silently mis-scale every lesion.
    """
    for keyword in ("ImagerPixelSpacing", "PixelSpacing", "NominalScannedPixelSpacing"):
        value = dataset.get(keyword)
        if value is None or value == "":
            continue
        values = [float(part) for part in (value if isinstance(value, MultiValue) else [value])]
        if len(values) != 2 or not all(MIN_SPACING <= part <= MAX_SPACING for part in values):
            raise GBCIError(f"{keyword} is {value}; expected two numbers from {MIN_SPACING} to {MAX_SPACING} mm")
        return values[0], values[1]
    return None


def _age(dataset: Dataset) -> float | None:
    """PatientAge (``045Y``; PS3.5 6.2, AS) in years; malformed or impossible values count as unknown."""
    match = re.fullmatch(r"(\d{1,3})([DWMY])", str(dataset.get("PatientAge") or "").strip().upper())
    if match is None:
        return None
    age = int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[match[2]]
    return age if 0 < age <= 120 else None


def _read_png(path: Path) -> Mammogram:
    """A gray PNG is taken at full scale of the fewest bits (8 at least) that hold its largest value.

    PNG has no BitsStored, and 12- or 14-bit images are often kept in 16-bit files as they are.
    """
    _png_size(path)
    with Image.open(path, formats=("PNG",)) as image:
        stored = np.array(image)
    if stored.min() == stored.max():
        raise GBCIError("every pixel has one and the same value; expected an image")
    return Mammogram(
        path=path,
        stored=stored,
        presentation=full_scale(max(8, int(stored.max()).bit_length())),
        view_position=view_in_text(path.stem),
        laterality=laterality_in_text(path.stem),
    )


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height of a gray PNG, from its header."""
    with path.open("rb") as file:
        header = file.read(26)
    width, height, bit_depth, color_type = struct.unpack(">IIBB", header[16:26])
    _check_size(width, height)
    if color_type != 0 or bit_depth not in (8, 16):
        raise GBCIError(f"a PNG of color type {color_type} with {bit_depth} bits; expected gray (0) with 8 or 16")
    check_png(path, width, height, bit_depth)
    return width, height

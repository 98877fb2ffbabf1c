"""The prepared form of a data set: fields of view in memory-mapped arrays, with an index of their origins.

A cache is a folder, written by `gbci_fast.data.prepare`:

- ``pixels.npy``: uint16 [N, S, S] (65535 = 1.0), one image per field of view;
- ``masks.npy``: uint8 [M, ceil(S * S / 8)], bit masks packed by `numpy.packbits`. A field of view has consecutive rows
  from its index column ``mask`` on: the breast, the pectoral muscle, then each of its lesions (they may overlap);
- ``index.parquet``: one row per field of view, with the columns of `INDEX_SCHEMA`;
- ``cache.json``: `FORMAT`, the settings, and size and SHA-256 of the other three files. It is written last: a folder
  that has it is complete;
- ``qc/``: contact sheet and report; ``skipped.csv``, if files were skipped.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gbci_fast.attributes import Attributes
from gbci_fast.data.fields import FieldOfView, VisibleLesion
from gbci_fast.data.frame import Frame
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import sha256_of
from gbci_fast.jobs.folder import PROGRESS_FOLDER

FORMAT = 2  # 2: shape, margin, pathology, subtlety, and fold C
CACHE_FILE = "cache.json"
INDEX, PIXELS, MASKS = "index.parquet", "pixels.npy", "masks.npy"

_ATTRIBUTES = [
    ("laterality", pa.string()),
    ("view_position", pa.string()),
    ("breast_density", pa.string()),
    ("breast_birads", pa.int8()),
    ("finding_categories", pa.list_(pa.string())),  # null = unknown, [] = "No Finding"
    ("finding_birads", pa.int8()),
    ("shape", pa.string()),
    ("margin", pa.string()),
    ("pathology", pa.string()),
    ("subtlety", pa.int8()),
    ("age", pa.float64()),
    ("pixel_spacing", pa.float64()),  # mm per model pixel
]
_BOX = pa.list_(pa.float64())  # xmin, ymin, xmax, ymax; half-open
_LESION = pa.struct(
    [
        ("finding", pa.int32()),  # its position among the image's findings
        ("box", _BOX),  # native pixels
        ("model_box", _BOX),  # the same box in model pixels; it may reach beyond the field of view
        ("pixels", pa.int32()),  # number of mask pixels in the field of view
        ("inside", pa.float64()),  # share of its native pixels that lie in the segmented breast
        ("report", pa.string()),
        ("attributes", pa.struct(_ATTRIBUTES)),
        ("extra", pa.string()),  # the table's other columns, JSON
    ]
)
_FRAME_FIELDS = [field.name for field in fields(Frame) if field.name != "size"]
INDEX_SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # name of the root
        ("study_id", pa.string()),
        ("image_id", pa.string()),
        ("path", pa.string()),  # below the root
        ("sha256", pa.string()),  # digest of the image file
        ("bytes", pa.int64()),  # size of the image file
        ("split", pa.string()),
        ("patient", pa.string()),  # see `ImageRecord.patient`
        ("fold", pa.string()),  # "A", "B" or "C", see `patient_fold`
        ("kind", pa.string()),  # "whole" or "lesion"
        *_ATTRIBUTES,
        ("height", pa.int32()),  # native pixels
        ("width", pa.int32()),
        ("row_spacing", pa.float64()),  # native mm per pixel; null = unknown
        ("column_spacing", pa.float64()),
        ("frame", pa.struct([(name, pa.bool_() if name == "flip" else pa.int32()) for name in _FRAME_FIELDS])),
        ("findings", pa.int32()),  # number of findings of the whole image
        ("lesions", pa.list_(_LESION)),  # the findings visible in this field of view
        ("notes", pa.list_(pa.string())),
        ("extra", pa.string()),  # the table's other columns, JSON
        ("breast_fraction", pa.float64()),  # breast area / area of the native image
        ("brightness", pa.float64()),  # mean in the breast, 0 to 1
        ("saturated", pa.float64()),  # share of the breast's pixels at 0.999 or more
        ("aspect", pa.float64()),  # height / width of the native crop
        ("mask", pa.int64()),  # first row in ``masks.npy``
    ]
)


class Selected(Sequence[FieldOfView]):
    """A lazy view of some items of another sequence."""

    def __init__(self, items: Sequence[FieldOfView], picks: Sequence[int]):
        self._items, self._picks = items, picks

    def __len__(self) -> int:
        return len(self._picks)

    @overload
    def __getitem__(self, key: int) -> FieldOfView: ...
    @overload
    def __getitem__(self, key: slice) -> "Selected": ...
    def __getitem__(self, key):
        picked = self._picks[key]
        return Selected(self._items, picked) if isinstance(key, slice) else self._items[picked]


class Cache(Sequence[FieldOfView]):
    """A finished cache as a sequence of fields of view; its arrays are memory-mapped.

    Args:
        path: the folder.

    Attributes:
        size: side S of the fields of view.
        info: the content of ``cache.json``.
        index: pyarrow table of `INDEX_SCHEMA`.

    Raises:
        GBCIError: no finished cache, a cache of another format, or files that differ from those that were written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = _read_info(self.path)
        self.size: int = self.info["size"]
        for name, stated in self.info["files"].items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != stated["bytes"]:
                raise GBCIError(f"{file} is absent or cut; expected {stated['bytes']} bytes as {CACHE_FILE} says")
        self._check_digest(INDEX)
        self._pixels = self._array(PIXELS)
        # A Parquet file of a few bytes can claim any number of equal rows: check before reading.
        if (rows := pq.read_metadata(self.path / INDEX).num_rows) != len(self._pixels):
            raise GBCIError(f"{self.path / INDEX} has {rows} rows; expected {len(self._pixels)}, one per field of view")
        self.index: pa.Table = pq.read_table(self.path / INDEX).combine_chunks()
        self._masks = self._array(MASKS)

    def __len__(self) -> int:
        return len(self.index)

    @overload
    def __getitem__(self, key: int) -> FieldOfView: ...
    @overload
    def __getitem__(self, key: slice) -> Selected: ...
    def __getitem__(self, key):
        picked = range(len(self))[key]
        return Selected(self, picked) if isinstance(key, slice) else self._field_of_view(picked)

    def row(self, position: int) -> dict[str, Any]:
        """One row of the index as a dictionary."""
        return self.index.slice(position, 1).to_pylist()[0]

    def frame(self, position: int) -> Frame:
        """The affine between the native image and the field of view."""
        return Frame(size=self.size, **self.row(position)["frame"])

    def pectoral(self, position: int) -> np.ndarray:
        """The part of the pectoral muscle within the breast, bool [S, S]."""
        first = self.row(position)["mask"]
        return unpack_masks(self._masks[first + 1 : first + 2], self.size)[0]

    def of_folds(self, folds: str) -> Selected:
        """The fields of view of the training split whose patients are in `folds`, such as "AB"; possibly none."""
        rows = zip(*(self.index.column(name).to_pylist() for name in ("split", "fold")), strict=True)
        return Selected(self, [i for i, (split, fold) in enumerate(rows) if split == "training" and fold in folds])

    def verify(self) -> None:
        """Compares every file with its SHA-256, which reads all of the cache.

        Raises:
            GBCIError: a file differs from the one that was written.
        """
        for name in self.info["files"]:
            self._check_digest(name)

    def _check_digest(self, name: str) -> None:
        if sha256_of(self.path / name) != self.info["files"][name]["sha256"]:
            raise GBCIError(f"{self.path / name} is not the file that {CACHE_FILE} describes; prepare the cache again")

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.load(self.path / name, mmap_mode="r")
        except ValueError as error:  # the header is damaged
            raise GBCIError(f"{self.path / name} is damaged; prepare the cache again") from error

    def _field_of_view(self, position: int) -> FieldOfView:
        row = self.row(position)
        first = row["mask"]
        breast, _, *pixels = unpack_masks(self._masks[first : first + 2 + len(row["lesions"])], self.size)
        return FieldOfView(
            image=np.asarray(self._pixels[position]),
            breast=breast,
            lesions=tuple(
                VisibleLesion(
                    pixels=mask,
                    attributes=_attributes_of(lesion["attributes"]),
                    report=lesion["report"],
                    finding=lesion["finding"],
                )
                for mask, lesion in zip(pixels, row["lesions"], strict=True)
            ),
            attributes=_attributes_of(row),
            patient=row["patient"],
        )


def is_cache(path: str | Path) -> bool:
    """Whether the folder is a cache, finished or unfinished (`Cache` refuses unfinished ones)."""
    path = Path(path)
    return (path / CACHE_FILE).is_file() or (path / PROGRESS_FOLDER / PIXELS).is_file()


def attribute_columns(attributes: Attributes) -> dict[str, Any]:
    """The attributes as columns of the index; ``None`` = unknown."""
    columns = asdict(attributes)
    categories = columns["finding_categories"]
    return columns | {"finding_categories": None if categories is None else list(categories)}


def frame_columns(frame: Frame) -> dict[str, Any]:
    """A frame as a column of the index, without ``size``, which is the same in the whole cache."""
    return {name: getattr(frame, name) for name in _FRAME_FIELDS}


def pack_masks(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Bool masks [K][S, S] as rows of ``masks.npy``, uint8 [K, ceil(S * S / 8)]."""
    return np.packbits(np.stack(masks).reshape(len(masks), -1), axis=1)


def unpack_masks(rows: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `pack_masks`: bool [K, S, S]."""
    return np.unpackbits(rows, axis=1, count=size * size).reshape(-1, size, size).view(np.bool_)


def packed_length(size: int) -> int:
    """Bytes of one packed mask."""
    return -(-size * size // 8)


def _attributes_of(row: dict[str, Any]) -> Attributes:
    values: dict[str, Any] = {name: row[name] for name, _ in _ATTRIBUTES}
    if values["finding_categories"] is not None:
        values["finding_categories"] = tuple(values["finding_categories"])
    return Attributes(**values)


def _read_info(path: Path) -> dict[str, Any]:
    file = path / CACHE_FILE
    if not file.is_file():
        if (path / PROGRESS_FOLDER).is_dir():
            raise GBCIError(f"{path} is not finished; run `gbci-fast prepare` with the same arguments and --resume")
        raise GBCIError(f"{path} holds no {CACHE_FILE}; expected a folder written by `gbci-fast prepare`")
    try:
        info = dict(json.loads(file.read_text(encoding="utf-8")))
        found = info["format"]
        sound = found != FORMAT or (info["size"] > 0 and {INDEX, PIXELS, MASKS} == set(info["files"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise GBCIError(f"{file} cannot be read as the description of a cache ({type(error).__name__})") from error
    if found != FORMAT:
        raise GBCIError(f"{path} is a cache of format {found}; expected {FORMAT}: prepare it again")
    if not sound:
        raise GBCIError(f"{file} does not describe {INDEX}, {PIXELS} and {MASKS}; prepare the cache again")
    return info

"""The encoded frame of a DICOM image and its own header, which is believed where the DICOM header contradicts it."""

import struct
from dataclasses import dataclass

from pydicom import Dataset
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.uid import UID, RLELossless

from gbci_fast.errors import GBCIError

# First bytes of JPEG and JPEG-LS; of a JPEG 2000 codestream; of a JP2 file that wraps such a codestream.
_BEGINNINGS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")
_RLE_HEADER = 64  # bytes; the first segment begins after them (PS3.5 G.5)


@dataclass(frozen=True, kw_only=True)
class Codestream:
    """The header of one encoded frame of one component.

    Attributes:
        precision: bits per sample.
        lossy: whether the coding loses information, or cannot be told from a coding that does.
        layered: whether there are several quality layers. The last layer may be incomplete.
        method: the coding, as a value of LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1).
        signed: whether the samples are signed; ``None`` where the format does not say (JPEG, JPEG-LS).
        syntaxes: the transfer syntaxes that allow this coding, from which the decoder is chosen; empty = any.
    """

    precision: int
    lossy: bool
    method: str
    layered: bool = False
    signed: bool | None = None
    syntaxes: tuple[UID, ...] = ()


def only_frame(dataset: Dataset, syntax: UID) -> bytes:
    """The one encoded frame of `dataset`, whose NumberOfFrames is absent or 1.

    Raises:
        GBCIError: PixelData holds several frames, none, or is cut short.
    """
    offsets = parse_basic_offsets(dataset.PixelData)
    fragments = list(generate_fragments(dataset.PixelData[8 + 4 * len(offsets) :]))
    frames = max(
        len(offsets),
        len(dataset.get("ExtendedOffsetTable") or b"") // 8,
        sum(_begins(fragment, syntax) for fragment in fragments),
    )
    if frames > 1:
        raise GBCIError(f"PixelData holds {frames} frames; expected a single image")
    if not any(fragments):
        raise GBCIError("PixelData holds no encoded frame, or is cut short; expected one")
    return b"".join(fragments)


def _begins(fragment: bytes, syntax: UID) -> bool:
    """Whether a frame begins with this fragment."""
    if syntax != RLELossless:
        return fragment.startswith(_BEGINNINGS)
    if len(fragment) < _RLE_HEADER:
        return False
    segments, first = struct.unpack_from("<2I", fragment)
    return 1 <= segments <= 15 and first == _RLE_HEADER

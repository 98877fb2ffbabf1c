"""Transfer syntaxes and bit depths. The window is the full range, so that a stored value p displays as p / 4095."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from . import frames
from .case import Case
from .files import RAMP, RAMP_8, SIGNED_RAMP, make

FULL_12 = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
SIGNED_12 = {"BitsStored": 12, "WindowCenter": 0, "WindowWidth": 4096}
FULL_8 = {"WindowCenter": 128, "WindowWidth": 256}
WINDOW = ("dcmj2pnm", "+Wi", "1")
JPEG_PROGRESSIVE = UID("1.2.840.10008.1.2.4.55")
READABLE = "expected uncompressed, deflated, RLE, JPEG (8 bits or lossless), JPEG-LS, JPEG 2000 or HTJ2K"


def encodings() -> Iterator[Case]:
    """Each transfer syntax that is read."""
    case = partial(Case, group="Transfer syntax", display=RAMP / 4095)
    for name, syntax in (
        ("implicit VR little endian", ImplicitVRLittleEndian),
        ("explicit VR little endian", ExplicitVRLittleEndian),
        ("explicit VR big endian", ExplicitVRBigEndian),
        ("deflated", DeflatedExplicitVRLittleEndian),
        ("RLE lossless", RLELossless),
    ):
        yield case(name=name, build=_ramp(syntax), second=WINDOW)
    for name, tool, syntax, frame, deviation in (
        ("JPEG lossless, process 14", "dcmj2pnm", JPEGLossless, frames.JPEG_LOSSLESS_PREDICTOR_6, 0),
        ("JPEG lossless, first-order prediction", "dcmj2pnm", JPEGLosslessSV1, frames.JPEG_LOSSLESS, 0),
        ("JPEG-LS lossless", "dcml2pnm", JPEGLSLossless, frames.JPEG_LS, 0),
        ("JPEG-LS near-lossless (2)", "dcml2pnm", JPEGLSNearLossless, frames.JPEG_LS_NEAR_2, 2),
    ):
        tolerance = deviation / 4095 + 1e-6
        yield case(name=name, build=_ramp(syntax, frame), second=(tool, *WINDOW[1:]), tolerance=tolerance)
    # dcmtk has no decoder for JPEG 2000. The deviations of the lossy frames are those of their own encoder's decoder.
    for name, syntax, frame, deviation in (
        ("JPEG 2000 lossless", JPEG2000Lossless, frames.JPEG_2000, 0),
        ("JPEG 2000, lossy syntax, lossless frame", JPEG2000, frames.JPEG_2000, 0),
        ("JPEG 2000 lossy", JPEG2000, frames.JPEG_2000_LOSSY, 13),
        ("HTJ2K lossless", HTJ2KLossless, frames.HTJ2K, 0),
        ("HTJ2K lossless RPCL", HTJ2KLosslessRPCL, frames.HTJ2K, 0),
        ("HTJ2K lossy", HTJ2K, frames.HTJ2K_LOSSY, 28),
    ):
        yield case(name=name, build=_ramp(syntax, frame), tolerance=deviation / 4095 + 1e-6)
    for name, syntax, frame in (
        ("JPEG 2000 lossless, signed", JPEG2000Lossless, frames.JPEG_2000_SIGNED),
        ("HTJ2K lossless, signed", HTJ2KLossless, frames.HTJ2K_SIGNED),
    ):
        yield case(name=name, build=partial(make, SIGNED_RAMP, syntax, frame=frame, **SIGNED_12))
    for name, syntax in (("JPEG baseline, 8 bits", JPEGBaseline8Bit), ("JPEG extended, 8 bits", JPEGExtended12Bit)):
        # Lossy by up to 2 levels of 8 bits. Two decoders may differ by one level.
        yield case(
            name=name,
            build=partial(make, RAMP_8, syntax, frame=frames.JPEG_8, **FULL_8),
            display=RAMP_8 / 255,
            tolerance=2.01 / 255,
            second=WINDOW,
            second_tolerance=258,
        )
    for name, syntax, options in (
        ("no preamble, implicit VR", ImplicitVRLittleEndian, ("-f", "-ti")),
        ("no preamble, explicit VR", ExplicitVRLittleEndian, ("-f", "-te")),
        ("no preamble, big endian", ExplicitVRBigEndian, ("-f", "-tb")),
    ):
        build = partial(make, RAMP, syntax, preamble=False, **FULL_12)
        yield case(name=name, build=build, second=(*WINDOW, *options))
    for name, frame, deviation, method in (
        ("JPEG 2000, lossless syntax, lossy frame", frames.JPEG_2000_LOSSY, 13, "ISO_15444_1"),
        ("JPEG 2000, 12 bits, header says 10", frames.JPEG_2000, 0, None),
        ("JPEG 2000, 12 bits, header says 14", frames.JPEG_2000, 0, None),
    ):
        bits = int(name.split()[-1]) if method is None else 12
        notes = {
            10: ("BitsStored is 10, but the frame's 12 bits are in use, and taken",),
            12: (f"its frame may be lossy ({method}), though its header says lossless",),
            14: ("its frame has 12 bits, its header 14",),
        }
        build = partial(make, RAMP, JPEG2000Lossless, frame=frame, **FULL_12 | {"BitsStored": bits})
        yield case(name=name, build=build, notes=notes[bits], tolerance=deviation / 4095 + 1e-6)


def refused_encodings() -> Iterator[Case]:
    """Encodings that no freely licensed decoder decodes safely, or that are damaged or contradictory."""
    retired = "JPEG Full Progression, Non-Hierarchical (Process 10 and 12)"
    for name, build, refused in (
        (
            "JPEG extended, 12 bits",
            _ramp(JPEGExtended12Bit, frames.JPEG_12),
            f"lossy JPEG of 12 bits cannot be decoded; {READABLE}",
        ),
        (
            "JPEG progressive (retired)",
            _ramp(JPEG_PROGRESSIVE, frames.JPEG_8),
            f"transfer syntax {retired} cannot be decoded; {READABLE}",
        ),
        (
            "no preamble, encoded pixels",
            _bare_frame,
            "no TransferSyntaxUID, so its encoded pixels cannot be decoded; expected one",
        ),
        (
            "JPEG 2000, signed frame, unsigned header",
            _ramp(JPEG2000Lossless, frames.JPEG_2000_SIGNED),
            "its frame has 12 bits with a sign, its header 12 bits without a sign, and its pixels differ by that",
        ),
        (
            "JPEG 2000, cut short",
            _ramp(JPEG2000Lossless, frames.JPEG_2000[:-60]),
            "damaged or not decodable (its JPEG 2000 codestream has no end); cut short",
        ),
        (
            "two native frames, one stated",
            partial(make, RAMP, NumberOfFrames=1, PixelData=2 * RAMP.tobytes(), **FULL_12),
            "PixelData holds 2 frames; expected a single image",
        ),
    ):
        yield Case(group="Transfer syntax", name=name, build=build, refused=refused)


def depths() -> Iterator[Case]:
    """Bit depths, signed and unsigned; each window is the full range of its BitsStored."""
    case = partial(Case, group="Bits", second=WINDOW)
    for dtype, bits in (("u1", 8), ("i1", 8), ("u2", 8), ("i2", 8), ("u2", 10), ("u2", 12), ("i2", 12), ("u2", 14),
                        ("i2", 14), ("u2", 16), ("i2", 16)):  # fmt: skip
        signed, size = dtype[0] == "i", 2**bits
        # 512 values from the lowest to the highest.
        unsigned = np.linspace(0, size - 1, 512).round().reshape(16, 32)
        stored = (unsigned - size // 2 * signed).astype(dtype)
        yield case(
            name=f"{bits} {'signed' if signed else 'unsigned'} in {8 * stored.itemsize}",
            build=partial(make, stored, BitsStored=bits, WindowCenter=0 if signed else size // 2, WindowWidth=size),
            display=unsigned / (size - 1),
        )
    for name, build in (
        ("12 in 16, an overlay above them", partial(make, RAMP | 0x8000, overlay=15, **FULL_12)),
        ("12 at the top of 16", partial(make, RAMP << 4, HighBit=15, **FULL_12)),
        ("12 at the top of 16, an overlay below", partial(make, RAMP << 4 | 1, HighBit=15, overlay=0, **FULL_12)),
        ("12 signed in the middle of 16", partial(make, SIGNED_RAMP << 2, HighBit=13, **SIGNED_12)),
    ):
        yield case(name=name, build=build, display=RAMP / 4095)


def refused_depths() -> Iterator[Case]:
    """Bit depths that no mammogram has."""
    expected = "expected 8 or 16, 8 to BitsAllocated, and BitsStored - 1 to BitsAllocated - 1"
    for name, build, refused in (
        (
            "12 at the top of 16, JPEG-LS",
            partial(make, RAMP, JPEGLSLossless, frame=frames.JPEG_LS, HighBit=15, **FULL_12),
            "HighBit is 15 and BitsStored 12 in JPEG-LS Lossless Image Compression; "
            "expected BitsStored - 1 in what is not uncompressed or RLE",
        ),
        (
            "7 in 16",
            partial(make, RAMP, BitsStored=7),
            f"BitsAllocated, BitsStored and HighBit are 16, 7 and 6; {expected}",
        ),
        (
            "32 in 32",
            partial(make, RAMP.astype(np.uint32)),
            f"BitsAllocated, BitsStored and HighBit are 32, 32 and 31; {expected}",
        ),
    ):
        yield Case(group="Bits", name=name, build=build, refused=refused)


def _ramp(syntax: UID, frame: bytes | None = None) -> Callable[[], bytes]:
    return partial(make, RAMP, syntax, frame=frame, **FULL_12)


def _bare_frame() -> bytes:
    content = make(RAMP, JPEG2000Lossless, frame=frames.JPEG_2000, **FULL_12)
    length = int.from_bytes(content[140:144], "little")  # of the rest of the file meta information
    return content[144 + length :]

"""Modality and VOI transformations, padding, MONOCHROME1: display values worked out from the standard's formulas."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from pydicom import DataElement

from .case import Case
from .files import RAMP, SIGNED_RAMP, lut, make, short_lut

P = RAMP.astype(np.float64)  # 0, 8, … 4088
WINDOW = ("dcmj2pnm", "+Wi", "1")
# LINEAR (PS3.3 C.11.2.1.2.1) with center 1000 and width 501: black up to 749.5, white above 1249.5.
LINEAR = np.clip((P - 749.5) / 500, 0, 1)
EXACT = np.clip((P - 749.5) / 501, 0, 1)  # C.11.2.1.3.2: from center - width / 2 to center + width / 2
SIGMOID = 1 / (1 + np.exp(-4 * (P - 1000) / 501))  # C.11.2.1.3.1
SQUARES = np.arange(0, 64) ** 2  # a VOI LUT of 12 bits: 0, 1, 4, … 3969
# The LUT covers values 200 to 263; others get the nearest entry. 200 -> 0, 208 -> 64, … 256 -> 3136, above 63² = 3969.
LUT = np.select([P <= 200, P < 264], [0, (P - 200) ** 2], 3969) / 4095


def windows() -> Iterator[Case]:
    """Each VOI transformation in MONOCHROME2 and MONOCHROME1."""
    window = {"WindowCenter": 1000, "WindowWidth": 501}
    both = partial(_both, group="VOI")
    yield from both("LINEAR", LINEAR, second=WINDOW, **window)
    # dcmtk has no LINEAR_EXACT. LINEAR with a center larger by 1/2 and a width larger by 1 is the same.
    second = ("dcmj2pnm", "+Ww", "1000.5", "502")
    yield from both("LINEAR_EXACT", EXACT, second=second, VOILUTFunction="LINEAR_EXACT", **window)
    yield from both("SIGMOID", SIGMOID, second=(*WINDOW, "+Wfs"), VOILUTFunction="SIGMOID", **window)
    # dcmtk scales an entry of b bits by 1 / 2^b, not by 1 / (2^b - 1): up to 16 levels of 65535 for 12, 256 for 8.
    coarse = {"second": ("dcmj2pnm", "+Wl", "1"), "second_tolerance": 16}
    yield from both("LUT", LUT, **coarse, VOILUTSequence=lut(SQUARES, 200, bits=12))
    # 8-bit entries: 4095 - p in steps of 16, from 255 down to 0.
    steps = np.repeat(np.arange(255, -1, -1), 16)
    coarser = coarse | {"second_tolerance": 256}
    yield from both("LUT of 8 bits, falling", (255 - P // 16) / 255, **coarser, VOILUTSequence=lut(steps, bits=8))
    several = {"WindowCenter": [1000, 2048, 5], "WindowWidth": [501, 4096, 2]}
    note = ("3 windows: the first is used",)
    yield from both("several windows", LINEAR, second=WINDOW, notes=note, **several)
    luts = lut(SQUARES, 200, bits=12) + lut(steps, bits=8)
    note = ("2 VOI LUTs: the first is used",)
    yield from both("several LUTs and a window", LUT, **coarse, notes=note, VOILUTSequence=luts, **window)
    yield from both("width 1: a step", (P > 999.5) * 1.0, second=WINDOW, WindowCenter=1000, WindowWidth=1)
    # No VOI: 511 values are above the darkest, 0. Percentile 0.5 is the third of them (2.6): 24; 99.9 the last: 4088.
    yield _of(
        "none: percentiles", np.clip((P - 24) / (4088 - 24), 0, 1), "VOI", second=("dcmj2pnm", "+Ww", "2056.5", "4065")
    )
    # In MONOCHROME1 the darkest value is 4088, the third after it 4064, the brightest 0.
    yield _of(
        "none: percentiles, MONOCHROME1",
        1 - np.clip(P / 4064, 0, 1),
        "VOI",
        second=("dcmj2pnm", "+Ww", "2032.5", "4065"),
        PhotometricInterpretation="MONOCHROME1",
    )


def modalities() -> Iterator[Case]:
    """Each modality transformation, followed by a LINEAR window."""
    both = partial(_both, group="Modality")
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1024}  # 2p - 1024: black at 0, p = 512; white at 999, p = 1011.5
    expected = np.clip((2 * P - 1024) / 999, 0, 1)
    yield from both("rescale", expected, second=WINDOW, WindowCenter=500, WindowWidth=1000, **rescale)
    # 5000 - p: black at 1000, p = 4000; white at 4999, p = 1.
    falling = {"RescaleSlope": -1, "RescaleIntercept": 5000}
    expected = np.clip((4000 - P) / 3999, 0, 1)
    yield from both("rescale, slope < 0", expected, second=WINDOW, WindowCenter=3000, WindowWidth=4000, **falling)
    # p / 4 - 10.5: black at 0, p = 42; white at 500, p = 2042.
    expected = np.clip((P - 42) / 2000, 0, 1)
    fraction = {"RescaleSlope": "0.25", "RescaleIntercept": "-10.5"}
    # dcmtk rounds the output of a rescale to integers: an error of up to 0.5 in a window of 500.
    window = {"WindowCenter": "250.5", "WindowWidth": 501}
    yield from both("rescale, fractions", expected, second=WINDOW, second_tolerance=67, **window, **fraction)
    # Entry i is 2i, and the first input value 1000: 1000 -> 0, 1008 -> 16, … 1512 and above -> 1022.
    table = {"ModalityLUTSequence": lut(np.arange(512) * 2, 1000)}
    expected = np.clip(2 * (P - 1000), 0, 1022) / 1023
    yield from both("LUT", expected, second=WINDOW, WindowCenter=512, WindowWidth=1024, **table)
    # The same LUT for signed values: the first input value is -1048.
    table = {"ModalityLUTSequence": lut(np.arange(512) * 2, -1048)}
    yield from both(
        "LUT of signed values", expected, stored=SIGNED_RAMP, second=WINDOW, WindowCenter=512, WindowWidth=1024, **table
    )
    # Rescale, then the VOI LUT: 2p - 1800 is 200 at p = 1000.
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1800}
    inputs = 2 * P - 1800
    expected = np.select([inputs <= 200, inputs < 264], [0, (inputs - 200) ** 2], 3969) / 4095
    table = {"VOILUTSequence": lut(SQUARES, 200, bits=12)}
    yield from both(
        "rescale, then VOI LUT", expected, second=("dcmj2pnm", "+Wl", "1"), second_tolerance=16, **rescale, **table
    )


def paddings() -> Iterator[Case]:
    """Padding, which is black here; dcmtk displays it as if it were image."""
    both = partial(_both, group="Padding", second=WINDOW, WindowCenter=1000, WindowWidth=501)
    yield from both("a value", LINEAR, padding=P == 1240, PixelPaddingValue=1240)
    inside = (P >= 1200) & (P <= 4000)
    yield from both("a range", LINEAR, padding=inside, PixelPaddingValue=1200, PixelPaddingRangeLimit=4000)
    yield from both(
        "a range, ends swapped", LINEAR, padding=inside, PixelPaddingValue=4000, PixelPaddingRangeLimit=1200
    )
    yield from both("beyond the stored bits", LINEAR, padding=P < 0, PixelPaddingValue=0x8000)
    # -2048 is written as the unsigned 63488. SIGNED_RAMP is p - 2048; its window is shifted alike.
    yield from both(
        "signed, written unsigned",
        LINEAR,
        stored=SIGNED_RAMP,
        padding=P == 0,
        PixelPaddingValue=DataElement("PixelPaddingValue", "US", 0xF800),
        WindowCenter=-1048,
    )
    # No VOI; 0 to 80 are padding. Of 88 … 4088 the darkest is left out. Percentile 0.5 of the other 500 values is the
    # third: 112.
    yield _of(
        "a range, percentiles",
        np.where(P <= 80, 0, np.clip((P - 112) / (4088 - 112), 0, 1)),
        "Padding",
        padding=P <= 80,
        second=("dcmj2pnm", "+Ww", "2100.5", "3977"),
        PixelPaddingValue=0,
        PixelPaddingRangeLimit=80,
    )


def refused_displays() -> Iterator[Case]:
    """Transformations that are illegal or show nothing."""
    for name, tags, refused in (
        (
            "LINEAR, width 0",
            {"WindowCenter": 5, "WindowWidth": 0},
            "WindowCenter is 5.0 and WindowWidth 0.0; expected numbers that LINEAR allows",
        ),
        (
            "unknown function",
            {"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "GAMMA"},
            "VOILUTFunction is 'GAMMA'; expected LINEAR, LINEAR_EXACT or SIGMOID",
        ),
        (
            "LUT with entries beyond its bits",
            {"VOILUTSequence": lut([0, 255, 256], bits=8)},
            "a LUT holds 3 entries up to 256; expected 3 of 8 bits, as its LUTDescriptor says",
        ),
        (
            "LUT with fewer entries than it states",
            {"VOILUTSequence": short_lut(5, 4, bits=12)},
            "a LUT holds 4 entries up to 3; expected 5 of 12 bits, as its LUTDescriptor says",
        ),
        (
            "a decimal comma",
            {"WindowCenter": DataElement("WindowCenter", "LO", "2048,0"), "WindowWidth": 4096},
            "WindowCenter is '2048,0'; expected numbers with a decimal point",
        ),
        (
            "rescale, slope 0",
            {"RescaleSlope": 0, "RescaleIntercept": 7},
            "RescaleSlope is 0.0 and RescaleIntercept 7.0; expected finite, non-zero scaling",
        ),
        (
            "a window that shows nothing",
            {"WindowCenter": 60000, "WindowWidth": 100},
            "every pixel displays as one and the same value; expected an image",
        ),
    ):
        yield Case(group="VOI", name=name, build=partial(make, RAMP, BitsStored=12, **tags), refused=refused)


def _both(name: str, display: np.ndarray, *, group: str, padding: np.ndarray | None = None, **rest) -> Iterator[Case]:
    """A case and its MONOCHROME1 twin, whose display is inverted; padding is black in both."""
    for suffix, photometric, shown in (("", "MONOCHROME2", display), (", MONOCHROME1", "MONOCHROME1", 1 - display)):
        shown = shown if padding is None else np.where(padding, 0, shown)
        yield _of(name + suffix, shown, group, padding=padding, PhotometricInterpretation=photometric, **rest)


def _of(
    name: str,
    display: np.ndarray,
    group: str,
    *,
    stored: np.ndarray = RAMP,
    second: tuple[str, ...] = (),
    second_tolerance: int = 1,
    notes: tuple[str, ...] = (),
    padding: np.ndarray | None = None,
    **tags: object,
) -> Case:
    build = partial(make, stored, BitsStored=12, **tags)
    return Case(
        group=group,
        name=name,
        build=build,
        display=display,
        second=second,
        second_tolerance=second_tolerance,
        notes=notes,
        padding=padding,
    )

"""Frames that would end the process inside GDCM are refused before they reach it."""

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEGLosslessSV1, JPEGLSLossless

from gbci_fast.data.dicom import read_mammogram
from gbci_fast.data.jpeg import check_jpeg
from gbci_fast.errors import GBCIError

STORED = np.random.default_rng(0).integers(0, 4096, (48, 40)).astype(np.uint16)


@pytest.fixture(params=[JPEGLosslessSV1, JPEGLSLossless], ids=lambda syntax: syntax.keyword)
def path(make_dicom, request):
    return make_dicom(STORED, syntax=request.param, BitsStored=12)


def frame_of(path):
    return next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))


def test_frame_in_order(path):
    check_jpeg(frame_of(path), rows=48, columns=40, bits=16)
    np.testing.assert_array_equal(read_mammogram(path).stored, STORED)


@pytest.mark.parametrize("expected", [{"rows": 47}, {"columns": 41}, {"bits": 8}])
def test_frame_of_another_shape_than_the_header_states(path, expected):
    with pytest.raises(GBCIError, match=r"1 components, rows and columns \[48, 40\] and (12|16) bits; expected 1, "):
        check_jpeg(frame_of(path), **{"rows": 48, "columns": 40, "bits": 16} | expected)


def replaced(frame, offset, new):
    return frame[:offset] + new + frame[offset + len(new) :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda frame: b"", "no start of image"),
        (lambda frame: replaced(frame, 1, b"\xd9"), "no start of image"),
        (lambda frame: frame[:2], "no marker segment at byte 2"),
        (lambda frame: frame[:8], "no marker segment at byte "),
        (lambda frame: replaced(frame, 2, b"\x00"), "no marker segment at byte 2"),
        # A marker without a length, where a segment belongs.
        (lambda frame: replaced(frame, 3, b"\xd8"), "no marker segment at byte 2"),
        (lambda frame: replaced(frame, 4, b"\xff\xff"), "no marker segment at byte 65539"),
        (lambda frame: replaced(frame, 6, b"\xb9"), "its frame has 1 components, rows and columns"),
        (lambda frame: replaced(frame, 11, b"\x03"), "its frame has 3 components, rows and columns"),
        (lambda frame: frame[: len(frame) // 2], "its scan does not run to the end of the image"),
        (lambda frame: replaced(frame, len(frame) // 2, b"\xff\xda"), "its scan does not run to the end of the image"),
    ],
)
def test_damage(path, damage, reason):
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([damage(frame_of(path)) or b"\0\0"])
    dataset.save_as(path)
    with pytest.raises(GBCIError, match=rf"image.dcm: damaged JPEG data: {reason}"):
        read_mammogram(path)

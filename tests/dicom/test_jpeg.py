"""Frames that would end the process inside GDCM are refused before they reach it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEGLosslessSV1, JPEGLSLossless

from gbci_fast.dicom.jpeg import read_jpeg
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError

STORED = np.random.default_rng(0).integers(0, 4096, (48, 40)).astype(np.uint16)


@pytest.fixture(params=[JPEGLosslessSV1, JPEGLSLossless], ids=lambda syntax: syntax.keyword)
def path(make_dicom, request):
    return make_dicom(STORED, syntax=request.param, BitsStored=12)


def frame_of(path):
    return next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))


def test_frame_in_order(path):
    read_jpeg(frame_of(path), rows=48, columns=40, bits=16)
    np.testing.assert_array_equal(read_mammogram(path).stored, STORED)


@pytest.mark.parametrize("expected", [{"rows": 47}, {"columns": 41}, {"bits": 8}])
def test_frame_of_another_shape_than_the_header_states(path, expected):
    with pytest.raises(GBCIError, match=r"1 components, rows and columns \[48, 40\] and (12|16) bits; expected 1, "):
        read_jpeg(frame_of(path), **{"rows": 48, "columns": 40, "bits": 16} | expected)


def replaced(frame, offset, new):
    return frame[:offset] + new + frame[offset + len(new) :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda frame: b"", "no start of image"),
        (lambda frame: replaced(frame, 1, b"\xd9"), "no start of image"),
        (lambda frame: frame[:2], r"no marker segment at byte 2 \(cut short\)"),
        (lambda frame: frame[:8], r"no marker segment at byte \d+ \(cut short\)"),
        (lambda frame: replaced(frame, 2, b"\x00"), "no marker segment at byte 2"),
        # A marker without a length, where a segment belongs.
        (lambda frame: replaced(frame, 3, b"\xd8"), "no marker segment at byte 2"),
        (lambda frame: replaced(frame, 4, b"\xff\xff"), "no marker segment at byte 65539"),
        (lambda frame: replaced(frame, 6, b"\xb9"), "its frame has 1 components, rows and columns"),
        (lambda frame: replaced(frame, 11, b"\x03"), "its frame has 3 components, rows and columns"),
        (lambda frame: frame[: len(frame) // 2], r"its scan does not run to the end of the image \(cut short\)"),
        (lambda frame: replaced(frame, len(frame) // 2, b"\xff\xda"), "its scan does not run to the end of the image"),
    ],
)
def test_damage(path, damage, reason):
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([damage(frame_of(path)) or b"\0\0"])
    dataset.save_as(path)
    with pytest.raises(GBCIError, match=rf"image.dcm: damaged JPEG data: {reason}"):
        read_mammogram(path)


def test_damaged_lossy_frames_are_survived():
    # GDCM ends the process over the 275th of these.
    code = f"""
import random, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from corpus import frames
from corpus.files import RAMP_8, dataset
from pydicom.encaps import encapsulate
from pydicom.dataset import FileMetaDataset
from gbci_fast.dicom.pixels import decode
header = dataset(RAMP_8)
header.file_meta = FileMetaDataset()
header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.50"
outcomes = []
for seed in range(300):
    rng, frame = random.Random(seed), bytearray(frames.JPEG_8)
    for _ in range(rng.choice([1, 2, 4])):
        frame[rng.randrange(160 if rng.random() < 0.5 else len(frame))] = rng.randrange(256)
    header.PixelData = encapsulate([bytes(frame)])
    try:
        outcomes.append(decode(header)[0].shape == (16, 32))
    except Exception:
        outcomes.append(False)
print(sum(outcomes))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert 20 < int(result.stdout) < 280

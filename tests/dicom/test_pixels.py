"""The statement of lossy compression in the header after decoding."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from gbci_fast.dicom.reading import read_mammogram

STORED = np.random.default_rng(0).integers(0, 256, (48, 40)).astype(np.uint8)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(STORED).save(file, format="JPEG", quality=90)
    return file.getvalue()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, ("01", "ISO_10918_1")),
        # This transfer syntax has no lossless mode, whatever the tag says.
        ({"LossyImageCompression": "00"}, ("01", "ISO_10918_1")),
        # A compression history that the header states is kept.
        (
            {"LossyImageCompression": "01", "LossyImageCompressionMethod": ["ISO_15444_1", "ISO_10918_1"]},
            ("01", ["ISO_15444_1", "ISO_10918_1"]),
        ),
    ],
)
def test_jpeg_is_lossy(make_dicom, stated, expected):
    path = make_dicom(STORED, **stated)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([jpeg()])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(path)
    header = read_mammogram(path).dataset
    assert (header.LossyImageCompression, header.LossyImageCompressionMethod) == expected
    if not stated:
        assert float(header.LossyImageCompressionRatio) == pytest.approx(STORED.size / len(jpeg()), abs=0.02)


@pytest.mark.parametrize(("stated", "expected"), [({}, "01"), ({"LossyImageCompression": "00"}, "00")])
def test_jpeg_2000_may_be_lossless_under_the_lossy_syntax(make_dicom, stated, expected):
    path = make_dicom(STORED, syntax=pydicom.uid.JPEG2000Lossless, **stated)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEG2000
    dataset.save_as(path)
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.stored, STORED)
    assert mammogram.dataset.LossyImageCompression == expected


@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_nothing_is_added_to_what_is_lossless(make_dicom, syntax):
    header = read_mammogram(make_dicom(STORED, syntax=syntax)).dataset
    assert not any(keyword.startswith("Lossy") for keyword in header.dir())

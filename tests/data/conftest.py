"""Small DICOM files, built with pydicom, and real films, read once."""

from functools import cache

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    generate_uid,
)

from gbci_fast.data.dicom import read_mammogram
from gbci_fast.data.segmentation import breast_mask

GDCM_SYNTAXES = {JPEGLosslessSV1: "JPEGLosslessProcess14_1", JPEGLSLossless: "JPEGLSLossless"}


def image_dataset(stored, **tags):
    """Header and pixels of `stored` [H, W]; `tags` override any attribute, None removes it."""
    bits = 8 * stored.dtype.itemsize
    dataset = Dataset()
    dataset.SOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    dataset.SOPInstanceUID = generate_uid()
    dataset.Modality = "MG"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated = bits
    dataset.BitsStored = tags.get("BitsStored", bits)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.add_new("PixelData", "OB" if bits == 8 else "OW", stored.tobytes() + b"\0" * (stored.nbytes % 2))
    for keyword, value in tags.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


@pytest.fixture(scope="session")
def outlined():
    """Called with a path: pixels in [0, 1], the breast's mask, and the mammogram."""

    @cache
    def read(path):
        mammogram = read_mammogram(path)
        unit = mammogram.unit()
        return unit, breast_mask(unit), mammogram

    return read


def write(dataset, path, syntax=ExplicitVRLittleEndian):
    """Writes in any transfer syntax that pydicom or GDCM can encode."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_compressed else syntax
    if syntax == ExplicitVRBigEndian:
        width = dataset.BitsAllocated // 8
        dataset["PixelData"].value = np.frombuffer(dataset.PixelData, f"<u{width}").astype(f">u{width}").tobytes()
    if syntax.is_encapsulated and syntax not in GDCM_SYNTAXES:
        dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    elif syntax.is_deflated:
        dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)
    if syntax in GDCM_SYNTAXES:
        _transcode(path, GDCM_SYNTAXES[syntax])
    return path


def _transcode(path, syntax):
    import gdcm  # not before pydicom, which has loaded the system's zlib: see gbci_fast/data/__init__.py

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.fixture
def make_dicom(tmp_path):
    """`make_dicom(stored, name="image.dcm", syntax=..., **tags)` writes a file and returns its path."""

    def make(stored, name="image.dcm", syntax=ExplicitVRLittleEndian, **tags):
        return write(image_dataset(stored, **tags), tmp_path / name, syntax)

    return make


@pytest.fixture
def ramp():
    """uint16 [16, 32]: 512 different 12-bit values, 8 apart."""
    return (np.arange(512, dtype=np.uint16) * 8).reshape(16, 32)

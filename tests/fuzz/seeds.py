"""Small, valid files of every kind that the readers take: what the fuzzer damages. No date, no random UID in them."""

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import gbci_fast

GDCM_NAMES = {JPEGLosslessSV1: "JPEGLosslessProcess14_1", JPEGLSLossless: "JPEGLSLossless"}
SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
)
BREAST_TABLE = """\
study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split,age,report
s1,r1,i1,L,CC,48,40,BI-RADS 4,DENSITY B,training,52,"a mass, oval"
s1,r1,i2,R,MLO,48,40,BI-RADS 1,DENSITY C,test,,
"""
FINDING_TABLE = """\
image_id,finding_categories,finding_birads,xmin,ymin,xmax,ymax,report
i1,"['Mass', 'Asymmetry']",BI-RADS 4,5.5,6,20,30,"says ""oval"", mostly"
i2,['No Finding'],,,,,,
"""


PLAN = """\
image,variant,seed,finding_categories,finding_birads,mask,xmin,ymin,xmax,ymax,center_x,center_y,diameter_px,aspect,tilt
i1,0,17,Mass|Asymmetry,4,auto,,,,,,,,,
i2,,,"['Mass']",5,,4,5,20.5,30,,,,,
images/s1/i1.dicom,1,,unknown,,,,,,,20,24,9.5,1.2,30
"""
PRIORS = Path(gbci_fast.__file__).parent / "generate" / "priors.json"


def write_seeds(folder: Path) -> None:
    """`folder/<kind>/<name>`: dicom, png, mask, table, plan, priors."""
    for kind in ("dicom", "png", "mask", "table", "plan", "priors"):
        (folder / kind).mkdir(parents=True)
    stored = _stored()
    for syntax in SYNTAXES:
        for variant, (pixels, tags) in _variants(stored).items():
            if syntax.is_encapsulated and variant == "signed":
                continue  # what compresses signed pixels is the encoder's affair, not the reader's
            _write_dicom(folder / "dicom" / f"{syntax.keyword}-{variant}.dcm", pixels, tags, syntax)
    _write_lossy(folder / "dicom" / "JPEGBaseline8Bit.dcm", (stored >> 4).astype(np.uint8))
    for name, pixels in (("gray8", (stored >> 4).astype(np.uint8)), ("gray16", stored)):
        Image.fromarray(pixels).save(folder / "png" / f"{name}.png")
    drawn = np.zeros(stored.shape, np.uint8)
    drawn[10:20, 5:15] = 255
    Image.fromarray(drawn).save(folder / "mask" / "gray.png")
    Image.fromarray(drawn).convert("1").save(folder / "mask" / "bits.png")
    Image.fromarray(drawn).save(folder / "mask" / "gray.tif")
    (folder / "plan" / "plan.csv").write_text(PLAN)
    (folder / "priors" / "priors.json").write_bytes(PRIORS.read_bytes())
    (folder / "table" / "breast-level_annotations.csv").write_text(BREAST_TABLE)
    (folder / "table" / "finding_annotations.csv").write_text(FINDING_TABLE)


def _stored() -> np.ndarray:
    """uint16 [48, 40] of 12 bits: grain on a half disk, and air."""
    y, x = np.mgrid[:48, :40]
    grain = np.random.default_rng(0).integers(0, 500, (48, 40))
    return np.where(np.hypot(y - 24, x) < 22, 1500 + 40 * x + grain, 0).astype(np.uint16)


def _variants(stored: np.ndarray) -> dict[str, tuple[np.ndarray, dict]]:
    table, modality = Dataset(), Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, 12])
    table.add_new("LUTData", "US", list(range(4096)))
    modality.add_new("LUTDescriptor", "US", [256, 0, 12])
    modality.add_new("LUTData", "US", [16 * i for i in range(256)])
    modality.ModalityLUTType = "US"
    window = {"WindowCenter": [2048, 1000], "WindowWidth": [4096, 900], "VOILUTFunction": "LINEAR"}
    return {
        "window": (stored, {"BitsStored": 12, **window, "RescaleSlope": "2", "RescaleIntercept": "-10"}),
        "lut": (stored, {"BitsStored": 12, "VOILUTSequence": [table], "PhotometricInterpretation": "MONOCHROME1"}),
        "eight": ((stored >> 4).astype(np.uint8), {"ModalityLUTSequence": [modality], "PatientAge": "061Y"}),
        "signed": ((stored.astype(np.int32) - 2048).astype(np.int16), {"PixelPaddingValue": -2048}),
    }


def _dataset(stored: np.ndarray, tags: dict) -> Dataset:
    dataset, bits = Dataset(), 8 * stored.dtype.itemsize
    dataset.file_meta = FileMetaDataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = DigitalMammographyXRayImageStorageForPresentation, "1.2.3"
    dataset.Modality, dataset.PatientID = "MG", "P_1_LEFT_CC"
    dataset.PatientOrientation, dataset.ImagerPixelSpacing = ["A", "R"], [0.1, 0.1]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored = bits, tags.get("BitsStored", bits)
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(stored.dtype.kind == "i")
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def _write_dicom(path: Path, stored: np.ndarray, tags: dict, syntax: str) -> None:
    dataset = _dataset(stored, tags)
    if syntax == ExplicitVRBigEndian:
        stored = stored.astype(stored.dtype.newbyteorder(">"))
    dataset.add_new("PixelData", "OB" if stored.itemsize == 1 else "OW", stored.tobytes())
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_encapsulated else syntax
    if syntax.is_encapsulated and syntax not in GDCM_NAMES:
        dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
    if syntax in GDCM_NAMES:
        _transcode(path, GDCM_NAMES[syntax])


def _write_lossy(path: Path, stored: np.ndarray) -> None:
    """8 bits as JPEG, which film scans come in."""
    dataset = _dataset(stored, {})
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, format="JPEG", quality=90)
    dataset.PixelData = encapsulate([buffer.getvalue()])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.LossyImageCompression = "01"
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(path, enforce_file_format=True)


def _transcode(path: Path, name: str) -> None:
    import gdcm  # after pydicom, which has loaded the system's zlib: see gbci_fast/dicom/__init__.py

    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def make_root(folder: Path) -> Path:
    """A VinDr root around the tables; only the tables are read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("breast-level_annotations.csv", BREAST_TABLE), ("finding_annotations.csv", FINDING_TABLE)):
        (folder / name).write_text(text)
    return folder


def remake(folder: Path) -> Path:
    """Seeds in an empty `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    write_seeds(folder)
    return folder

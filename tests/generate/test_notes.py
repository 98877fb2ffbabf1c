"""What is unusual about an input goes from the reader into the manifest, the summary, and the written image."""

import numpy as np
import pandas as pd
import pydicom
from PIL import Image
from pydicom.uid import DigitalMammographyXRayImageStorageForProcessing

from gbci_fast.data.deidentify import KeptIdentifiers
from gbci_fast.data.vindr import find_inputs
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.generate.identities import Identities
from gbci_fast.generate.job import run_job
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings


def test_notes_of_the_inputs(pipe, make_job, breast, write_template, tmp_path):
    twelve = np.round(400 + 3000 * breast()).astype(np.uint16)
    usual = {"BurnedInAnnotation": "NO", "WindowCenter": 2048, "WindowWidth": 4096}
    folder = tmp_path / "inputs"
    folder.mkdir()
    write_template(folder / "implant.dcm", twelve, bits=12, BreastImplantPresent="YES", **usual)
    write_template(folder / "mirrored.dcm", np.ascontiguousarray(twelve[:, ::-1]), bits=12, **usual)
    # X-ray intensity behind the same breast, as a detector gives it.
    raw = pydicom.dcmread(folder / "implant.dcm")
    raw.SOPClassUID = DigitalMammographyXRayImageStorageForProcessing
    raw.PixelIntensityRelationship, raw.PixelIntensityRelationshipSign = "LIN", 1
    raw.BreastImplantPresent, raw.PhotometricInterpretation = "NO", "MONOCHROME1"
    del raw.WindowCenter, raw.WindowWidth
    raw.PixelData = np.round(4000 * np.exp(-3 * breast())).astype(np.uint16).tobytes()
    raw.save_as(folder / "raw.dcm")
    plan = make_plan(find_inputs(folder), variants=1, seed=0)
    settings = JobSettings(seed=0, batch_size=2, sampler=make_job.sampler, formats=("dicom",), weights_hash="ab" * 32)
    result = run_job(pipe, plan, tmp_path / "out", settings, identities=Identities(KeptIdentifiers()))
    high = "pixels are 2 times as high as wide"
    side = "stated to be a left breast, but the chest wall lies on the right"
    histogram = "For Processing, not for reading: displayed by its own histogram"
    assert result.noted == {high: 3, "breast implant": 1, side: 1, histogram: 1}
    manifest = pd.read_parquet(tmp_path / "out" / "manifest.parquet").groupby("template_file").first()
    assert manifest.template_notes["implant.dcm"] == f"breast implant; {high}"
    assert manifest.template_notes["mirrored.dcm"] == f"{high}; {side}"
    written = {name: pydicom.dcmread(tmp_path / "out" / row.dicom_file) for name, row in manifest.iterrows()}
    assert written["implant.dcm"].BreastImplantPresent == "YES"
    assert written["implant.dcm"].PatientOrientation == ["A", "R"]
    # Its copy is For Presentation, with a VOI LUT for the same display.
    original, copy = (
        read_mammogram(folder / "raw.dcm"),
        read_mammogram(tmp_path / "out" / manifest.dicom_file["raw.dcm"]),
    )
    outside = np.asarray(Image.open(tmp_path / "out" / manifest.mask_file["raw.dcm"])) == 0
    np.testing.assert_array_equal(copy.stored[outside], original.stored[outside])
    np.testing.assert_array_equal(copy.unit()[outside], original.unit()[outside])
    assert (copy.stored != original.stored).any()
    assert written["raw.dcm"].PresentationIntentType == "FOR PRESENTATION"
    # The side stays that of the header; the direction of the rows follows the pixels.
    assert written["mirrored.dcm"].ImageLaterality == "L"
    assert written["mirrored.dcm"].PatientOrientation == ["P", "R"]

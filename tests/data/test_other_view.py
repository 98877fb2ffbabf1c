"""A view in the header takes precedence over the file's name; a view other than CC and MLO also over tables."""

from dataclasses import replace

import numpy as np
import pytest
from pydicom import Dataset

from gbci_fast.data.fields import read_fields
from gbci_fast.data.prepare_image import contradictions
from gbci_fast.data.vindr import find_inputs
from gbci_fast.dicom.reading import read_header


def code(value, meaning="x"):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return [item]


def breast():
    """uint16 [128, 96]: bright tissue at the left edge."""
    y, x = np.mgrid[:128, :96]
    depth = 1 - ((y - 64) / 52) ** 2 - (x / 62) ** 2
    noise = np.random.default_rng(0).integers(0, 40, depth.shape)
    return np.where(depth > 0, 1200 + 1800 * np.sqrt(np.maximum(depth, 0)), 100 + noise).astype(np.uint16)


STATED = [
    ({"ViewPosition": "ML"}, None, "ML"),
    ({"ViewPosition": "XCCL"}, None, "XCCL"),
    ({"ViewPosition": "ML", "ViewCodeSequence": code("399368009")}, None, "ML"),
    ({"ViewPosition": "RXCCL"}, None, "XCCL"),
    ({"ViewPosition": "L LM"}, None, "LM"),
    ({"ViewCodeSequence": code("399260004", "medio-lateral")}, None, "ML"),
    ({"ViewCodeSequence": code("R-10224", "")}, None, "ML"),
    ({"ViewCodeSequence": code("V-7", "latero-medial")}, None, "LM"),
    # A private code counts if its meaning names a view; otherwise the file's name decides.
    ({"ViewCodeSequence": code("V-1", "cranio-caudal")}, "CC", None),
    ({"ViewCodeSequence": code("V-1", "cc")}, "CC", None),
    ({"ViewCodeSequence": code("V-2", "Medio-Lateral Oblique Left")}, "MLO", None),
    ({"ViewCodeSequence": code("V-3", "Jane Doe")}, "MLO", None),
    *(({"ViewPosition": text}, "MLO", None) for text in ("UNK", "N/A", "U", "OTHER", "not specified")),
    ({"ViewPosition": "UNK", "ViewCodeSequence": code("R-10242")}, "CC", None),
    # Any other text counts as another view, but is not quoted.
    ({"ViewPosition": "Jane Doe"}, None, "(not a known term)"),
    ({"ViewPosition": "Jane Doe", "ViewCodeSequence": code("R-10242")}, "CC", None),
    ({"ViewPosition": "CC"}, "CC", None),
    ({"ViewPosition": "RCC"}, "CC", None),
    ({"ViewPosition": "unknown"}, "MLO", None),  # states no view
    ({}, "MLO", None),
]


@pytest.mark.parametrize(("tags", "view", "other"), STATED, ids=str)
def test_the_name_fills_in_only_what_is_not_stated(make_dicom, tags, view, other):
    path = make_dicom(breast(), name="scan_LMLO.dcm", **tags)
    header, mammogram = read_header(path), find_inputs(path)[0].read()
    assert (header.view_position, header.other_view) == (view, other)
    assert (mammogram.view_position, mammogram.other_view) == (view, other)


def test_a_table_does_not_replace_another_view(make_dicom):
    (record,) = find_inputs(make_dicom(breast(), name="scan.dcm", ViewPosition="ML"))
    listed = replace(record, view_position="MLO", listed=True)
    assert listed.read().view_position is None


@pytest.mark.parametrize(
    ("listed", "stated", "view"),
    [(False, "ML", None), (True, "ML", None), (False, "CC", "CC"), (True, "CC", "MLO"), (False, "", "MLO")],
)
def test_what_a_model_is_told(make_dicom, tmp_path, listed, stated, view):
    """The view of a training image: a table overrides CC or MLO in the header, with a note."""
    (record,) = find_inputs(make_dicom(breast(), name="scan_LMLO.dcm", ViewPosition=stated))
    record = replace(record, listed=listed)
    reading = read_fields(record, tmp_path, 64)
    assert [field.field.attributes.view_position for field in reading.fields] == [view]
    source = "the table" if listed else "the file's name"
    notes = [f"view_position is MLO in {source} and {stated} in the image's header"] if stated else []
    assert contradictions(record, reading) == notes

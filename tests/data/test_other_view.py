"""A header that states a view, whichever, is not overruled by a file's name; another view is by no table either."""

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
    # A code of their own whose meaning is a view's name; one without says nothing.
    ({"ViewCodeSequence": code("V-1", "cranio-caudal")}, "CC", None),
    ({"ViewCodeSequence": code("V-1", "cc")}, "CC", None),
    ({"ViewCodeSequence": code("V-2", "Medio-Lateral Oblique Left")}, "MLO", None),
    ({"ViewCodeSequence": code("V-3", "Jane Doe")}, "MLO", None),
    *(({"ViewPosition": text}, "MLO", None) for text in ("UNK", "N/A", "U", "OTHER", "not specified")),
    ({"ViewPosition": "UNK", "ViewCodeSequence": code("R-10242")}, "CC", None),
    # Any other text is a view, too, but is not repeated.
    ({"ViewPosition": "Jane Doe"}, None, "(not a known term)"),
    ({"ViewPosition": "Jane Doe", "ViewCodeSequence": code("R-10242")}, "CC", None),
    ({"ViewPosition": "CC"}, "CC", None),
    ({"ViewPosition": "RCC"}, "CC", None),
    ({"ViewPosition": "unknown"}, "MLO", None),  # which states nothing
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
    """The conditions of a training image; a table may name CC or MLO better than the header, with a note."""
    (record,) = find_inputs(make_dicom(breast(), name="scan_LMLO.dcm", ViewPosition=stated))
    record = replace(record, listed=listed)
    reading = read_fields(record, tmp_path, 64)
    assert [field.field.attributes.view_position for field in reading.fields] == [view]
    source = "the table" if listed else "the file's name"
    notes = [f"view_position is MLO in {source} and {stated} in the image's header"] if stated else []
    assert contradictions(record, reading) == notes

"""Every file of the corpus: its display against hand-made values and dcmtk, and its copy after a change."""

from datetime import datetime

import numpy as np
import pytest

from gbci_fast.dicom.reading import read_header, read_mammogram
from gbci_fast.dicom.writing import MammogramHeader, mammogram_dataset, write_dicom
from gbci_fast.errors import GBCIError

from . import second
from .cases import CASES, READ, REFUSED

COMPARED = [case for case in READ if case.second]
needs_dcmtk = pytest.mark.skipif(not second.is_installed(), reason=second.MISSING)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture
def path(tmp_path, case):
    path = tmp_path / "image.dcm"
    path.write_bytes(case.build())
    return path


def test_names_are_unique():
    assert len({case.id for case in CASES}) == len(CASES)


@named(READ)
def test_display_is_the_one_worked_out_by_hand(path, case):
    mammogram = read_mammogram(path)
    assert np.ptp(case.display) > 0.5  # a picture with something to see
    np.testing.assert_allclose(mammogram.unit(), case.display, rtol=0, atol=case.tolerance)
    assert mammogram.notes == case.notes
    assert mammogram.spacing == (None if case.spacing is None else pytest.approx(case.spacing))
    assert read_header(path).shape == mammogram.shape
    assert (mammogram.view_position, mammogram.laterality) == ("CC", case.laterality)


@named(REFUSED)
def test_refusal_is_one_sentence(path, case, capfd):
    with pytest.raises(GBCIError) as caught:
        read_mammogram(path)
    assert str(caught.value).startswith(f"{path}: {case.refused}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_dcmtk
@named(COMPARED)
def test_second_implementation_displays_alike(path, case):
    other = second.render(path, *case.second)
    assert second.difference(read_mammogram(path).unit(), other, case.padding) <= case.second_tolerance


@pytest.mark.parametrize(
    ("case", "compression"),
    [
        pytest.param(case, compression, id=f"{case.id}-{compression}")
        for case in READ
        for compression in ("none", "rle", "jpeg2000")
        if compression != "jpeg2000" or min(case.display.shape) >= 32  # the encoder takes no smaller image
    ],
)
def test_what_was_read_can_be_changed_and_written(path, case, compression, tmp_path):
    original = read_mammogram(path)
    presentation = original.presentation
    new, inside = original.unit().copy(), np.zeros(original.shape, bool)
    inside[4:12, 6:20] = True
    new[inside] = 0.5
    stored = presentation.paste(original.stored, new)
    write_copy(original, stored, tmp_path / "copy.dcm", compression)
    copy = read_mammogram(tmp_path / "copy.dcm")
    np.testing.assert_array_equal(copy.stored, stored)
    np.testing.assert_array_equal(copy.stored[~inside], original.stored[~inside])
    # The display is a function of the stored value alone, and the copy has the same function.
    np.testing.assert_array_equal(copy.unit(), presentation.to_unit(stored))
    np.testing.assert_array_equal(copy.unit()[~inside], original.unit()[~inside])
    assert copy.spacing == pytest.approx(original.spacing or (0.05, 0.05))


@needs_dcmtk
@named([case for case in READ if case.group == "For Processing"])
def test_second_implementation_displays_the_copy_of_a_raw_image_alike(path, case, tmp_path):
    original = read_mammogram(path)
    write_copy(original, original.stored, tmp_path / "copy.dcm", "none")
    voi = "+Wi" if "WindowCenter" in read_mammogram(tmp_path / "copy.dcm").dataset else "+Wl"
    other = second.render(tmp_path / "copy.dcm", "dcmj2pnm", voi, "1")
    assert second.difference(original.unit(), other) <= 1


def write_copy(original, stored, path, compression):
    header = MammogramHeader(
        view_position="CC",
        laterality="L",
        study_uid="2.25.2",
        series_uid="2.25.3",
        instance_uid="2.25.4",
        study_datetime=datetime(2001, 2, 3),
        patient_id="P",
        software_version="1",
        derivation="",
        spacing=original.spacing,
    )
    presentation = original.presentation
    dataset = mammogram_dataset(stored, header, like=original.dataset, window=presentation.window, lut=presentation.lut)
    write_dicom(dataset, path, compression=compression)

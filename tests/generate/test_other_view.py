"""An image of a view that is neither CC nor MLO gets no DICOM copy as CC or MLO, whatever its name says."""

import numpy as np
import pandas as pd
import pydicom
import pytest

from gbci_fast.data.vindr import find_inputs
from gbci_fast.errors import GBCIError
from gbci_fast.generate.checks import InputChecks
from gbci_fast.generate.plan import make_plan


@pytest.fixture
def lateral(breast, write_template, tmp_path):
    """A mediolateral image in a file whose name says MLO."""
    path = tmp_path / "scan_LMLO.dcm"
    write_template(path, np.round(400 + 3000 * breast()).astype(np.uint16), bits=12)
    dataset = pydicom.dcmread(path)
    dataset.ViewPosition = "ML"
    dataset.save_as(path)
    return path


def test_it_is_refused_before_anything_is_sampled(lateral, make_job, tmp_path):
    (item,) = make_plan(find_inputs(lateral), variants=1, seed=0)
    fault = InputChecks(("dicom",)).fault(item)
    assert str(fault).startswith(f"{lateral}: its header states the view 'ML', whatever names and tables say")
    assert InputChecks(("png",)).fault(item) is None
    with pytest.raises(GBCIError, match="its header states the view 'ML'"):
        make_job(lateral, tmp_path / "out", settings={"formats": ("dicom",)})
    assert not (tmp_path / "out" / "images").exists()


def test_an_override_is_the_users_word(lateral, make_job, tmp_path):
    make_job(lateral, tmp_path / "out", overrides={"view_position": "MLO"}, settings={"formats": ("dicom",)})
    (row,) = pd.read_parquet(tmp_path / "out" / "manifest.parquet").itertuples()
    assert pydicom.dcmread(tmp_path / "out" / row.dicom_file).ViewPosition == "MLO"


def test_without_dicom_it_is_painted_with_an_unknown_view(lateral, make_job, tmp_path):
    make_job(lateral, tmp_path / "out", settings={"formats": ("png",)})
    table = pd.read_csv(tmp_path / "out" / "breast-level_annotations.csv")
    assert table.view_position.isna().all()

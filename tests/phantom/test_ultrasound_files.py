"""Ultrasound slices in the data set: which findings have one, and that files and table agree."""

import csv

import numpy as np
import pytest
from PIL import Image

from gbci_fast.errors import GBCIError
from gbci_fast.phantom import Population, generate_phantom
from gbci_fast.phantom.study import draw_study, growth_series
from gbci_fast.phantom.ultrasound import render_ultrasound

POPULATION = Population(prevalence=1.0)


def rows(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "data"
    generate_phantom(root, 4, 5, 128, population=POPULATION, twins=True, ultrasound=True)
    return root


def test_every_finding_with_a_body_has_a_slice(phantom):
    expected = set()
    for index in range(4):
        plan = draw_study(5, index, POPULATION)
        for breast in plan.breasts:
            for number, finding in enumerate(breast.findings, 1):
                if finding.body is not None:
                    expected.add((plan.patient_id, breast.laterality, str(number), str(list(finding.categories))))
    table = rows(phantom / "ultrasound.csv")
    keys = ("patient_id", "laterality", "finding", "finding_categories")
    assert {tuple(row[key] for key in keys) for row in table} == expected
    assert len(table) == len(expected) > 4
    files = {str(path.relative_to(phantom)) for path in (phantom / "ultrasound").rglob("*.png")}
    assert files == {row[key] for row in table for key in ("file", "mask_file", "twin_file")}


def test_rows_agree_with_pixels(phantom):
    for row in rows(phantom / "ultrasound.csv"):
        image, mask, twin = (pixels(phantom / row[key]) for key in ("file", "mask_file", "twin_file"))
        assert image.shape == mask.shape == twin.shape == (int(row["height"]), int(row["width"]))
        assert image.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        y, x = np.nonzero(mask)
        assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == [int(row[k]) for k in ("xmin", "ymin", "xmax", "ymax")]
        assert (image != twin)[mask > 0].mean() > 0.5


def test_mammograms_name_the_slice_of_their_findings(phantom):
    slices = {row["file"]: row for row in rows(phantom / "ultrasound.csv")}
    named = [row for row in rows(phantom / "finding_annotations.csv") if row["ultrasound"]]
    assert {row["ultrasound"] for row in named} == set(slices)
    for row in named:
        same = slices[row["ultrasound"]]
        keys = ("study_id", "laterality", "finding_categories", "finding_birads", "pathology", "volume_mm3", "split")
        assert [row[key] for key in keys] == [same[key] for key in keys]


def test_without_the_option_there_is_none(tmp_path):
    generate_phantom(tmp_path / "data", 1, 5, 128, population=POPULATION)
    assert not (tmp_path / "data" / "ultrasound.csv").exists()
    assert not (tmp_path / "data" / "ultrasound").exists()
    assert {row["ultrasound"] for row in rows(tmp_path / "data" / "finding_annotations.csv")} == {""}


def mass_of(grows: bool):
    for index in range(200):
        plan = draw_study(1, index, POPULATION)
        for breast in range(2):
            for number, finding in enumerate(plan.breasts[breast].findings):
                if "Mass" in finding.categories and (finding.doubling_days is not None) == grows:
                    return plan, breast, number
    raise AssertionError("no mass in 200 studies")


def test_a_slice_depends_on_its_finding_alone():
    plan, breast, number = mass_of(grows=False)
    one, again = (
        render_ultrasound(each, each.breasts[breast], number) for each in (plan, draw_study(1, plan.index, POPULATION))
    )
    assert one.mask.any()
    np.testing.assert_array_equal(one.image, again.image)


def test_a_growing_mass_grows_in_the_same_breast():
    plan, breast, number = mass_of(grows=True)
    series = [render_ultrasound(each, each.breasts[breast], number) for each in growth_series(plan, 3, 180)]
    areas = [each.mask.sum() for each in series]
    assert areas == sorted(areas)
    assert areas[0] < areas[2]
    twins = [
        render_ultrasound(each, each.breasts[breast], number, healthy=True) for each in growth_series(plan, 2, 180)
    ]
    np.testing.assert_array_equal(twins[0].image, twins[1].image)


def test_a_finding_without_a_body_is_refused():
    for index in range(300):
        plan = draw_study(1, index, POPULATION)
        for breast in plan.breasts:
            for number, finding in enumerate(breast.findings):
                if finding.body is None:
                    with pytest.raises(GBCIError, match=f"kind '{finding.kind}' has no body"):
                        render_ultrasound(plan, breast, number)
                    return
    raise AssertionError("every finding has a body")

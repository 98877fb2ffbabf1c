"""The contact sheet of a phantom's lesion."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gbci_fast.evaluate.lesions import read_lesions
from gbci_fast.evaluate.obedience.sheet import TOLD, draw_sheet, typical
from gbci_fast.phantom import generate_phantom


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("sheet") / "root"
    generate_phantom(root, studies=2, seed=3, size=128)
    return read_lesions([root])


def test_ten_descriptions_at_one_seed_and_one_at_another(phantoms, tmp_path):
    asked = []

    def painter(cases, descriptions):
        asked.extend(zip(cases, descriptions, strict=True))
        rng = np.random.default_rng(0)
        return [np.where(case.mask, rng.random(case.image.shape), case.pixels).astype(np.float32) for case in cases]

    case = typical(phantoms)
    case = replace(case, attributes=replace(case.attributes, breast_density="B"))
    draw_sheet(tmp_path / "sheet.png", case, painter)
    assert len(TOLD) == 10
    assert [told.seed for told, _ in asked[:10]] == [case.seed] * 10
    assert asked[10][0].seed != case.seed
    assert asked[10][1] == asked[0][1]
    assert len({described for _, described in asked[:10]}) == 10
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 1000


def test_the_shown_lesion_is_one_of_the_larger(disk_case):
    cases = [disk_case(i, False) for i in range(9)]
    shown = typical(cases)
    assert sum(case.diameter > shown.diameter for case in cases) == 2

"""`Lesion`: exact JSON, stable ids, what it refuses, and the description of its pictures."""

import dataclasses
import json

import pytest

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.lesion.lesion import Growth, Lesion, lesion_id

FULL = Lesion(
    finding_categories=("Mass", "Suspicious Calcification"),
    finding_birads=5,
    pathology="malignant",
    axes=(12.1, 10.3, 8.7),
    shape="irregular",
    margin="spiculated",
    orientation=30.0,
    calcification="fine pleomorphic",
    distribution="grouped",
    subtlety=3,
    laterality="L",
    clock=10,
    nipple_distance=40.0,
    depth="posterior",
    growth=Growth(doubling_days=258.0),
)


@pytest.mark.parametrize(
    "lesion",
    [FULL, Lesion(), Lesion(finding_categories=()), Lesion(growth=Growth(doubling_days=None))],
    ids=["full", "unknown", "no finding", "stable"],
)
def test_json_restores_a_lesion(lesion):
    assert Lesion.from_json(json.loads(json.dumps(lesion.to_json()))) == lesion


def test_json_holds_the_known_values_alone():
    assert Lesion(finding_categories=(), clock=3).to_json() == {"finding_categories": [], "clock": 3}
    assert all(getattr(FULL, field.name) is not None for field in dataclasses.fields(Lesion))
    assert set(FULL.to_json()) == {field.name for field in dataclasses.fields(Lesion)}


def test_an_id_is_that_of_the_lesion():
    assert lesion_id(FULL) == "889898d6244f9460ae4cc5ccfce49dee"  # on every machine, in every version
    again = dataclasses.replace(
        FULL, finding_categories=("Suspicious Calcification", "Mass"), orientation=30, nipple_distance=40
    )
    assert lesion_id(again) == lesion_id(FULL)
    for field in dataclasses.fields(Lesion):
        if field.name not in ("finding_categories",):
            assert lesion_id(dataclasses.replace(FULL, **{field.name: None})) != lesion_id(FULL), field.name
    assert len({lesion_id(FULL), lesion_id(FULL, 0, 1), lesion_id(FULL, 0, 2)}) == 3


def test_a_picture_has_the_lesion_s_description():
    base = Attributes(view_position="CC", breast_density="B", age=60.0, finding_birads=2, margin="obscured")
    told = FULL.attributes(base)
    assert told == Attributes(
        laterality="L",
        view_position="CC",
        breast_density="B",
        finding_categories=("Mass", "Suspicious Calcification"),
        finding_birads=5,
        shape="irregular",
        margin="spiculated",
        pathology="malignant",
        subtlety=3,
        age=60.0,
    )
    assert Lesion().attributes(base) == dataclasses.replace(base, finding_birads=None, margin=None)
    assert Lesion().attributes(Attributes(laterality="R")).laterality == "R"
    with pytest.raises(GBCIError, match="laterality is 'R'; the lesion lies in the breast 'L'"):
        FULL.attributes(Attributes(laterality="R"))


REFUSED = {
    "key": ({"size": 3}, "lesion has the key 'size'; expected out of finding_categories, finding_birads, pathology"),
    "no object": ([1], "lesion is [1]; expected an object"),
    "growth key": ({"growth": {"days": 3}}, "growth has the key 'days'; expected out of doubling_days"),
    "no growth": ({"growth": 3}, "growth is 3; expected an object"),
    "empty growth": ({"growth": {}}, "growth: object missing required field doubling_days"),
    "two axes": ({"axes": [2, 1]}, "axes: expected array of length 3, got 2"),
    "text axis": ({"axes": [2, 1, "1"]}, "axes[2]: expected float, got str"),
    "rising axes": ({"axes": [1, 2, 3]}, "axes is [1.0, 2.0, 3.0]; expected three lengths in mm up to 300, the long"),
    "no axis": ({"axes": [1, 1, 0]}, "axes is [1.0, 1.0, 0.0]; expected three lengths"),
    "long axis": ({"axes": [301, 1, 1]}, "axes is [301.0, 1.0, 1.0]; expected three lengths in mm up to 300"),
    "nan axis": ({"axes": [1, float("nan"), 1]}, "axes is [1.0, nan, 1.0]; expected three lengths"),
    "turn": ({"orientation": 180}, "orientation is 180.0; expected degrees from 0 up to 180, without 180"),
    "nan": ({"nipple_distance": float("nan")}, "nipple_distance is nan; expected mm from 0 to 300"),
    "fast": ({"growth": {"doubling_days": 0.5}}, "doubling_days is 0.5; expected days from 1 to 100000"),
    "hour": ({"clock": 0}, "clock is 0; expected one of 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"),
    "half an hour": ({"clock": 1.5}, "clock: expected int | null, got float"),
    "depth": ({"depth": "deep"}, "depth is 'deep'; expected one of anterior, middle, posterior"),
    "margin": ({"margin": "rough"}, "margin is 'rough'; expected one of circumscribed, obscured, microlobulated"),
    "birads": ({"finding_birads": 6}, "finding_birads is 6; expected one of 1, 2, 3, 4, 5"),
    "category": ({"finding_categories": ["Lump"]}, "finding_categories is 'Lump'; expected one of Mass"),
    "no mass": (
        {"finding_categories": ["Asymmetry"], "shape": "oval"},
        "shape is 'oval' beside Asymmetry; expected it of a Mass alone",
    ),
    "healthy": ({"finding_categories": [], "subtlety": 3}, "subtlety is 3 beside 'No Finding'; expected none"),
    "no calcification": (
        {"finding_categories": ["Mass"], "distribution": "grouped"},
        "distribution is 'grouped'; expected it of Suspicious Calcification alone",
    ),
    "healthy calcification": (
        {"finding_categories": [], "calcification": "amorphous"},
        "calcification is stated beside 'No Finding'; expected none",
    ),
    "healthy growth": (
        {"finding_categories": [], "growth": {"doubling_days": 9}},
        "growth is stated beside 'No Finding'; expected none",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refusals(content, sentence):
    with pytest.raises(GBCIError) as error:
        Lesion.from_json(content)
    assert str(error.value).startswith(sentence)


def test_equal_lesions_have_equal_json():
    told = {"finding_birads": 4, "subtlety": 3, "clock": 2, "orientation": 0}
    lesion = Lesion(finding_birads=4.0, subtlety=3.0, clock=2.0, orientation=-0.0)
    assert json.dumps(lesion.to_json()) == json.dumps(Lesion(**told).to_json())
    assert Lesion.from_json(lesion.to_json()) == lesion
    assert lesion_id(lesion) == lesion_id(Lesion(**told))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"orientation": "30"}, "orientation is '30'; expected degrees"),
        ({"nipple_distance": True}, "nipple_distance is True; expected mm"),
        ({"axes": 3}, "axes is 3; expected three lengths"),
        ({"axes": (2, "1", 1)}, r"axes is \[2, '1', 1\]; expected three lengths"),
        ({"clock": "3"}, "clock is '3'; expected a whole number"),
        ({"subtlety": True}, "subtlety is True; expected a whole number"),
        ({"finding_birads": 3.5}, "finding_birads is 3.5; expected a whole number"),
    ],
)
def test_values_of_another_type(values, sentence):
    with pytest.raises(GBCIError, match=sentence):
        Lesion(**values)

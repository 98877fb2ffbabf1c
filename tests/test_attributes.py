"""The vocabulary: VinDr's spellings in, exact tokens out, everything else refused by name."""

import json

import pytest

from gbci_fast.attributes import CONDITIONED, FINDING_CATEGORIES, Attributes, is_unknown, parse_categories
from gbci_fast.errors import GBCIError
from gbci_fast.model.conditioning import CATEGORICAL, FIRST_ATTRIBUTES

FULL = Attributes(
    laterality="L",
    view_position="MLO",
    breast_density="C",
    breast_birads=4,
    finding_categories=("Mass", "Suspicious Calcification"),
    finding_birads=5,
    age=61.5,
    pixel_spacing=0.35,
)


def test_reads_vindr_rows():
    row = {
        "laterality": "L",
        "view_position": "MLO",
        "breast_density": "DENSITY C",
        "breast_birads": "BI-RADS 4",
        "finding_categories": "['Suspicious Calcification', 'Mass']",
        "finding_birads": "BI-RADS 5",
        "age": "61.5",
        "pixel_spacing": "0.35",
    }
    assert Attributes.from_mapping(row) == FULL


def test_reads_plain_values():
    row = {
        "laterality": "l",
        "view_position": " mlo ",
        "breast_density": "C",
        "breast_birads": 4,
        "finding_categories": ["Mass", "Suspicious Calcification"],
        "finding_birads": 5.0,
        "age": 61.5,
        "pixel_spacing": 0.35,
    }
    assert Attributes.from_mapping(row) == FULL


@pytest.mark.parametrize("blank", [None, "", "  ", float("nan"), "nan", "None", "unknown"])
def test_blanks_are_unknown(blank):
    assert is_unknown(blank)
    assert Attributes.from_mapping(dict.fromkeys(vars(FULL), blank)) == Attributes()


@pytest.mark.parametrize(
    "known", [FULL, Attributes(), Attributes(finding_categories=())], ids=["full", "none", "healthy"]
)
def test_mappings_survive_json(known):
    stored = json.loads(json.dumps(known.to_mapping()))
    assert Attributes.from_mapping(stored) == known


def test_only_known_values_are_stored():
    assert Attributes(age=50.0, finding_categories=()).to_mapping() == {"age": 50.0, "finding_categories": []}


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ("['No Finding']", ()),
        (["No Finding"], ()),
        ("No Finding", ()),
        ([], ()),
        ("Mass", ("Mass",)),
        ("Asymmetry, Mass", ("Mass", "Asymmetry")),
        ({"Nipple Retraction"}, ("Nipple Retraction",)),
        (["Mass", "Mass"], ("Mass",)),
        (None, None),
    ],
)
def test_categories(value, parsed):
    assert parse_categories("finding_categories", value) == parsed


NAMES = ", ".join(FINDING_CATEGORIES)
REFUSED = {
    "key": (
        {"density": "C"},
        f"attribute 'density' is not known; expected one of {', '.join(vars(FULL))}",
    ),
    "side": ({"laterality": "LEFT"}, "laterality is 'LEFT'; expected one of L, R"),
    "view": ({"view_position": "ML"}, "view_position is 'ML'; expected one of CC, MLO"),
    "density": ({"breast_density": "DENSITY E"}, "breast_density is 'E'; expected one of A, B, C, D"),
    "birads-0": ({"breast_birads": "BI-RADS 0"}, "breast_birads is 0; expected one of 1, 2, 3, 4, 5"),
    "birads-4a": (
        {"finding_birads": "BI-RADS 4a"},
        "finding_birads is 'BI-RADS 4a'; expected a BI-RADS category such as 'BI-RADS 4'",
    ),
    "category": ({"finding_categories": ["mass"]}, f"finding_categories is 'mass'; expected one of {NAMES}"),
    "broken-list": (
        {"finding_categories": "['Mass'"},
        "finding_categories is \"['Mass'\"; expected a list such as ['Mass']",
    ),
    "number": (
        {"finding_categories": 4},
        "finding_categories is 4; expected a list of category names such as ['Mass']",
    ),
    "both": (
        {"finding_categories": ["No Finding", "Mass"]},
        "finding_categories is ['No Finding', 'Mass']; 'No Finding' cannot stand beside a finding",
    ),
    "age": ({"age": 130}, "age is 130.0; expected years from 0 to 120"),
    "age-text": ({"age": "61Y"}, "age is '61Y'; expected a number"),
    "spacing": ({"pixel_spacing": 70}, "pixel_spacing is 70.0; expected mm per pixel from 0.01 to 10"),
    "no-mapping": ("Mass", "attributes hold 'Mass'; expected Attributes or a mapping"),
}


@pytest.mark.parametrize(("mapping", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(mapping, sentence):
    with pytest.raises(GBCIError) as raised:
        Attributes.from_mapping(mapping)
    assert str(raised.value) == sentence


def test_values_are_checked_without_a_mapping_too():
    with pytest.raises(GBCIError, match=r"^breast_density is 'E'"):
        Attributes(breast_density="E")
    with pytest.raises(GBCIError, match=r"^age is nan"):
        Attributes(age=float("nan"))


def test_order_and_spelling_are_the_checkpoints():
    """Rows of trained embedding tables: appending is fine, moving or renaming is not."""
    assert FINDING_CATEGORIES == (
        "Mass", "Suspicious Calcification", "Focal Asymmetry", "Architectural Distortion", "Asymmetry",
        "Skin Thickening", "Suspicious Lymph Node", "Nipple Retraction", "Global Asymmetry", "Skin Retraction",
    )  # fmt: skip
    assert CATEGORICAL == {
        "laterality": ("L", "R"),
        "view_position": ("CC", "MLO"),
        "breast_density": ("A", "B", "C", "D"),
        "breast_birads": (1, 2, 3, 4, 5),
        "finding_birads": (1, 2, 3, 4, 5),
        "shape": ("round", "oval", "lobulated", "irregular"),
        "margin": ("circumscribed", "obscured", "microlobulated", "indistinct", "spiculated"),
        "pathology": ("benign", "malignant"),
        "subtlety": (1, 2, 3, 4, 5),
    }
    assert FIRST_ATTRIBUTES == (
        "laterality", "view_position", "breast_density", "breast_birads", "finding_birads", "finding_categories", "age",
        "pixel_spacing",
    )  # fmt: skip
    assert set(CONDITIONED) == set(vars(Attributes()))

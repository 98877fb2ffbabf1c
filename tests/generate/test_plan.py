"""Plans: what depends on what, and descriptions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gbci_fast.attributes import Attributes
from gbci_fast.data.vindr import Finding, ImageRecord
from gbci_fast.errors import GBCIError
from gbci_fast.generate.mask_sources import FileMask
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.priors import POOLED, load_priors

BREAST = Attributes(laterality="L", view_position="CC", breast_density="C", breast_birads=2)
MASS = Attributes(breast_density="C", breast_birads=3, finding_categories=("Mass",), finding_birads=3)


def record(name="a", study="s", findings=(), **changes):
    values = {"study_id": study, "image_id": name, "path": Path(f"{name}.dcm"), "attributes": BREAST, **changes}
    return ImageRecord(findings=tuple(findings), **values)


def test_every_record_in_every_variant():
    plan = make_plan([record("a"), record("b")], variants=3, seed=0)
    assert [(item.index, item.template.image_id, item.variant) for item in plan] == [
        (0, "a", 0), (1, "a", 1), (2, "a", 2), (3, "b", 0), (4, "b", 1), (5, "b", 2),
    ]  # fmt: skip
    assert len({item.image_id for item in plan}) == len({item.seed for item in plan}) == 6
    assert all(0 <= item.seed < 2**63 for item in plan)
    assert {item.mask_source for item in plan} == {"auto"}


def test_noise_depends_on_job_seed_and_index_alone():
    seeds = [item.seed for item in make_plan([record("a"), record("b")], variants=2, seed=5)]
    other_inputs = make_plan([record("x", findings=[Finding(box=(1, 2, 3, 4), attributes=MASS)])], variants=4, seed=5,
                             mask="annotations", overrides={"breast_density": "A"}, report="text")  # fmt: skip
    assert [item.seed for item in other_inputs] == seeds
    assert not set(seeds) & {item.seed for item in make_plan([record("a"), record("b")], variants=2, seed=6)}


def test_views_of_a_study_share_the_synthetic_study_of_their_variant():
    plan = make_plan([record("a"), record("b"), record("c", study="t")], variants=2, seed=0)
    a0, a1, b0, b1, c0, _ = (item.study_id for item in plan)
    assert (a0, a1) == (b0, b1)
    assert len({a0, a1, c0}) == 3


def test_the_default_lesion_grades_its_breast():
    (item,) = make_plan([record()], variants=1, seed=0)
    # View and side wait for the opened file.
    assert item.attributes == Attributes(
        breast_density="C", breast_birads=4, finding_categories=("Mass",), finding_birads=4
    )
    (worse,) = make_plan([record(attributes=Attributes(breast_birads=5))], variants=1, seed=0)
    assert worse.attributes.breast_birads == 5


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"finding_birads": "5"}, {"finding_birads": 5, "breast_birads": 5}),
        ({"finding_birads": "3", "breast_birads": "2"}, {"finding_birads": 3, "breast_birads": 2}),
        ({"finding_categories": "No Finding"}, {"finding_categories": (), "finding_birads": None, "breast_birads": 2}),
        ({"finding_categories": "unknown"}, {"finding_categories": None, "finding_birads": 4}),
        ({"breast_density": "unknown"}, {"breast_density": None}),
        ({"view_position": "MLO", "laterality": "R"}, {"view_position": "MLO", "laterality": "R"}),
        ({"finding_categories": "Asymmetry,Mass"}, {"finding_categories": ("Mass", "Asymmetry")}),
        (
            {"margin": "Spiculated", "shape": "irregular", "pathology": "malignant", "subtlety": "3"},
            {"margin": "spiculated", "shape": "irregular", "pathology": "malignant", "subtlety": 3},
        ),
    ],
)
def test_overrides(overrides, expected):
    (item,) = make_plan([record()], variants=1, seed=0, overrides=overrides)
    assert {name: getattr(item.attributes, name) for name in expected} == expected


def test_annotations_take_the_boxes_in_turn_and_leave_out_images_without():
    first = Finding(box=(1, 2, 3, 4), attributes=MASS, extra={"report": "round mass"})
    second = Finding(box=(5, 6, 7, 8), attributes=Attributes(finding_categories=("Asymmetry",)))
    records = [record("a", findings=[first, second], extra={"report": "whole image"}), record("b")]
    plan = make_plan(records, variants=3, seed=0, mask="annotations")
    assert [item.mask.box for item in plan] == [(1, 2, 3, 4), (5, 6, 7, 8), (1, 2, 3, 4)]
    assert [item.report for item in plan] == ["round mass", "whole image", "round mass"]
    assert {item.mask_source for item in plan} == {"annotations"}
    assert plan[0].attributes == MASS
    assert plan[1].attributes.finding_categories == ("Asymmetry",)
    assert [item.report for item in make_plan(records, variants=1, seed=0, mask="annotations", report="x")] == ["x"]


@pytest.mark.parametrize(
    ("overrides", "others", "expected"),
    [
        ({}, (), 5),
        ({"finding_birads": 3}, (), 3),
        ({"finding_birads": 3}, (4, None), 4),
        ({"finding_birads": 3}, (5,), 5),
        ({"finding_categories": "No Finding"}, (), None),
        ({"finding_categories": "No Finding"}, (2,), 2),
        ({"finding_birads": 3, "breast_birads": 4}, (), 4),
    ],
)
def test_a_breast_is_not_graded_by_what_was_painted_over(overrides, others, expected):
    def finding(grade):
        attributes = Attributes(breast_birads=5, finding_categories=("Mass",), finding_birads=grade)
        return Finding(box=(1, 2, 3, 4), attributes=attributes)

    breast = record(findings=[finding(5), *map(finding, others)], attributes=Attributes(breast_birads=5))
    (item,) = make_plan([breast], variants=1, seed=0, mask="annotations", overrides=overrides)
    assert item.attributes.breast_birads == expected


def test_a_breast_that_is_graded_by_more_than_its_finding_stays_so():
    breast = record(findings=[Finding(box=(1, 2, 3, 4), attributes=MASS)], attributes=Attributes(breast_birads=5))
    (item,) = make_plan([breast], variants=1, seed=0, mask="annotations")
    assert item.attributes.breast_birads == 5


def test_images_of_other_descriptions_have_other_ids_and_the_same_noise():
    plans = [
        make_plan([record()], variants=1, seed=0, **options)
        for options in ({}, {"overrides": {"finding_birads": 5}}, {"report": "round"})
    ]
    assert len({plan[0].image_id for plan in plans}) == 3
    assert len({plan[0].seed for plan in plans}) == 1


def test_no_annotation_at_all():
    with pytest.raises(GBCIError, match="no input has an annotated box"):
        make_plan([record()], variants=1, seed=0, mask="annotations")


@pytest.mark.parametrize("variants", [0, -1])
def test_no_variant(variants):
    with pytest.raises(GBCIError, match=f"variants is {variants}; expected at least 1"):
        make_plan([record()], variants=variants, seed=0)


def test_an_annotation_keeps_its_form_and_its_report_until_another_is_set():
    known = replace(MASS, shape="oval", margin="obscured", pathology="benign", subtlety=4)
    finding = Finding(box=(1, 2, 3, 4), attributes=known, extra={"report": "oval mass with obscured margins"})

    def told(**overrides):
        (item,) = make_plan([record(findings=[finding])], variants=1, seed=0, mask="annotations", overrides=overrides)
        return item.attributes, item.report

    attributes, report = told(finding_birads="5", pathology="malignant", margin="obscured")
    assert (attributes.shape, attributes.margin, attributes.pathology, attributes.subtlety) == (
        "oval", "obscured", "malignant", 4,
    )  # fmt: skip
    assert report == "oval mass with obscured margins"
    # The text would contradict what was set.
    for overrides in ({"margin": "spiculated"}, {"shape": "round"}, {"finding_categories": "Mass,Asymmetry"}):
        assert told(**overrides)[1] is None
    assert told(margin="unknown")[0].margin is None
    # A calcification has no shape, healthy tissue no pathology either.
    attributes, report = told(finding_categories="Suspicious Calcification")
    assert (attributes.shape, attributes.margin, attributes.pathology, report) == (None, None, "benign", None)
    attributes, report = told(finding_categories="No Finding")
    assert (attributes.finding_birads, attributes.shape, attributes.pathology, attributes.subtlety) == (None,) * 4
    assert report is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"finding_categories": "No Finding", "margin": "obscured"}, "margin is 'obscured' beside 'No Finding'"),
        ({"finding_categories": "No Finding", "shape": "oval"}, "shape is 'oval' beside 'No Finding'; expected none"),
        ({"finding_categories": "No Finding", "pathology": "benign"}, "pathology is 'benign' beside 'No Finding'"),
        ({"finding_categories": "No Finding", "subtlety": "3"}, "subtlety is 3 beside 'No Finding'; expected none"),
        ({"finding_categories": "Asymmetry", "margin": "obscured"}, "margin is 'obscured' beside Asymmetry; expected"),
        ({"margin": "rough"}, "margin is 'rough'; expected one of circumscribed, obscured, microlobulated, indistinct"),
        ({"subtlety": "6"}, "subtlety is '6'; expected a whole number from 1 to 5"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, sentence):
    with pytest.raises(GBCIError, match=sentence):
        make_plan([record()], variants=1, seed=0, overrides=overrides)


def test_no_finding_has_no_birads():
    with pytest.raises(GBCIError, match="finding_birads is 4 beside 'No Finding'; expected none"):
        make_plan([record()], variants=1, seed=0, overrides={"finding_categories": "No Finding", "finding_birads": 4})


def test_unknown_attribute():
    with pytest.raises(GBCIError, match="attribute 'colour' is not known"):
        make_plan([record()], variants=1, seed=0, overrides={"colour": "gray"})


def test_a_mask_file_holds_for_every_record(tmp_path):
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "mask.png")
    plan = make_plan([record("a"), record("b")], variants=2, seed=0, mask=str(tmp_path / "mask.png"))
    assert {item.mask_source for item in plan} == {"file"}
    assert {item.mask for item in plan} == {FileMask.of(tmp_path / "mask.png")}
    with pytest.raises(GBCIError, match=r"absent.png cannot be read as a mask image"):
        make_plan([record()], variants=1, seed=0, mask=str(tmp_path / "absent.png"))


def test_an_automatic_mask_has_the_prior_of_its_category():
    priors = load_priors()
    for categories, expected in (
        ("Asymmetry", "Asymmetry"),
        ("Nipple Retraction, Mass", "Mass"),
        ("Nipple Retraction", "Nipple Retraction"),
        ("No Finding", POOLED),
    ):
        (item,) = make_plan([record()], variants=1, seed=0, overrides={"finding_categories": categories}, priors=priors)
        assert item.mask.prior.category == expected

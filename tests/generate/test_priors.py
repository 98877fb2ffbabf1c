"""Lesion priors: a known distribution is found again, small categories are shrunk, files are checked."""

import csv
import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest

from gbci_fast.attributes import FINDING_CATEGORIES
from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.generate import prior_fit
from gbci_fast.generate.prior_fit import Observation, Sample, counted_categories, fit_priors
from gbci_fast.generate.priors import PACKAGED, LogNormal, load_priors


@pytest.fixture(scope="module")
def priors():
    return load_priors()


def observations(
    count, categories=("Mass",), *, diameter=20.0, aspect=1.0, place=(0.3, 0.6), seed=0, birads=4, **described
):
    """Boxes around these values, in both views."""
    rng = np.random.default_rng(seed)
    return [
        Observation(
            categories=categories,
            source="real",
            view="CC" if i % 2 else "MLO",
            diameter=diameter * math.exp(0.4 * rng.standard_normal()),
            aspect=aspect * math.exp(0.2 * rng.standard_normal()),
            diameter_mm=None,
            place=tuple(np.clip(place + 0.05 * rng.standard_normal(2), 0, 1)),
            birads=birads,
            **described,
        )
        for i in range(count)
    ]


@pytest.fixture
def fit(monkeypatch):
    """`fit(main, fallback)`: priors of observations in 1,000 images each, whose tissue is even."""

    def run(main, fallback=()):
        samples = {"main": main, "fallback": fallback}

        def observe(records, only=None, on_image=None):
            boxes = list(samples[records[0]]) if records else []
            found = [each for each in boxes if only is None or only & set(each.categories)]
            tissue = {view: np.ones((8, 8)) for view in ("CC", "MLO")}
            images = Counter({boxes[0].source: 1000}) if boxes else Counter()
            return Sample(observations=found, tissue=tissue, images=images, boxes=len(boxes))

        monkeypatch.setattr(prior_fit, "observe", observe)
        monkeypatch.setattr(prior_fit, "_records", lambda root, split: [root])
        return fit_priors(["main"], ["fallback"] if fallback else [])

    return run


def test_a_known_distribution_is_found_again(fit):
    prior = fit(observations(2000, aspect=1.3)).of(("Mass",))
    assert prior.boxes == {"real": 2000}
    assert prior.diameter.median == pytest.approx(20, rel=0.03)
    assert prior.diameter.log_sd == pytest.approx(0.4, rel=0.08)
    assert math.log(prior.diameter.high / 20) == pytest.approx(2.05 * 0.4, rel=0.1)
    assert prior.aspect.median == pytest.approx(1.3, rel=0.02)
    assert prior.birads == {2: 0, 3: 0, 4: 1, 5: 0}
    assert prior.frequency == 1
    for grid in prior.position.values():  # row = height, column = depth
        assert np.unravel_index(grid.argmax(), grid.shape) == (2, 4)
        assert grid[6, 1] < 0.2


def test_a_small_category_is_shrunk_toward_all(fit):
    """20 boxes, of twice the size and elsewhere: half their own."""
    few = observations(20, ("Asymmetry",), diameter=40, place=(0.8, 0.2), birads=3, seed=1)
    priors = fit([*observations(5000), *few])
    prior, alone = priors.of(("Asymmetry",)), prior_fit._Figures.of(few, {v: np.ones((8, 8)) for v in ("CC", "MLO")})
    assert prior.own_weight == 0.5
    own = math.exp(alone.diameter[0])
    assert prior.diameter.median == pytest.approx(math.sqrt(own * priors.pooled.diameter.median), rel=1e-3)
    assert prior.birads[3] == pytest.approx(0.5, abs=0.01)
    # Each view holds ten of them, so a third of its map.
    third = (alone.position["CC"] + 2 * priors.pooled.position["CC"]) / 3
    np.testing.assert_allclose(prior.position["CC"], third, atol=0.02)
    # But nothing says that a nipple lies where masses do.
    nipples = fit(
        [*observations(5000), *(dataclasses.replace(each, categories=("Nipple Retraction",)) for each in few)]
    )
    np.testing.assert_allclose(nipples.of(("Nipple Retraction",)).position["CC"], alone.position["CC"], atol=0.02)
    # A category without a box is all categories together.
    empty = priors.of(("Skin Thickening",))
    assert (empty.boxes, empty.own_weight, empty.frequency) == ({}, 0, 0)
    assert empty.diameter == priors.pooled.diameter


def test_a_fallback_serves_scarce_categories_alone(fit):
    main = [*observations(100), *observations(10, ("Asymmetry",), diameter=30, seed=1)]
    other = [
        dataclasses.replace(each, source="phantom")
        for each in [*observations(50, diameter=60, seed=2), *observations(70, ("Asymmetry",), diameter=30, seed=3)]
    ]
    priors = fit(main, other)
    assert priors.of(("Mass",)).boxes == {"real": 100}
    assert priors.of(("Asymmetry",)).boxes == {"phantom": 70, "real": 10}
    assert priors.of(("Asymmetry",)).frequency == pytest.approx(10 / 110 + 70 / 120, abs=1e-4)
    assert priors.pooled.boxes == {"real": 110}
    assert priors.sources == {"real": {"images": 1000, "boxes": 110}, "phantom": {"images": 1000, "boxes": 70}}


def told(count, pathology, shape, margin, birads=4, source="real"):
    boxes = observations(count, birads=birads, pathology=pathology, shape=shape, margin=margin)
    return [dataclasses.replace(each, source=source) for each in boxes]


MASSES = [
    *told(60, "benign", "oval", "circumscribed", 3),
    *told(20, "benign", "round", "circumscribed", 3),
    *told(80, "malignant", "irregular", "spiculated", 5),
    *told(20, "malignant", "irregular", "indistinct", 4),
]


def test_pathology_and_forms_of_masses(fit):
    masses = fit(MASSES).masses
    assert masses.boxes == {"real": 180}
    assert masses.malignant == {2: 0.5, 3: 0.006173, 4: 0.9762, 5: 0.9938}  # (n + 1/2) / (N + 1)
    for forms in masses.forms.values():
        for form in forms.values():
            assert form.sum() == pytest.approx(1, abs=1e-3)
            assert form.min() > 0
    benign, malignant = masses.forms["benign"], masses.forms["malignant"]
    # (60 + 20 * own) / 100, where own = (60 + 20 * pooled) / 100 and pooled = 60.025 / 180.5
    assert benign[3][1, 0] == pytest.approx(0.7333, abs=1e-4)
    assert malignant[5][3, 4] == pytest.approx((80 + 20 * (80 + 20 * 80.025 / 180.5) / 120) / 100, abs=1e-4)
    # A grade without boxes has the pathology's forms.
    np.testing.assert_allclose(benign[5][1, 0], (60 + 20 * 60.025 / 180.5) / 100, rtol=1e-3)


def test_half_a_form_counts_in_proportion(fit):
    """40 spiculated masses of unknown shape are shared out as the others are: all irregular."""
    without = told(40, "malignant", None, "spiculated", 5)
    form = fit([*MASSES, *without]).masses.forms["malignant"][5]
    assert form[3, 4] > fit(MASSES).masses.forms["malignant"][5][3, 4]
    nothing = told(500, "malignant", None, None, 5)
    np.testing.assert_array_equal(
        fit([*MASSES, *nothing]).masses.forms["malignant"][5], fit(MASSES).masses.forms["malignant"][5]
    )


def test_a_source_of_one_pathology_tells_nothing_of_it(fit):
    selected = told(300, "malignant", "round", "obscured", 3, source="selected")
    with_selected, without = fit([*MASSES, *selected]).masses, fit(MASSES).masses
    assert with_selected.to_json() == without.to_json()


def test_too_few_forms_are_none(fit):
    priors = fit(MASSES[:29])
    assert priors.masses is None
    assert priors.to_json()["format"] == "gbci_fast lesion priors 1"
    assert "masses" not in priors.to_json()


@pytest.mark.parametrize(
    ("labels", "counted"),
    [
        (("Mass", "Asymmetry"), ("Mass", "Asymmetry")),
        (("Mass", "Nipple Retraction"), ("Mass",)),
        (("Skin Thickening", "Nipple Retraction"), ("Skin Thickening", "Nipple Retraction")),
        (None, ()),
    ],
)
def test_a_box_around_a_mass_is_no_box_around_the_nipple(labels, counted):
    assert counted_categories(labels) == counted


def test_no_box_at_all(fit):
    with pytest.raises(GBCIError, match="no annotated box in the training split of main; nothing to fit"):
        fit([])


def test_draws_follow_a_cut_log_normal():
    rng, size = np.random.default_rng(0), LogNormal(median=20, log_sd=0.4, low=10, high=50)
    draws = np.array([size.draw(rng) for _ in range(4000)])
    assert draws.min() >= 10
    assert draws.max() <= 50
    assert np.median(draws) == pytest.approx(20, rel=0.04)
    assert np.std(np.log(draws)) == pytest.approx(0.36, rel=0.08)  # 0.4, cut at 1.7 and 2.3 deviations
    limited = [size.draw(rng, (30, 40)) for _ in range(200)]
    assert (min(limited) >= 30, max(limited) <= 40, np.ptp(limited) > 5) == (True, True, True)
    assert (size.draw(rng, (60, 70)), size.draw(rng, (1, 2))) == (60, 2)


def test_the_command_reads_boxes_in_model_space(tmp_path, capsys):
    """Two phantoms: their boxes, in pixels of the whole-breast view and in mm."""
    assert main(["phantom", "--output", str(tmp_path / "phantom"), "--studies", "2", "--size", "160x128"]) == 0
    arguments = ["priors", str(tmp_path / "phantom"), "--split", "training", "--note", "CC0", "--output"]
    assert main([*arguments, str(tmp_path / "a.json")]) == main([*arguments, str(tmp_path / "b.json")]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    priors = load_priors(tmp_path / "a.json")
    with (tmp_path / "phantom" / "finding_annotations.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "training" and row["xmin"]]
    boxes = np.array([[float(row[name]) for name in ("xmin", "ymin", "xmax", "ymax", "spacing_mm")] for row in rows])
    native = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    assert priors.pooled.boxes == {"phantom": len(rows)}
    assert priors.pooled.diameter_mm["median"] == pytest.approx(np.median(native * boxes[:, 4]), rel=0.03)
    # A breast fills the 224 pixels of the model, and at most the 160 of the image.
    assert priors.pooled.diameter.median > np.median(native) * 1.2
    assert priors.notes[-1] == "CC0"
    assert capsys.readouterr().out.endswith(f"priors of {len(rows)} boxes: {tmp_path / 'b.json'}\n")
    assert main([*arguments, str(tmp_path)]) == 1
    assert f"{tmp_path} is a folder; expected the name of a JSON file" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "c.json"), "--split", "half"]) == 1
    assert "split is 'half'; expected one of training, test" in capsys.readouterr().err


def test_the_packaged_priors_tell_their_sources(priors):
    assert set(priors.categories) == set(FINDING_CATEGORIES)
    assert priors.of(("Mass",)).boxes["CBIS-DDSM"] > 1000
    for prior in priors.categories.values():
        real = sum(count for source, count in prior.boxes.items() if source != "phantom")
        assert real >= 30 or "phantom" in prior.boxes
    notes = " ".join(priors.notes)
    for attribution in ("CBIS-DDSM", "CC BY 3.0", "CDD-CESM", "CC BY 4.0", "10.7937/K9/TCIA.2016.7O02S9CY"):
        assert attribution in notes


def test_saving_what_was_loaded_changes_nothing(priors, tmp_path):
    priors.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == PACKAGED.read_bytes()
    assert load_priors(tmp_path / "again.json").digest == priors.digest


def test_files_of_format_1_load_and_keep_their_digest(priors, tmp_path):
    """Its categories are those of the first packaged file, so that jobs with automatic masks keep their ids."""
    content = json.loads(PACKAGED.read_text())
    content["format"] = "gbci_fast lesion priors 1"
    del content["masses"], content["notes"][1]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = load_priors(tmp_path / "old.json")
    assert old.masses is None
    assert old.digest == "fc786003f7d4800f14eaec7bd2ae0f489bae8ed12c9cd497a16b6224711adc8b"
    assert {name: prior.digest for name, prior in old.categories.items()} == {
        name: prior.digest for name, prior in priors.categories.items()
    }


def test_the_packaged_masses(priors):
    assert priors.masses.boxes == {"CBIS-DDSM": 1170}
    assert list(priors.masses.malignant.values()) == sorted(priors.masses.malignant.values())
    benign, malignant = (priors.masses.forms[name][4] for name in ("benign", "malignant"))
    assert malignant[:, 4].sum() > 5 * benign[:, 4].sum()  # spiculated
    assert benign[:, 0].sum() > 4 * malignant[:, 0].sum()  # circumscribed


def test_the_digest_is_of_the_content(priors, tmp_path):
    content = json.loads(PACKAGED.read_text())
    (tmp_path / "flat.json").write_text(json.dumps(content))
    assert load_priors(tmp_path / "flat.json").digest == priors.digest
    content["categories"]["Mass"]["diameter"]["median"] += 0.5
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert load_priors(tmp_path / "other.json").digest != priors.digest


def at(*path):
    """Replaces, or with ... deletes, the value at a path of keys."""

    def change(content, value):
        for key in path[:-1]:
            content = content[key]
        if value is ...:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


def mass(*path):
    return at("categories", "Mass", *path)


BAD = {
    "format": (at("format"), "other 7", "format is 'other 7'; expected 'gbci_fast lesion priors 2'"),
    "category": (at("categories", "Mass"), ..., "; expected the field Mass"),
    "unknown category": (at("categories", "Lump"), {}, "; expected no field Lump"),
    "entry": (at("categories", "Mass"), 3, "categories.Mass is 3; expected object, got int"),
    "missing": (mass("diameter"), ..., "; expected the field diameter"),
    "text": (
        mass("diameter", "median"),
        "big",
        'Mass.diameter.median is "big"; expected number, got str',
    ),
    "negative": (
        mass("diameter", "median"),
        -3,
        "Mass.diameter.median is -3; expected number >= 1e-06",
    ),
    "nan": (
        mass("aspect", "log_sd"),
        math.nan,
        "Mass.aspect.log_sd is NaN; expected float >= 1e-06",
    ),
    "order": (mass("diameter", "low"), 1e3, "expected low <= median <= high"),
    "rows": (
        mass("position", "CC"),
        [[1.0]],
        "Mass.position.CC is [[1.0]]; expected array of length >= 8",
    ),
    "cell": (
        mass("position", "CC", 2, 3),
        0,
        "Mass.position.CC[2][3] is 0; expected number >= 1e-06",
    ),
    "view": (mass("position", "MLO"), ..., 'Mass.position is ["CC"]; expected the field MLO'),
    "shares": (mass("birads", "4"), 1, "expected shares that add up to 1"),
    "counts": (mass("boxes"), {"x": 1.5}, 'Mass.boxes is {"x": 1.5}; expected int, got float'),
    "masses": (at("masses"), ..., "; expected the field masses"),
    "malignant": (at("masses", "malignant", "3"), 1.5, "masses.malignant.3 is 1.5; expected float <= 1.0"),
    "form": (at("masses", "forms", "benign", "4", "oval"), [1], "benign.4.oval is [1]; expected array of length >= 5"),
    "forms": (at("masses", "forms", "benign", "4", "oval"), [1, 0, 0, 0, 0], "expected shares that add up to 1"),
    "unknown shape": (at("masses", "forms", "benign", "4", "square"), [], "; expected no field square"),
    "notes": (at("notes"), "text", 'notes is "text"; expected array, got str'),
    "shrinkage": (at("shrinkage"), True, "shrinkage is true; expected number, got bool"),
}


@pytest.mark.parametrize(("change", "value", "sentence"), BAD.values(), ids=BAD)
def test_bad_priors(tmp_path, change, value, sentence):
    content = json.loads(PACKAGED.read_text())
    change(content, value)
    (tmp_path / "priors.json").write_text(json.dumps(content))
    with pytest.raises(GBCIError) as error:
        load_priors(tmp_path / "priors.json")
    assert str(error.value).startswith(f"{tmp_path / 'priors.json'}: ")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist; expected lesion priors as gbci-fast priors writes them"),
        ("no JSON", "cannot be read as lesion priors: Expecting value"),
        ("[1]", "format is '[1]'; expected"),
        ("[" * 100_000, "cannot be read as lesion priors"),
    ],
)
def test_no_priors(tmp_path, text, sentence):
    path = tmp_path / "priors.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GBCIError) as error:
        load_priors(path)
    assert sentence in str(error.value)


def test_a_whole_number_stays_one(tmp_path):
    """The digest tells jobs apart: files that were edited by hand keep theirs."""
    content = json.loads(PACKAGED.read_text())
    content["shrinkage"] = 20
    (tmp_path / "priors.json").write_text(json.dumps(content))
    priors = load_priors(tmp_path / "priors.json")
    assert type(priors.shrinkage) is int
    assert priors.digest != load_priors().digest
    assert priors.to_json()["shrinkage"] == 20

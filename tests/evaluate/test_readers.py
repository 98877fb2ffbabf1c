"""Readers: what they see, their truths, their folder, and the packaged ones."""

import json

import msgspec
import numpy as np
import pytest

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.backbone import MIDDLE_WIDTH, open_lite0
from gbci_fast.evaluate.readers import (
    CROPS,
    LEAST_AUC,
    PACKAGED_READERS,
    SIDE,
    TASKS,
    WINDOW,
    Interval,
    LinearMap,
    Readers,
    ReadersConfig,
    Record,
    describe,
    features_of,
    load_readers,
    see,
    truth,
    truths,
)

RECORD = Record(
    trained={"set": (30, 20)},
    judged={"set": (9, 8)},
    components=10,
    regularization=0.1,
    cross_validated=0.8,
    auc=Interval(value=0.8, low=0.7, high=0.9),
    size_auc=Interval(value=0.6, low=0.5, high=0.7),
    matched_auc=Interval(value=0.75, low=0.6, high=0.85),
    by_set={"set": Interval(value=0.8, low=0.7, high=0.9)},
)


@pytest.fixture
def readers():
    """Readers of `margin` and `size` with random maps."""
    config = ReadersConfig(
        median_diameter=15.0,
        backbone=open_lite0().digest,
        data="d",
        folds="A",
        split="training",
        tasks={"margin": RECORD, "size": RECORD},
        refused={},
        control={},
    )
    rng = np.random.default_rng(0)
    maps = {
        "margin": LinearMap(weight=rng.normal(size=len(CROPS) * MIDDLE_WIDTH).astype(np.float32), bias=0.5),
        "size": LinearMap(weight=rng.normal(size=MIDDLE_WIDTH).astype(np.float32), bias=-0.5),
    }
    return Readers(config, maps)


class TestSeeing:
    def test_crops_follow_the_lesion_and_the_window_does_not(self, square):
        small, large = (see(case, case.pixels) > 0.5 for case in (square(side=10), square(side=20)))
        assert small.shape == (len(CROPS) + 1, SIDE, SIDE)
        assert small.mean((1, 2))[:2] == pytest.approx(large.mean((1, 2))[:2], abs=0.01)
        assert small.mean((1, 2))[:2] == pytest.approx(1 / np.square(CROPS), rel=0.05)
        for side, seen in ((10, small), (20, large)):
            assert seen.mean((1, 2))[2] == pytest.approx((side / WINDOW) ** 2, rel=0.15)

    def test_the_mask_does_not_decide(self, square):
        """A mask grown more or less is no different crop, so that real and painted images are cut alike."""
        case = square(side=20)
        other = square(side=20, mask=np.ones_like(case.mask))
        np.testing.assert_array_equal(see(case, case.pixels), see(other, case.pixels))

    def test_brightness_and_contrast_are_not_seen(self, square):
        case = square(side=20)
        image = np.random.default_rng(0).random((96, 96), np.float32)
        np.testing.assert_allclose(see(case, 0.2 + 0.3 * image), see(case, image), atol=1e-5)

    def test_a_flat_image_stays_flat(self, square):
        case = square(side=10)
        assert see(case, np.full((96, 96), 0.4, np.float32))[0].max() < 1e-3


class TestReading:
    def test_logits_are_the_same_again_and_in_any_batch(self, readers, square):
        rng = np.random.default_rng(0)
        cases = [square(side=10 + i) for i in range(9)]  # more than a batch
        images = [rng.random((96, 96), np.float32) for _ in cases]
        found = readers.read(cases, images)
        assert set(found) == {"margin", "size"}
        assert all(values.shape == (9,) and values.dtype == np.float64 for values in found.values())
        for task, values in readers.read(cases, images).items():
            np.testing.assert_array_equal(values, found[task])
        for task, values in readers.read(cases[8:], images[8:]).items():
            np.testing.assert_allclose(values, found[task][8:], rtol=1e-3, atol=1e-3)

    def test_a_mirror_image_is_read_alike(self, readers, square):
        case = square(top=38, left=38, side=20)
        image = np.random.default_rng(0).random((96, 96), np.float32)
        one, two = readers.read([case, case], [image, image[:, ::-1]]).values()
        assert one[0] == pytest.approx(one[1], abs=1e-3)
        assert two[0] == pytest.approx(two[1], abs=1e-3)

    def test_without_images_the_cases_own_are_read(self, readers, square):
        case = square()
        for task, values in readers.read([case]).items():
            np.testing.assert_array_equal(values, readers.read([case], [case.pixels])[task])

    def test_progress_reaches_the_end(self, square):
        told = []
        features_of([square()], on_progress=lambda *now: told.append(now))
        assert told == [("features", 1, 1)]


class TestFolder:
    def test_saved_readers_come_back(self, readers, square, tmp_path):
        readers.save(tmp_path / "readers")
        loaded = load_readers(tmp_path / "readers")
        assert loaded.config == readers.config
        assert loaded.tasks == ("margin", "size")
        assert loaded.median_diameter == 15.0
        assert len(loaded.digest) == 64
        for task, values in loaded.read([square()]).items():
            np.testing.assert_array_equal(values, readers.read([square()])[task])

    def test_no_readers_are_one_sentence(self, tmp_path):
        with pytest.raises(GBCIError, match=r"has no config.json; expected readers as `gbci-fast train cl"):
            load_readers(tmp_path)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"tasks": {}}, "tasks are empty; expected at least one"),
            ({"surplus": 1}, "unknown field `surplus`"),
            ({"median_diameter": "wide"}, "Expected `float`, got `str`"),
            ({"tasks": {"mood": msgspec.to_builtins(RECORD)}}, "task is 'mood'; expected one of margin, shape"),
            ({"tasks": {"shape": msgspec.to_builtins(RECORD)}}, "shape.weight"),
            (
                {"tasks": {"margin": msgspec.to_builtins(RECORD) | {"auc": {"value": 0.7, "low": 0.59, "high": 0.9}}}},
                "the lower bound of the AUC of margin is 0.59; expected at least 0.6",
            ),
        ],
    )
    def test_damaged_ones_are_one_sentence(self, readers, tmp_path, change, said):
        readers.save(tmp_path / "readers")
        path = tmp_path / "readers" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(GBCIError, match="cannot be loaded as readers: ") as caught:
            load_readers(tmp_path / "readers")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_map_of_another_width_is_refused(self, readers, tmp_path):
        maps = {"margin": LinearMap(weight=np.ones(7, np.float32), bias=0.0), "size": readers._maps["size"]}
        Readers(readers.config, maps).save(tmp_path / "readers")
        with pytest.raises(GBCIError, match=r"as readers: margin.weight has the shape \[7\]; expected \[768\]"):
            load_readers(tmp_path / "readers")

    def test_readers_of_other_features_are_refused(self, readers, tmp_path):
        readers.save(tmp_path / "readers")
        path = tmp_path / "readers" / "config.json"
        path.write_text(path.read_text().replace(open_lite0().digest, "0" * 64))
        with pytest.raises(GBCIError, match="was trained on other weights of EfficientNet-Lite0 than the installed"):
            load_readers(tmp_path / "readers")


class TestPackaged:
    def test_every_one_was_seen_to_read_on_patients_that_it_was_not_trained_on(self):
        readers = load_readers()
        assert (readers.config.folds, readers.config.split) == ("A", "training")
        assert {"margin", "size"} <= set(readers.tasks)
        for task, record in readers.config.tasks.items():
            assert record.auc.low >= LEAST_AUC == 0.60, task
            assert min(map(sum, zip(*record.judged.values(), strict=True))) >= 20, task
        for task, record in readers.config.refused.items():
            assert record.auc.low < LEAST_AUC, task
        assert not set(readers.tasks) & set(readers.config.refused)

    def test_pathology_is_of_film_alone(self):
        """In CDD-CESM every lesion is malignant."""
        config = load_readers().config
        assert set((config.tasks | config.refused)["pathology"].trained) == {"cbis_ddsm"}

    def test_they_are_small_and_have_a_card(self):
        assert sum(path.stat().st_size for path in PACKAGED_READERS.iterdir()) < 200_000
        card = (PACKAGED_READERS / "README.md").read_text(encoding="utf-8")
        for task, record in load_readers().config.tasks.items():
            assert task in card
            assert describe(record.auc) in card


class TestTruths:
    @pytest.mark.parametrize(
        ("task", "told", "expected"),
        [
            ("margin", {"margin": "spiculated"}, True),
            ("margin", {"margin": "circumscribed"}, False),
            ("margin", {"margin": "indistinct"}, None),
            ("shape", {"shape": "irregular"}, True),
            ("shape", {"shape": "oval"}, False),
            ("shape", {"shape": "lobulated"}, None),
            ("birads", {"finding_birads": 5}, True),
            ("birads", {"finding_birads": 3}, False),
            ("birads", {"finding_birads": 4}, None),
            ("pathology", {"pathology": "malignant"}, True),
            ("pathology", {"pathology": "benign"}, False),
        ],
    )
    def test_every_task_has_its_rule(self, task, told, expected):
        assert truth(task, Attributes(**told), 1, 1) is expected
        assert task == "size" or truth(task, Attributes(), 1, 1) is None

    def test_size_is_above_the_median(self):
        assert [truth("size", Attributes(), diameter, 2) for diameter in (2, 2.1)] == [False, True]
        assert set(TASKS) == {"margin", "shape", "birads", "pathology", "size"}

    def test_a_data_set_with_one_answer_teaches_nothing(self, square):
        told = [("one", "malignant"), ("one", "malignant"), ("one", None), ("two", "malignant"), ("two", "benign")]
        cases = [square(root=root, attributes=Attributes(pathology=pathology)) for root, pathology in told]
        np.testing.assert_array_equal(truths(cases, "pathology", 1), [np.nan, np.nan, np.nan, 1, 0])


def test_an_auc_is_described_with_its_interval():
    assert describe(Interval(value=0.812, low=0.75, high=0.871)) == "0.81 (0.75-0.87)"
    assert describe(Interval(value=0.812, low=None, high=None)) == "0.81"
    assert describe(Interval(value=None, low=None, high=None)) == "unknown"

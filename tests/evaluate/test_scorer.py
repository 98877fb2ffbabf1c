"""The scorer: what it sees, its folder, and its truths."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops
from gbci_fast.evaluate.scorer import (
    PACKAGED_SCORER,
    LesionNet,
    Scorer,
    ScorerConfig,
    ScorerFeatures,
    cut_windows,
    label,
    labels,
    load_scorer,
)

CONFIG = ScorerConfig(tasks=("category/Mass", "size", "malignancy"), median_diameter=10.0, channels=(8, 16))


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    return Scorer(LesionNet(CONFIG.tasks, CONFIG.channels), CONFIG)


@pytest.fixture
def crops():
    rng = np.random.default_rng(0)
    masks = np.zeros((3, CROP_SIZE, CROP_SIZE), bool)
    masks[:, 20:44, 16:40] = True
    pixels = rng.random(masks.shape, np.float32)
    return Crops(pixels=pixels, masks=masks, patients=("a", "b", "c"))


class TestPrediction:
    def test_probabilities_by_task_do_not_see_the_background(self, scorer, crops):
        windows = crops.pixels
        found = scorer.predict(crops, windows)
        assert tuple(found) == CONFIG.tasks
        other = replace(crops, pixels=np.where(crops.masks, crops.pixels, 0.9).astype(np.float32))
        for task, values in scorer.predict(other, windows).items():
            assert values.shape == (3,)
            assert ((values > 0) & (values < 1)).all()
            np.testing.assert_array_equal(values, found[task])
        np.testing.assert_array_equal(scorer.features(other), scorer.features(crops))

    def test_size_sees_the_window_alone_and_the_others_the_crop_alone(self, scorer, crops):
        one, two = scorer.predict(crops, crops.pixels), scorer.predict(crops, crops.pixels * 0.5)
        assert (one["size"] != two["size"]).all()
        np.testing.assert_array_equal(one["malignancy"], two["malignancy"])

    def test_a_lesion_is_judged_alike_in_any_batch(self, scorer, crops):
        many = crops[np.arange(3).repeat(40)]
        found = scorer.predict(many, many.pixels)["malignancy"]
        np.testing.assert_allclose(found, scorer.predict(crops, crops.pixels)["malignancy"].repeat(40), atol=1e-6)


class TestFolder:
    def test_a_saved_scorer_comes_back_in_half_precision(self, scorer, crops, tmp_path):
        scorer.save(tmp_path / "scorer")
        loaded = load_scorer(tmp_path / "scorer")
        assert loaded.config == CONFIG
        for task, values in loaded.predict(crops, crops.pixels).items():
            np.testing.assert_allclose(values, scorer.predict(crops, crops.pixels)[task], atol=2e-3)
        features = ScorerFeatures(tmp_path / "scorer")
        assert features.name == "scorer"
        assert len(features.digest) == 64
        assert features(crops).shape == (3, 16)
        assert features(crops).dtype == np.float64

    def test_another_weight_is_another_digest(self, scorer, tmp_path):
        scorer.save(tmp_path / "one")
        with torch.no_grad():
            scorer.net.roi_head.bias += 1
        scorer.save(tmp_path / "two")
        assert load_scorer(tmp_path / "one").digest != load_scorer(tmp_path / "two").digest

    def test_no_scorer_is_one_sentence(self, tmp_path):
        with pytest.raises(GBCIError, match=r"has no config.json; expected a scorer as `gbci-fast train classifier`"):
            load_scorer(tmp_path)

    @pytest.mark.parametrize(
        "change", [{"tasks": ["mood"]}, {"channels": [8, 24]}, {"surplus": 1}, {"tasks": []}, {"tasks": 3}]
    )
    def test_a_damaged_one_is_one_sentence(self, scorer, tmp_path, change):
        scorer.save(tmp_path / "scorer")
        path = tmp_path / "scorer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(GBCIError, match=r"cannot be loaded as a scorer: .") as caught:
            load_scorer(tmp_path / "scorer")
        assert "\n" not in str(caught.value)

    def test_the_packaged_one_is_small_and_knows_its_data(self):
        scorer = load_scorer()
        assert sum(value.numel() for value in scorer.net.parameters()) <= 400_000
        assert sum(path.stat().st_size for path in PACKAGED_SCORER.iterdir()) < 1_000_000
        assert scorer.config.fold == "A"
        assert scorer.config.split == "training"
        assert {"birads_high", "malignancy", "size"} < set(scorer.config.tasks)


class TestTruths:
    def test_every_task_has_its_rule(self):
        told = Attributes(finding_categories=("Mass",), finding_birads=4)
        assert label("category/Mass", told, 1, 1) is True
        assert label("category/Asymmetry", told, 1, 1) is False
        assert label("birads_high", told, 1, 1) is True
        assert label("birads_high", Attributes(finding_birads=3), 1, 1) is False
        assert label("birads_high", Attributes(finding_birads=1), 1, 1) is None
        assert label("malignancy", Attributes(pathology="benign"), 1, 1) is False
        assert label("size", told, 2, 1) is True

    def test_unknown_is_nan(self, square):
        cases = [square(), square(attributes=Attributes(finding_categories=(), pathology="malignant"))]
        found = labels(cases, CONFIG.tasks, CONFIG.median_diameter)
        np.testing.assert_array_equal(found, [[np.nan, 1, np.nan], [0, 1, 1]])


class TestWindows:
    def test_scale_is_fixed_and_the_middle_is_the_masks(self, square):
        windows = cut_windows([square(side=10), square(top=0, left=0, side=20)])
        bright = windows > 0.5
        assert [part.sum() for part in bright] == [100, 400]
        for part in bright:
            assert np.argwhere(part).mean(0) == pytest.approx([CROP_SIZE / 2 - 0.5] * 2, abs=0.5)
        assert not windows[1, 0].any()  # beyond the image's edge

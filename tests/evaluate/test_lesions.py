"""Lesion cases and crops: geometry, what a crop shows, and that painting resumes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from gbci_fast.data.folds import patient_fold
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.features import Radiomics
from gbci_fast.evaluate.lesions import CROP_SIZE, NATIVE_SIZE, crop_lesions, read_lesions, read_split, read_training
from gbci_fast.evaluate.metrics import grow
from gbci_fast.evaluate.painting import (
    PaintSettings,
    blob_fill,
    blob_on_tissue,
    blurred_fill,
    paint,
    ring_mean_fill,
)
from gbci_fast.phantom import generate_phantom

SIZE = 96


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("lesions") / "phantom"
    generate_phantom(root, studies=3, seed=3, size=192)
    return root


@pytest.fixture(scope="module")
def cases(root):
    return read_lesions([root], size=SIZE)


class TestCases:
    def test_every_finding_of_the_tables_is_a_case(self, root, cases):
        table = (root / "finding_annotations.csv").read_text().splitlines()
        assert len(cases) == sum("No Finding" not in row for row in table[1:])
        assert len({case.name for case in cases}) == len({case.seed for case in cases}) == len(cases)

    def test_masks_cover_the_lesion_and_air_around_it(self, cases):
        for case in cases:
            assert (case.mask & case.lesion).sum() == case.lesion.sum() < case.mask.sum()

    def test_masks_cover_no_other_lesion(self, root, tmp_path):
        """A lesion that two boxes share: their halves touch."""
        for path in root.iterdir():
            (tmp_path / path.name).symlink_to(path)
        table = pd.read_csv(root / "finding_annotations.csv")
        row = table[table.xmin.notna()].index[0]
        left, right = table.loc[[row]].copy(), table.loc[[row]].copy()
        left["xmax"] = right["xmin"] = table.loc[row, ["xmin", "xmax"]].mean().round()
        (tmp_path / "finding_annotations.csv").unlink()
        pd.concat([left, right]).to_csv(tmp_path / "finding_annotations.csv", index=False)
        one, two = read_lesions([tmp_path], size=SIZE)
        assert one.lesion.any()
        assert two.lesion.any()
        assert not (one.mask & two.lesion & ~one.lesion).any()
        assert not (two.mask & one.lesion & ~two.lesion).any()
        assert (one.mask & two.mask).any()  # above and below both

    def test_folds_split_the_patients(self, root, cases):
        names = {"A": set(), "B": set(), "C": set()}
        for fold in names:
            try:
                names[fold] = {case.name for case in read_lesions([root], folds=fold, size=SIZE)}
            except GBCIError:
                continue  # all three patients may be in another one
        assert set.union(*names.values()) == {case.name for case in cases}
        assert sum(map(len, names.values())) == len(cases)
        assert all(patient_fold(case.patient.split("/")[1]) == "A" for case in cases if case.name in names["A"])

    def test_judged_lesions_and_training_lesions_share_no_patient(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("split") / "phantom"
        generate_phantom(root, studies=12, seed=0, size=128)
        judged, training = read_split([root], "C"), read_training([root])
        folds = [{patient_fold(case.patient.split("/")[1]) for case in cases} for cases in (judged, training)]
        assert folds == [{"C"}, {"A", "B"}]
        assert len(judged) + len(training) == len(read_lesions([root], split="training"))
        assert {case.split for case in read_split([root], "test")} == {"test"}
        for table in root.glob("*.csv"):
            table.write_text(table.read_text().replace(",training,", ",test,"))
        with pytest.raises(GBCIError, match=r"\(training split, fold C\)"):
            read_split([root], "C")

    def test_nothing_to_read_is_one_sentence(self, root):
        with pytest.raises(GBCIError, match=r"no image with a finding in .* \(test split\)"):
            read_lesions([root], split="test", size=SIZE)

    def test_undecided_pathology_is_unknown(self, root, tmp_path):
        words = {"benign_without_callback": "benign", "malignant": "malignant", "benign|malignant": None}
        for kind, expected in words.items():
            copy = tmp_path / kind.replace("|", "-")
            copy.mkdir()
            for path in root.iterdir():
                if path.suffix == ".csv":
                    text = path.read_text()
                    for word in ("benign", "malignant"):
                        text = text.replace(f",{word},", f",{kind},")
                    (copy / path.name).write_text(text)
                else:
                    (copy / path.name).symlink_to(path)
            assert {case.attributes.pathology for case in read_lesions([copy], size=SIZE)} <= {expected, None}


class TestCrops:
    def test_the_lesion_is_in_the_middle_and_fills_its_share(self, square):
        crop = crop_lesions([square(side=40)])
        ys, xs = np.nonzero(crop.masks[0])
        assert ys.mean() == pytest.approx((CROP_SIZE - 1) / 2, abs=1)
        assert xs.mean() == pytest.approx((CROP_SIZE - 1) / 2, abs=1)
        assert crop.masks.mean() == pytest.approx(1 / 1.5**2, rel=0.1)
        assert crop.pixels[0][crop.masks[0]].mean() > 2 * crop.pixels[0, :8].mean()

    def test_small_lesions_are_not_blown_up_without_limit(self, square):
        assert square(side=4).window[2] == 32

    def test_beyond_the_edge_is_black(self, square):
        crop = crop_lesions([square(top=0, left=0)])
        assert not crop.pixels[0, 0].any()
        assert crop.pixels[0, 32, 32] > 0.5

    def test_roi_shows_no_background(self, square):
        case = square()
        other = replace(case, image=np.where(case.mask, case.image, 60000).astype(np.uint16))
        inside = crop_lesions([case]).masks[0]
        # Resampling mixes a pixel at the edge; one pixel further in the crops are equal.
        inside = inside[1:-1, 1:-1] & inside[2:, 1:-1] & inside[:-2, 1:-1] & inside[1:-1, 2:] & inside[1:-1, :-2]
        one, two = (crop_lesions([x]).roi[0, 1:-1, 1:-1] for x in (case, other))
        np.testing.assert_allclose(one[inside], two[inside], atol=1e-6)
        assert np.ptp(one[~crop_lesions([case]).masks[0, 1:-1, 1:-1]]) == 0

    @pytest.mark.parametrize(("top", "left"), [(30, 30), (0, 70)])
    def test_middles_are_the_image_s_own_pixels(self, square, top, left):
        """Also of a lesion that crops shrink, and at the edge, where the middle is shifted into the image."""
        case = square(top=top, left=left, side=20, image=np.arange(96 * 96).reshape(96, 96).astype(np.uint16))
        (pixels,), (mask,) = crop_lesions([case]).native
        y, x = min(max(top + 10 - NATIVE_SIZE // 2, 0), 64), min(max(left + 10 - NATIVE_SIZE // 2, 0), 64)
        np.testing.assert_array_equal(pixels, case.pixels[y : y + NATIVE_SIZE, x : x + NATIVE_SIZE])
        assert mask.sum() == 400

    def test_rows_are_picked_with_their_patients(self, square):
        crops = crop_lesions([square(patient="a"), square(patient="b"), square(patient="c")])
        assert crops[np.array([2, 0])].patients == ("c", "a")
        assert crops[np.array([False, True, False])].patients == ("b",)


class TestPainting:
    def test_a_stopped_run_goes_on_with_the_kept_batches(self, cases, tmp_path):
        calls = []

        def pipe(image, **call):
            calls.append(len(image))
            return type("Output", (), {"images": image * 0.5})

        settings = PaintSettings(batch_size=2)
        first = paint(pipe, cases[:2], settings, weights="w", folder=tmp_path)
        again = paint(pipe, cases[:4], settings, weights="w", folder=tmp_path)
        assert calls == [2, 2]  # the first batch once, the second once
        np.testing.assert_array_equal(first, again[:2])
        paint(pipe, cases[:2], replace(settings, steps=3), weights="w", folder=tmp_path)
        paint(pipe, cases[:2], settings, weights="other", folder=tmp_path)
        assert calls == [2, 2, 2, 2]
        for path in tmp_path.glob("*.npy"):
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        np.testing.assert_array_equal(paint(pipe, cases[:2], settings, weights="w", folder=tmp_path), first)
        assert calls == [2, 2, 2, 2, 2]  # what was damaged is painted again

    @pytest.mark.parametrize("names", [False, True])
    def test_a_power_cut_loses_no_batch_that_was_painted(self, square, recorded_disk, tmp_path, names):
        cases, calls, done = [square(seed=seed) for seed in range(4)], [], []

        def pipe(image, **call):
            calls.append(len(image))
            return type("Output", (), {"images": image * 0.5})

        def painted(folder):
            note = lambda *_: done.append(len(recorded_disk.states))  # noqa: E731
            settings = PaintSettings(batch_size=2)
            return paint(pipe, cases, settings, weights="w", folder=folder, on_progress=note)

        whole = painted(recorded_disk.root / "painted")
        noted = list(done)
        for count in range(1, len(recorded_disk.states) + (not names)):
            recorded_disk.cut(count, tmp_path / f"cut{count}", names=names)
            calls.clear()
            np.testing.assert_array_equal(painted(tmp_path / f"cut{count}" / "painted"), whole)
            assert len(calls) <= 2 - sum(count >= moment for moment in noted), count

    @pytest.mark.parametrize("fill", [ring_mean_fill, blurred_fill])
    def test_trivial_fillings_change_the_mask_alone(self, cases, fill):
        for case, filled in zip(cases, fill(cases), strict=True):
            assert filled.dtype == np.float32
            np.testing.assert_array_equal(filled[~case.mask], case.pixels[~case.mask])
            assert (filled[case.mask] != case.pixels[case.mask]).any()
            assert 0 <= filled.min() <= filled.max() <= 1

    def test_a_blob_on_tissue_is_as_bright_as_it_says_and_keeps_the_texture(self, square):
        case = square(image=np.random.default_rng(0).integers(20000, 22000, (96, 96)).astype(np.uint16))
        added = blob_on_tissue([case])[0] - case.pixels
        assert added.max() == pytest.approx(0.1, abs=0.003)
        assert added[grow(case.mask, 3)].min() > 0.001
        assert np.abs(added[~grow(case.mask, 13)]).max() < 1e-6
        assert np.abs(np.diff(added, axis=0)).max() < 0.03  # smooth

    def test_a_blob_instead_of_a_lesion_shows_nothing_of_the_lesion(self, square):
        """The background continues its surroundings, at their grain, whatever the lesion was."""
        rng = np.random.default_rng(0)
        lesion = square().lesion
        slope = 20000 + 100 * np.arange(96)[:, None] + rng.normal(0, 500, (96, 96))
        one, two = (
            square(image=np.where(lesion, value, slope).astype(np.uint16), mask=grow(lesion, 3))
            for value in (60000, rng.integers(0, 65535, (96, 96)))
        )
        first, second = blob_fill([one, two])
        np.testing.assert_allclose(first, second, atol=1e-3)
        np.testing.assert_array_equal(first[~grow(lesion, 20)], one.pixels[~grow(lesion, 20)])
        interior = ndimage.binary_erosion(lesion, iterations=3)
        away = ~grow(lesion, 20)
        fine = first - ndimage.gaussian_filter(first, 1)
        assert fine[interior].std() == pytest.approx(fine[away].std(), rel=0.3)
        expected = slope[40, 40] / 65535 + 0.1
        assert first[38:43, 38:43].mean() == pytest.approx(expected, abs=0.01)

    def test_ring_mean_changes_the_mask_alone(self, square):
        case = square()
        filled = ring_mean_fill([case])[0]
        np.testing.assert_array_equal(filled[~case.mask], case.pixels[~case.mask])
        np.testing.assert_allclose(filled[case.mask], 20000 / 65535, rtol=1e-5)


class TestRadiomics:
    def test_features_tell_flat_from_rough_and_see_the_mask_alone(self, square):
        extractor, rng = Radiomics(), np.random.default_rng(0)
        flat = crop_lesions([square(side=43)])  # 43 * 1.5 is about a crop's side: almost no resampling
        rough = replace(flat, pixels=np.clip(flat.pixels + rng.normal(0, 0.1, flat.pixels.shape), 0, 1))
        outside = replace(flat, pixels=np.where(flat.masks, flat.pixels, 0.9).astype(np.float32))
        columns = dict(zip(extractor.names, np.stack([extractor(x)[0] for x in (flat, rough, outside)]).T, strict=True))
        assert columns["first_order_sd"][1] > 5 * columns["first_order_sd"][0]
        assert columns["glcm_contrast_1"][1] > 5 * columns["glcm_contrast_1"][0]
        for name, (base, _, changed) in columns.items():
            assert changed == base, name

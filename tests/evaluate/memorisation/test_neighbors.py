"""Distances of crops: what is a copy and what is not, against a second implementation; the index file."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops
from gbci_fast.evaluate.memorisation import neighbors
from gbci_fast.evaluate.memorisation.neighbors import TrainingIndex, index_digest, laid_on, load_index, save_index


def textures(count, seed, sigma=2.5):
    """Random textures around 0.5 with a disk as the mask."""
    fields = gaussian_filter(
        np.random.default_rng(seed).standard_normal((count, CROP_SIZE, CROP_SIZE)), (0, sigma, sigma)
    )
    y, x = np.mgrid[:CROP_SIZE, :CROP_SIZE] - (CROP_SIZE - 1) / 2
    return Crops(
        pixels=(0.5 + 0.08 * fields / fields.std()).astype(np.float32),
        masks=np.broadcast_to(np.hypot(y, x) < 20, fields.shape).copy(),
        patients=tuple(f"p{i}" for i in range(count)),
    )


@pytest.fixture(scope="module")
def training():
    return textures(40, seed=0)


@pytest.fixture(scope="module")
def index(training):
    names = [f"image{i}-1" for i in range(len(training))]
    return TrainingIndex.of(training, names, [name[:-2] for name in names])


def nearest(index, crops):
    return index.nearest(crops, [None] * len(crops))


def changed(crops, pixels):
    return Crops(pixels=pixels.astype(np.float32), masks=crops.masks, patients=crops.patients)


class TestDistances:
    @pytest.mark.parametrize(
        ("alter", "farthest"),
        [
            (lambda x: x, 1e-3),
            (lambda x: x[:, ::-1], 1e-3),
            (lambda x: x[:, :, ::-1], 1e-3),
            (lambda x: np.roll(x, (4, -2), (1, 2)), 1e-3),
            (lambda x: np.roll(x, (3, 1), (1, 2))[:, ::-1, ::-1], 0.12),  # half a pixel of the comparison off
            (lambda x: 0.4 * x + 0.3, 1e-3),
            (lambda x: gaussian_filter(x, (0, 1, 1)), 0.05),
        ],
        ids=["same", "upside down", "mirrored", "shifted", "all of it", "gain", "blurred"],
    )
    def test_planted_copies_are_found_and_named(self, index, training, alter, farthest):
        found = nearest(index, changed(training, alter(training.pixels)))
        assert found.rows.tolist() == list(range(len(training)))
        assert found.distances.max() < farthest

    def test_fresh_textures_are_far(self, index):
        assert nearest(index, textures(20, seed=1)).distances.min() > 0.3

    def test_what_lies_around_the_mask_does_not_count(self, index, training):
        fresh = textures(len(training), seed=2).pixels
        inside = gaussian_filter(training.masks.astype(float), (0, 1, 1)) > 1e-3
        # The band's coarse Gaussian covers the surroundings, too; the middle of the mask outweighs them.
        pasted = nearest(index, changed(training, np.where(inside, training.pixels, fresh)))
        framed = nearest(index, changed(training, np.where(inside, fresh, training.pixels)))
        assert pasted.distances.max() < 0.1 < 0.3 < framed.distances.min()
        assert pasted.rows.tolist() == list(range(len(training)))

    def test_edges_of_the_tissue_make_no_copies(self):
        """All crops share one straight chest wall and nothing else."""
        wall = np.arange(CROP_SIZE) < 24
        first, second = (
            changed(crops, np.where(wall, 0, crops.pixels)) for crops in (textures(20, seed=3), textures(20, seed=4))
        )
        index = TrainingIndex.of(first, first.patients, first.patients)
        assert nearest(index, second).distances.min() > 0.2
        assert nearest(index, first).distances.max() < 1e-3

    def test_agrees_with_a_correlation_that_is_spelled_out(self, index):
        crops = textures(3, seed=5)
        bands, tissue = neighbors._band(crops.pixels)
        assert tissue.all()
        found = index.distances(crops)
        small = bands.reshape(3, 32, 2, 32, 2).mean((2, 4))
        masks = crops.masks.reshape(3, 32, 2, 32, 2).mean((2, 4)) > 0.5
        for i in range(3):
            best = np.full(len(index.names), -1.0)
            for flip in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
                values, mask = small[i][:: flip[0], :: flip[1]], masks[i][:: flip[0], :: flip[1]]
                ys, xs = np.nonzero(mask)
                for dy in range(-2, 3):
                    for dx in range(-2, 3):
                        there = index.details[:, ys + dy, xs + dx].astype(float)
                        r = np.corrcoef(np.vstack([values[ys, xs], there]))[0, 1:]
                        best = np.maximum(best, r)
            np.testing.assert_allclose(found[i], 1 - best, atol=1e-4)

    def test_a_flat_crop_is_like_nothing(self, index):
        crops = textures(1, seed=0)
        assert nearest(index, changed(crops, np.full_like(crops.pixels, 0.5))).distances == pytest.approx(1)
        assert nearest(index, changed(crops, np.zeros_like(crops.pixels))).distances == pytest.approx(1)

    def test_an_excluded_image_is_no_neighbor(self, index, training):
        found = index.nearest(training[:2], ["image0", None])
        assert found.rows[0] != 0
        assert found.distances[0] > 0.3
        assert found.rows[1] == 1
        alone = TrainingIndex.of(training[:1], ["a-1"], ["a"])
        with pytest.raises(GBCIError, match="all 1 training crops are of a; expected at least one other image"):
            alone.nearest(training[:1], ["a"])

    def test_a_neighbor_is_laid_on_the_crop_that_found_it(self, index, training):
        moved = changed(training, np.roll(training.pixels, (4, -2), (1, 2))[:, ::-1])
        found = nearest(index, moved)
        for i in range(len(training)):
            back = laid_on(found.moves[i], training.pixels[found.rows[i]])
            middle = np.s_[10:-10, 10:-10]
            np.testing.assert_allclose(back[middle], moved.pixels[i][middle], atol=1e-6)


class TestIndexFile:
    def test_comes_back_as_it_was(self, index, tmp_path):
        path = tmp_path / "index.npz"
        save_index(index, 0.125, path)
        back, threshold = load_index(path)
        assert threshold == 0.125
        assert (back.names, back.image_ids) == (index.names, index.image_ids)
        np.testing.assert_array_equal(back.details, index.details)
        assert index_digest(back, threshold) == index_digest(index, 0.125) != index_digest(index, 0.126)
        crops = textures(3, seed=7)
        np.testing.assert_array_equal(nearest(back, crops).distances, nearest(index, crops).distances)

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda path: path.unlink(), "does not exist; expected an index of gbci-fast evaluate memorisation"),
            (lambda path: path.write_bytes(b""), r"cannot be read \(.*\); expected an index"),
            (lambda path: path.write_text("notes"), r"cannot be read \(.*\); expected an index"),
            (lambda path: path.write_bytes(path.read_bytes()[:3000]), r"cannot be read \(.*\); expected an index"),
            (lambda path: path.write_bytes(path.read_bytes().replace(b"\0", b"\1", 4000)), r"cannot be read \("),
            (lambda path: np.savez(path, other=np.zeros(3)), r"cannot be read \(.*settings.*\); expected"),
            (lambda path: np.save(path.open("wb"), np.zeros(3)), r"cannot be read \("),
            (lambda path: np.savez_compressed(path, names=np.zeros(10**7)), r"it unpacks to 80000\d+ bytes, 8 times"),
        ],
        ids=["absent", "empty", "text", "cut", "garbled", "another npz", "an npy", "packed a thousand times"],
    )
    def test_what_is_no_index_is_one_sentence(self, index, tmp_path, damage, sentence):
        path = tmp_path / "index.npz"
        save_index(index, 0.1, path)
        damage(path)
        with pytest.raises(GBCIError, match=sentence):
            load_index(path)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"threshold": np.array(np.nan)}, "threshold is nan; expected 0 to 2"),
            ({"threshold": np.array(3.0)}, "threshold is 3; expected 0 to 2"),
            ({"names": np.array(["one"])}, "arrays of wrong shapes"),
            ({"details": np.full((40, 32, 32), np.nan, np.float16)}, "arrays of wrong shapes or values"),
            ({"details": np.zeros((40, 16, 16), np.float16)}, "arrays of wrong shapes"),
            ({"details": np.array(0, np.float16)}, "arrays of wrong shapes"),
            ({"settings": np.array('{"format": "other"}')}, "made with other settings"),
            ({"names": np.array([object()] * 40)}, "cannot be read"),
        ],
        ids=["nan", "far", "one name", "nan details", "small", "scalar", "settings", "pickle"],
    )
    def test_foreign_content_is_one_sentence(self, index, tmp_path, changes, sentence):
        path = tmp_path / "index.npz"
        save_index(index, 0.1, path)
        with np.load(path) as file:
            content = dict(file)
        np.savez(path, **(content | changes))
        with pytest.raises(GBCIError, match=sentence):
            load_index(path)

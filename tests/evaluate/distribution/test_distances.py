"""Distances and appearance against second implementations, naive loops, and signals whose answer is known."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from pytorch_msssim import ms_ssim as reference_ms_ssim
from scipy.linalg import sqrtm

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.distribution.appearance import MS_SSIM_WEIGHTS, ms_ssim, seams, spectrum_slopes
from gbci_fast.evaluate.distribution.distances import KernelPairs, NeighborPairs, frechet_distance
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops


def sample(n, d, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def kernel_distance(x, y, owners_x=None, owners_y=None):
    """By `KernelPairs`, over all pairs; without owners, every item has one of its own."""
    owners_x = range(len(x)) if owners_x is None else owners_x
    owners_y = range(-len(y), 0) if owners_y is None else owners_y
    return KernelPairs.of(x, y, owners_x, owners_y).distances(np.ones((1, len(x))), np.ones((1, len(y))))[0]


def find_neighbors(real, synthetic, k=5, real_owners=None, synthetic_owners=None):
    """By `NeighborPairs`; without owners, every item has one of its own."""
    real_owners = range(len(real)) if real_owners is None else real_owners
    synthetic_owners = range(-len(synthetic), 0) if synthetic_owners is None else synthetic_owners
    return NeighborPairs.of(real, synthetic, real_owners, synthetic_owners).find(k)


def slow_kernel_distance(x, y, owners_x, owners_y):
    """Loops over pairs, as the definition says."""

    def mean(a, b, owners_a, owners_b):
        values = [
            (p @ q / len(p) + 1) ** 3
            for p, i in zip(a, owners_a, strict=True)
            for q, j in zip(b, owners_b, strict=True)
            if i != j
        ]
        return sum(values) / len(values)

    return mean(x, x, owners_x, owners_x) + mean(y, y, owners_y, owners_y) - 2 * mean(x, y, owners_x, owners_y)


class TestKernelDistance:
    def test_loops_over_pairs_agree(self):
        x, y = sample(9, 4, 0), sample(7, 4, 1, shift=0.3)
        assert kernel_distance(x, y) == pytest.approx(slow_kernel_distance(x, y, range(9), range(9, 16)))
        owners = [0, 0, 1, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 7, 7, 8]
        assert kernel_distance(x, y, *owners) == pytest.approx(slow_kernel_distance(x, y, *owners))

    def test_weights_are_repetitions(self):
        x, y, owners = sample(6, 3, 0), sample(5, 3, 1), np.arange(6)
        weights = np.array([2, 0, 1, 3, 0, 1])
        weighted = KernelPairs.of(x, y, owners, range(10, 15)).distances(weights[None], np.ones((1, 5)))[0]
        repeated = kernel_distance(np.repeat(x, weights, 0), y, np.repeat(owners, weights), range(10, 15))
        assert weighted == pytest.approx(repeated)

    def test_one_distribution_has_distance_zero_on_average_at_any_size(self):
        for n in (5, 20):
            values = [kernel_distance(sample(n, 3, 2 * i), sample(n, 3, 2 * i + 1)) for i in range(400)]
            assert abs(np.mean(values)) < 3 * np.std(values) / 20
        assert kernel_distance(sample(40, 3, 0), sample(40, 3, 1, shift=1.0)) > 5 * np.std(values)

    def test_copies_of_one_patient_bring_no_closeness(self):
        """Every real item has a near-copy among the synthetic: without owners that would look like a match."""
        x = sample(30, 3, 0)
        owners = np.arange(30)
        assert kernel_distance(x, x + 1e-6) < 0 < kernel_distance(x, x + 1e-6, owners, owners) + 1e-4


class TestFrechet:
    @pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 6), (8, 9, 20), (12, 40, 20)])
    def test_the_root_of_the_product_agrees(self, n, m, d):
        rng = np.random.default_rng(3)
        x, y = sample(n, d, 0) @ rng.normal(size=(d, d)), sample(m, d, 1, shift=0.5)
        a, b = np.cov(x.T), np.cov(y.T)
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)

    def test_gaussians_of_one_dimension(self):
        x = np.array([[-1.0], [1.0]]) / np.sqrt(2)  # mean 0, sd 1
        assert frechet_distance(x, 3 * x + 2) == pytest.approx(2**2 + (3 - 1) ** 2)

    def test_a_set_is_at_no_distance_from_itself(self):
        for n in (5, 50):
            assert frechet_distance(sample(n, 10, 0), sample(n, 10, 0)) == pytest.approx(0, abs=1e-9)

    def test_constant_features_do_no_harm(self):
        x, y = np.zeros((5, 4)), np.ones((6, 4))
        assert frechet_distance(x, y) == pytest.approx(4)

    def test_weights_are_repetitions(self):
        x, y, weights = sample(6, 3, 0), sample(9, 3, 1), np.array([2, 0, 1, 3, 0, 1])
        repeated = frechet_distance(np.repeat(x, weights, 0), y)
        assert frechet_distance(x, y, weights, np.ones(9)) == pytest.approx(repeated)


class TestNeighbors:
    @pytest.mark.parametrize(("n", "m", "d", "k"), [(40, 40, 3, 5), (30, 50, 8, 3), (25, 12, 2, 1)])
    def test_prdc_agrees(self, n, m, d, k):
        real, synthetic = sample(n, d, 0), 0.7 * sample(m, d, 1, shift=0.2)
        for name, value in compute_prdc(real, synthetic, nearest_k=k).items():
            assert find_neighbors(real, synthetic, k).means[name] == pytest.approx(value), name

    def test_planted_failures_are_told_apart(self):
        """One mode of two: precise, without recall. Far away: neither."""
        modes = np.repeat([[0.0, 0.0], [20.0, 0.0]], 30, axis=0)
        real = modes + sample(60, 2, 0)
        collapsed = find_neighbors(real, sample(60, 2, 1)).means
        assert collapsed["precision"] > 0.9 > 0.7 > collapsed["recall"]
        assert collapsed["coverage"] < 0.55 < 0.8 < collapsed["density"]
        assert set(find_neighbors(real, sample(60, 2, 2, shift=100)).means.values()) == {0.0}

    def test_neighbors_of_the_same_patient_do_not_count(self):
        x = sample(12, 2, 0)
        twice, owners = np.repeat(x, 2, axis=0), np.repeat(np.arange(12), 2)
        fooled = find_neighbors(twice, twice + 1e-9, 1).means
        assert fooled["coverage"] == 0  # every ball has radius 0
        assert find_neighbors(twice, twice + 1e-9, 1, owners, owners + 100).means["coverage"] == 1
        own = find_neighbors(twice, twice + 1e-9, 1, owners, owners)
        apart = find_neighbors(x, x + 1e-9, 2, np.arange(12), np.arange(12))
        assert own.means["coverage"] <= apart.means["coverage"]

    def test_too_few_are_one_sentence(self):
        with pytest.raises(GBCIError, match="a real crop has 4 neighbors of other patients among 5 crops"):
            find_neighbors(sample(5, 2, 0), sample(9, 2, 1))


class TestDiversity:
    def test_pytorch_msssim_agrees(self):
        """On images larger than crops: pytorch_msssim requires the size for five scales, whatever their number."""
        rng = np.random.default_rng(0)
        x = rng.random((4, 176, 176))
        y = np.clip(x + rng.normal(0, 0.15, x.shape), 0, 1)
        weights = [w / sum(MS_SSIM_WEIGHTS) for w in MS_SSIM_WEIGHTS]
        for one, other in ((x, y), (x, x[::-1].copy()), (np.zeros_like(x), y)):
            tensors = (torch.from_numpy(a)[:, None] for a in (one, other))
            expected = reference_ms_ssim(*tensors, data_range=1.0, size_average=False, weights=weights).numpy()
            np.testing.assert_allclose(ms_ssim(one, other), expected, rtol=1e-4)  # its window is float32

    def test_equal_crops_have_one(self):
        x = np.random.default_rng(0).random((2, CROP_SIZE, CROP_SIZE))
        np.testing.assert_allclose(ms_ssim(x, x), 1)


def power_law(beta, seed, n=10):
    """Noise whose power falls as 1/f^beta, cut out of larger fields, so that it does not wrap around: 9 crops each."""
    size = 4 * CROP_SIZE
    axis = np.fft.fftfreq(size)
    f = np.hypot(axis[:, None], axis)
    f[0, 0] = 1
    white = np.fft.fft2(np.random.default_rng(seed).normal(size=(n, size, size)))
    fields = np.fft.ifft2(white * f ** (-beta / 2)).real
    starts = [(i * CROP_SIZE, j * CROP_SIZE) for i in range(3) for j in range(3)]
    return np.concatenate([fields[:, y : y + CROP_SIZE, x : x + CROP_SIZE] for y, x in starts])


def bare(pixels):
    """Crops of which only the pixels matter."""
    return Crops(pixels=pixels, masks=np.ones(pixels.shape, bool), patients=("p",) * len(pixels))


class TestSpectrum:
    @pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, 3.0])
    def test_the_slope_of_power_law_noise_is_found(self, beta):
        assert spectrum_slopes(bare(power_law(beta, 0))).mean() == pytest.approx(-beta, abs=0.1)

    def test_brightness_and_contrast_do_not_count(self):
        x = power_law(2.0, 0)
        np.testing.assert_allclose(spectrum_slopes(bare(0.1 * x + 0.5)), spectrum_slopes(bare(x)), atol=1e-6)

    def test_a_flat_crop_has_no_slope(self):
        assert spectrum_slopes(bare(np.full((1, CROP_SIZE, CROP_SIZE), 0.3)))[0] == pytest.approx(0)


def disk(seed=0, n=8):
    y, x = np.indices((CROP_SIZE, CROP_SIZE)) - CROP_SIZE / 2 + 0.5
    rng = np.random.default_rng(seed)
    pixels = (0.5 + rng.normal(0, 0.02, (n, CROP_SIZE, CROP_SIZE))).astype(np.float32)
    return Crops(pixels=pixels, masks=np.stack([np.hypot(y, x) < 20] * n), patients=tuple(map(str, range(n))))


def replaced(crops, pixels):
    return Crops(pixels=pixels.astype(np.float32), masks=crops.masks, patients=crops.patients)


class TestSeams:
    def test_noise_all_over_shows_no_seam(self):
        assert abs(seams(disk()).mean()) < 0.05

    def test_a_planted_step_is_measured(self):
        """The mean of |N(s, sqrt(2) 0.02)| over that of |N(0, sqrt(2) 0.02)|, its half-normal mean, for s = 0.2."""
        crops = disk()
        stepped = replaced(crops, crops.pixels + 0.2 * crops.masks)
        expected = np.log(0.2 / (np.sqrt(2) * 0.02 * np.sqrt(2 / np.pi)))
        assert seams(stepped).mean() == pytest.approx(expected, abs=0.05)

    def test_a_smooth_lesion_has_none(self):
        crops = disk()
        y, x = np.indices((CROP_SIZE, CROP_SIZE)) - CROP_SIZE / 2
        bump = 0.3 * np.exp(-(x**2 + y**2) / (2 * 14**2))
        assert abs(seams(replaced(crops, crops.pixels + bump)).mean()) < 0.1

    def test_a_blurred_outline_is_below_zero(self):
        crops = disk()
        y, x = np.indices((CROP_SIZE, CROP_SIZE)) - CROP_SIZE / 2 + 0.5
        smooth = np.abs(np.hypot(y, x) - 20) < 1.5
        assert seams(replaced(crops, np.where(smooth, 0.5, crops.pixels))).mean() < -1

    def test_a_flat_crop_has_zero(self):
        crops = disk()
        np.testing.assert_array_equal(seams(replaced(crops, np.full_like(crops.pixels, 0.4))), 0)

"""Ultrasound slices: the statistics of speckle, the physics behind a lesion, and exact truth."""

import functools
import hashlib

import numpy as np
import pytest
from scipy import ndimage

from gbci_fast.errors import GBCIError
from gbci_fast.phantom.bodies import Body, Cluster, Ellipsoid, draw_cluster, draw_mass, draw_node, draw_star
from gbci_fast.phantom.ultrasound import (
    LAYERS,
    LESIONS,
    PIXELS,
    SKIN_DEPTH,
    SPACING,
    EchoMaps,
    axial_sigma,
    envelope,
    lateral_sigma,
    render_slice,
    slice_distance,
)


def streams(index: int):
    def stream(purpose: str) -> np.random.Generator:
        return np.random.default_rng([index, int(hashlib.sha256(purpose.encode()).hexdigest()[:8], 16)])

    return stream


def draw(kind: str, index: int = 0, radius: float = 5.0) -> Body:
    rng = np.random.default_rng([index, 7])
    if kind == "star":
        return draw_star(rng, 12.0)
    if kind == "lymph node":
        return draw_node(rng, radius)
    if kind == "calcifications":
        return draw_cluster(rng, radius, np.array([1.0, 0.3, -0.2]))
    return draw_mass(rng, kind, radius)


@functools.cache
def rendered(kind: str | None, index: int, density: str = "C"):
    return render_slice(streams(index), density, "L", None if kind is None else draw(kind, index))


def uniform_envelope(index: int) -> np.ndarray:
    shape = (PIXELS, PIXELS)
    tissue = EchoMaps(amplitude=np.ones(shape), attenuation=np.zeros(shape), coherent=np.zeros(shape))
    return envelope(streams(index)("speckle"), tissue, np.zeros((PIXELS, 1)))


def behind(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels below the mask's middle columns, and pixels at the same depth 4 to 8 mm beside them."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.zeros(mask.shape, bool)
    rows[np.flatnonzero(mask.any(axis=1))[-1] + 8 :] = True
    x = np.arange(PIXELS)
    quarter = len(columns) // 4
    under = (x >= columns[quarter]) & (x <= columns[-quarter - 1])
    away = np.maximum(columns[0] - x, x - columns[-1]) * SPACING
    return rows & under, rows & (away > 4) & (away < 8)


def test_speckle_is_fully_developed():
    echo = np.concatenate([uniform_envelope(index) for index in range(2)])
    assert echo.mean() / echo.std() == pytest.approx(1.91, abs=0.03)  # Rayleigh
    assert (echo**2).mean() == pytest.approx(1, abs=0.03)  # the display level of fat


def test_speckle_is_as_large_as_the_pulse_and_the_beam():
    intensity = uniform_envelope(0) ** 2
    intensity -= intensity.mean()
    sizes = []
    for axis in (0, 1):
        lag = 1 if axis == 0 else 3
        one, other = (np.take(intensity, np.arange(PIXELS)[part], axis) for part in (slice(lag, None), slice(-lag)))
        # The intensity of circular noise through a Gaussian of sigma s correlates as exp(-lag^2 / (2 s^2)).
        correlation = (one * other).mean() / intensity.var()
        sizes.append(lag * SPACING / np.sqrt(-2 * np.log(correlation)))
    assert sizes[0] == pytest.approx(axial_sigma(), rel=0.06)
    assert sizes[1] == pytest.approx(lateral_sigma(), rel=0.06)
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize("kind", ["spiculated", "irregular", "calcifications"])
def test_what_attenuates_more_throws_a_shadow(kind):
    for index in range(3):
        under, beside = behind(rendered(kind, index).mask)
        healthy, image = rendered(None, index).image.astype(float), rendered(kind, index).image.astype(float)
        assert image[under].mean() - healthy[under].mean() < -5
        if kind != "calcifications":  # specks block a few beams only
            assert image[under].mean() < image[beside].mean() - 5


@pytest.mark.parametrize("kind", ["round", "oval", "lobular"])
def test_what_attenuates_less_enhances(kind):
    for index in range(3):
        under, beside = behind(rendered(kind, index).mask)
        healthy, image = rendered(None, index).image.astype(float), rendered(kind, index).image.astype(float)
        assert image[under].mean() - healthy[under].mean() > 5
    under, beside = zip(*(behind(rendered(kind, index).mask) for index in range(3)), strict=True)
    difference = [
        rendered(kind, i).image[a].mean() - rendered(kind, i).image[b].mean()
        for i, (a, b) in enumerate(zip(under, beside, strict=True))
    ]
    assert np.mean(difference) > 5


@pytest.mark.parametrize("kind", ["round", "oval", "lobular", "irregular", "spiculated", "lymph node"])
def test_masses_are_darker_than_what_surrounds_them(kind):
    for index, density in enumerate("AD"):
        picture = rendered(kind, index, density)
        ring = ndimage.binary_dilation(picture.mask, iterations=20) & ~ndimage.binary_dilation(picture.mask)
        assert picture.image[picture.mask].mean() < picture.image[ring].mean() - 15


def test_calcifications_are_bright():
    gains = []
    for index in range(4):
        mask = rendered("calcifications", index).mask
        pair = [rendered(kind, index).image[mask].mean() for kind in ("calcifications", None)]
        gains.append(pair[0] - pair[1])
    assert min(gains) > 10
    assert np.mean(gains) > 30


def test_slice_of_a_ball_is_a_disc():
    ball = Ellipsoid(to_unit=np.eye(3) / 6, kind="round")
    picture = render_slice(streams(0), "B", "L", ball)
    assert picture.mask.sum() * picture.spacing_mm**2 == pytest.approx(36 * np.pi, rel=0.01)
    xmin, ymin, xmax, ymax = picture.box
    assert (xmax - xmin) * SPACING == pytest.approx(12, abs=0.2)
    assert (ymax - ymin) * SPACING == pytest.approx(12, abs=0.2)


@pytest.mark.parametrize("kind", sorted(set(LESIONS) - {"calcifications"}))
@pytest.mark.parametrize("laterality", ["L", "R"])
def test_mask_is_where_the_plane_cuts_the_body(kind, laterality):
    body = draw(kind, 1)
    u, v = (np.arange(-260, 260) * 0.1 + 0.03, np.arange(-250, 250) * 0.1 + 0.01)
    mask = slice_distance(body, laterality, u, v) > 0
    toward_nipple, sideways = -v[:, None], u[None, :] * (1 if laterality == "L" else -1)
    np.testing.assert_array_equal(mask, body.level(toward_nipple, sideways, np.zeros((1, 1))) > 0)
    assert mask.any()


def test_distance_is_in_millimeters():
    ball = Ellipsoid(to_unit=np.eye(3) / 6)
    axis = np.arange(-100, 100) * 0.1 + 0.05
    distance = slice_distance(ball, "L", axis, axis)
    exact = 6 - np.hypot(axis[:, None], axis)
    near = np.abs(exact) < 0.5
    np.testing.assert_allclose(distance[near], exact[near], atol=0.05)


def test_beam_meets_a_whole_speck_or_none():
    specks = np.array([[0, 0, 0.0, 0.3], [1, 1, 0.5, 0.2], [2, -1, 0.6, 0.2], [-2, 0, 3.0, 0.4]])
    axis = np.arange(-200, 200) * 0.02
    mask = slice_distance(Cluster(specks=specks), "L", axis, axis) > 0
    assert ndimage.label(mask)[1] == 3
    assert mask.sum() * 0.02**2 == pytest.approx(np.pi * (0.3**2 + 2 * 0.2**2), rel=0.02)


@pytest.mark.parametrize("kind", ["round", "spiculated"])
def test_healthy_twin_differs_in_and_behind_the_lesion_only(kind):
    picture, twin = rendered(kind, 0), rendered(None, 0)
    assert not twin.mask.any()
    assert twin.box is None
    changed = picture.image != twin.image
    xmin, ymin, xmax, _ = picture.box
    near = round(3 / SPACING)
    assert changed[picture.mask].mean() > 0.8
    assert not changed[: max(0, ymin - near)].any()
    assert not changed[:, : max(0, xmin - near)].any()
    assert not changed[:, xmax + near :].any()


def test_same_streams_same_slice():
    first, again = (render_slice(streams(3), "C", "L", draw("lobular")) for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    assert (first.image != render_slice(streams(4), "C", "L", draw("lobular")).image).any()


def test_denser_classes_show_more_gland():
    def brightness(density: str) -> float:
        rows = slice(round(LAYERS["A"][0] / SPACING), round(LAYERS["D"][1] / SPACING) - 15)
        return float(np.mean([rendered(None, index, density).image[rows].mean() for index in range(2)]))

    levels = [brightness(density) for density in "ABCD"]
    assert levels == sorted(levels)
    assert levels[3] > levels[0] + 10


@pytest.mark.parametrize("density", "AD")
@pytest.mark.parametrize("kind", ["round", "irregular", "spiculated"])
def test_masses_lie_under_the_skin(kind, density):
    for index in range(2):
        body = draw(kind, index, radius=9.0 if density == "A" else 7.0)
        core = body.core if kind == "spiculated" else body
        picture = render_slice(streams(index), density, "L", core)
        assert picture.box[1] * SPACING > SKIN_DEPTH
        assert picture.box[3] * SPACING < LAYERS[density][1] + 1


def test_a_body_without_acoustics_is_refused():
    with pytest.raises(GBCIError, match="kind 'ellipsoid' has no acoustics; expected one of round"):
        render_slice(streams(0), "B", "L", Ellipsoid(to_unit=np.eye(3)))

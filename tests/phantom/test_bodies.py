"""Lesion bodies: volume, path lengths and level set agree with one another."""

import numpy as np
import pytest

from gbci_fast.phantom.bodies import (
    VIEW_AXES,
    Body,
    Ellipsoid,
    draw_cluster,
    draw_mass,
    draw_node,
    draw_star,
)

KINDS = ("round", "oval", "lobular", "irregular", "spiculated", "star", "lymph node", "calcifications")
MASSES = KINDS[:4]


def draw(kind: str, seed: int = 0) -> Body:
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    if kind == "star":
        return draw_star(rng, 15.0)
    if kind == "lymph node":
        return draw_node(rng, 8.0)
    if kind == "calcifications":
        return draw_cluster(rng, 5.0, np.array([1.0, 0.3, -0.2]))
    return draw_mass(rng, kind, 6.0)


def pixels(body: Body, spacing: float) -> np.ndarray:
    count = int(np.ceil(body.radius / spacing)) + 2
    return (np.arange(-count, count) + 0.37) * spacing


def test_axes_are_right_handed_frames():
    for axes in VIEW_AXES.values():
        np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(axes) == pytest.approx(1)


def test_a_ball_is_a_ball():
    ball = Ellipsoid(to_unit=np.eye(3) / 5)
    u = pixels(ball, 0.1)
    path = ball.path(VIEW_AXES["MLO"], u, u)
    distance = np.hypot(u[None, :], u[:, None])
    clear = distance < 4.8
    np.testing.assert_allclose(path[clear], 2 * np.sqrt(25 - distance[clear] ** 2), rtol=2e-3)
    assert not path[distance > 5.1].any()
    assert ball.volume_mm3 == pytest.approx(4 / 3 * np.pi * 125)
    assert ball.radius == pytest.approx(5)


@pytest.mark.parametrize("kind", KINDS)
def test_volume_is_what_is_inside(kind):
    body = draw(kind)
    step = 0.1 if kind == "calcifications" else 0.35
    ticks = np.arange(-body.radius - step, body.radius + step, step) + step / 3
    inside = body.level(ticks[:, None, None], ticks[None, :, None], ticks[None, None, :]) > 0
    assert inside.sum() * step**3 == pytest.approx(body.volume_mm3, rel=0.02)
    corner = np.stack(np.nonzero(inside))
    distance = np.linalg.norm(ticks[corner], axis=0)
    assert 0.7 * body.radius < distance.max() <= body.radius


@pytest.mark.parametrize("spacing", [0.1, 0.47, 1.9])
@pytest.mark.parametrize("kind", KINDS)
def test_every_view_sees_the_whole_volume(kind, spacing):
    body = draw(kind)
    u = pixels(body, spacing)
    for axes in VIEW_AXES.values():
        path = body.path(axes, u, u)
        assert path.sum() * spacing**2 == pytest.approx(body.volume_mm3, rel=0.02)
        border = np.concatenate([path[0], path[-1], path[:, 0], path[:, -1]])
        assert not border.any()  # nothing beyond the radius


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_the_length_of_the_ray_inside(kind):
    body = draw(kind, seed=1)
    axes = VIEW_AXES["MLO"]
    u = pixels(body, 0.12)
    path = body.path(axes, u, u)
    s = np.arange(-body.radius, body.radius, 0.02)
    rows, columns = np.nonzero(path > 0.3 * path.max())
    errors = []
    for i in np.random.default_rng(0).choice(len(rows), 40, replace=False):
        points = axes[0] * u[columns[i]] + axes[1] * u[rows[i]] + axes[2] * s[:, None]
        errors.append(path[rows[i], columns[i]] - (body.level(*points.T) > 0).sum() * 0.02)
    # A sampling step of 0.25 mm is coarse for rays that graze a surface.
    assert np.median(np.abs(errors)) < 0.05
    assert np.abs(np.mean(errors)) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_scaled(kind):
    body = draw(kind)
    small = body.scaled(0.5)
    assert small.volume_mm3 == pytest.approx(body.volume_mm3 / 8, rel=0.02)
    assert small.radius == pytest.approx(body.radius / 2)
    u = pixels(body, 0.5)
    axes = VIEW_AXES["CC"]
    if kind in MASSES:
        np.testing.assert_allclose(small.path(axes, u / 2, u / 2) * 2, body.path(axes, u, u), atol=0.4)


@pytest.mark.parametrize("kind", MASSES)
def test_the_volume_of_a_core_is_that_of_its_ball(kind):
    assert draw(kind).volume_mm3 == pytest.approx(4 / 3 * np.pi * 6**3, rel=1e-4)


def test_shapes_deserve_their_names():
    def roughness(kind: str) -> float:
        """Standard deviation of the radius over directions, relative to its mean."""
        return float(np.mean([(lambda r: r.std() / r.mean())(draw(kind, seed)._sphere[2]) for seed in range(8)]))

    assert roughness("round") < 0.05 < roughness("lobular") < roughness("irregular") + 0.1
    assert roughness("irregular") > 0.12

    def elongation(kind: str) -> float:
        values = [np.linalg.svd(draw(kind, seed).to_unit, compute_uv=False) for seed in range(8)]
        return float(np.mean([s[0] / s[-1] for s in values]))

    assert elongation("round") < 1.2
    assert elongation("oval") > 1.4


def test_spicules_reach_beyond_the_core_on_all_sides():
    body = draw("spiculated")
    tips = np.stack([strand.center / np.linalg.norm(strand.center) for strand in body.strands])
    assert len(tips) >= 26
    assert np.linalg.norm(tips.mean(axis=0)) < 0.3
    assert body.radius > 1.4 * body.core.radius


def test_a_node_has_a_hilum_without_tissue():
    node = draw("lymph node")
    inside_hilum = node.hilum.center * 0.9
    assert node.outer.level(*inside_hilum) > 0
    assert node.level(*inside_hilum) < 0
    assert 0.005 < 1 - node.volume_mm3 / node.outer.volume_mm3 < 0.2


def test_specks_lie_along_their_duct():
    duct = np.array([0.6, 0.0, 0.8])
    for seed in range(6):
        cluster = draw_cluster(np.random.default_rng(seed), 5.0, duct)
        assert 7 <= len(cluster.specks) <= 20
        assert ((cluster.specks[:, 3] >= 0.1) & (cluster.specks[:, 3] <= 0.4)).all()
    specks = np.concatenate([draw_cluster(np.random.default_rng(s), 5.0, duct).specks for s in range(20)])
    along = specks[:, :3] @ duct
    across = np.linalg.norm(specks[:, :3] - along[:, None] * duct, axis=1)
    assert along.std() > 1.2 * across.std()

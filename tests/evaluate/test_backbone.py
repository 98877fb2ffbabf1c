"""EfficientNet-Lite0 of the wheel."""

import numpy as np
import pytest

from gbci_fast.evaluate.backbone import MIDDLE_WIDTH, WIDTH, open_lite0


@pytest.mark.parametrize("name", ["last", "middle"])
def test_features_are_of_the_image_alone_and_tell_textures_apart(name):
    net = open_lite0()
    features, width = {"last": (net, WIDTH), "middle": (net.middle, MIDDLE_WIDTH)}[name]
    rng = np.random.default_rng(0)
    noise = rng.random((20, 64, 64), np.float32)  # more than a batch
    flat = np.full((2, 64, 64), 0.5, np.float32)
    found = features(np.concatenate([noise, flat]))
    assert found.shape == (22, width)
    np.testing.assert_allclose(features(noise[17:18])[0], found[17], rtol=1e-3, atol=1e-4)
    among_noise = np.linalg.norm(found[0] - found[1])
    assert np.linalg.norm(found[0] - found[-1]) > 2 * among_noise
    np.testing.assert_allclose(found[-1], found[-2], rtol=1e-5, atol=1e-6)

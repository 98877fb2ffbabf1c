"""EfficientNet-Lite0 of the wheel."""

import numpy as np

from gbci_fast.evaluate.backbone import WIDTH, open_lite0


def test_features_are_of_the_image_alone_and_tell_textures_apart():
    net = open_lite0()
    rng = np.random.default_rng(0)
    noise = rng.random((20, 64, 64), np.float32)  # more than a batch
    flat = np.full((2, 64, 64), 0.5, np.float32)
    found = net(np.concatenate([noise, flat]))
    assert found.shape == (22, WIDTH)
    np.testing.assert_allclose(net(noise[17:18])[0], found[17], rtol=1e-4, atol=1e-5)
    among_noise = np.linalg.norm(found[0] - found[1])
    assert np.linalg.norm(found[0] - found[-1]) > 2 * among_noise
    np.testing.assert_allclose(found[-1], found[-2], rtol=1e-5, atol=1e-6)

"""gbci_fast.ops.composite paints on the native grid what `engine.paste` does."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from gbci_fast.data.frame import box_ellipse
from gbci_fast.data.vindr import VinDr, find_inputs
from gbci_fast.generate.template import open_template, paste
from gbci_fast.ops.composite import composite

MARGIN = 4  # model pixels decoded around the mask


def lesion(template):
    """A mask in the breast, bool [H, W], its box, and the feathered weight that `paste` gives it there."""
    height, width = template.mammogram.shape
    ys, xs = np.nonzero(template.frame.to_native(template.breast, (0, 0, width, height)) > 0.5)
    center, radius = (xs.mean(), ys.mean()), (0.2 * np.ptp(xs), 0.15 * np.ptp(ys))
    box = tuple(int(c + sign * r) for sign in (-1, 1) for c, r in zip(center, radius, strict=True))
    mask = box_ellipse(box, (height, width))
    inside = np.s_[box[1] : box[3], box[0] : box[2]]
    depth = ndimage.distance_transform_edt(mask)[inside]
    return mask, box, inside, np.minimum(1, depth * template.frame.scale[0]).astype(np.float32)


def synthesis(template, seed):
    """The template with blobs brighter and darker, float32 [S, S]."""
    noise = np.random.default_rng(seed).normal(size=template.pixels.shape)
    blobs = ndimage.gaussian_filter(noise, 2)
    return np.clip(template.pixels + 0.2 * blobs / np.abs(blobs).max(), 0, 1).astype(np.float32)


def painted(originals, weights, synthetics, templates, boxes):
    """`composite` of one lesion per template, decoding only a window of model space around each."""
    frames = [template.frame for template in templates]
    corners = []
    for frame, box in zip(frames, boxes, strict=True):
        x, y = frame.box_to_model(box)[:2]
        corners.append((max(0, int(x) - MARGIN), max(0, int(y) - MARGIN)))
    side = 140  # of every decoded window; some reach the image's border

    def decoded(images):
        crops = [image[y : y + side, x : x + side] for image, (x, y) in zip(images, corners, strict=True)]
        padded = [np.pad(crop, [(0, side - length) for length in crop.shape], mode="edge") for crop in crops]
        return torch.from_numpy(np.stack(padded))[:, None]

    return composite(
        [torch.from_numpy(original) for original in originals],
        [torch.from_numpy(weight) for weight in weights],
        decoded(synthetics),
        template=decoded([template.pixels for template in templates]),
        affine=[frame.window_affine(box, corner) for frame, box, corner in zip(frames, boxes, corners, strict=True)],
    )


def test_of_display_values_in_phantoms_of_either_side(phantom):
    templates = [open_template(record) for record in VinDr(phantom).images]
    assert {template.frame.flip for template in templates} == {False, True}
    synthetics = [synthesis(template, seed) for seed, template in enumerate(templates)]
    masks, boxes, insides, weights = zip(*map(lesion, templates), strict=True)
    stored = [template.mammogram.stored[inside] for template, inside in zip(templates, insides, strict=True)]
    presentations = [template.mammogram.presentation for template in templates]
    units = [shown.to_unit(part) for shown, part in zip(presentations, stored, strict=True)]
    ours = [image.numpy() for image in painted(units, weights, synthetics, templates, boxes)]
    for i, template in enumerate(templates):
        change = template.frame.to_native(synthetics[i] - template.pixels, boxes[i])
        expected = np.clip(units[i] + weights[i] * change, 0, 1)
        assert np.abs(expected - units[i]).max() > 0.05
        # `to_native` rounds its grid to float32: 1e-5 of a pixel, where a pixel more may be a tenth brighter.
        np.testing.assert_allclose(ours[i], expected, rtol=0, atol=5e-6)
        pasted = paste(template, synthetics[i], masks[i])[insides[i]]
        difference = presentations[i].paste(stored[i], ours[i]).astype(int) - pasted
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.02


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_sixteen_bits_far_finer_than_the_model(breast, tmp_path, side):
    unit = breast(900, 700)
    stored = np.round(65535 * unit / unit.max()).astype(np.uint16)
    path = tmp_path / f"fine_{side[0].upper()}CC.png"
    Image.fromarray(stored if side == "left" else stored[:, ::-1]).save(path)
    template = open_template(find_inputs(path)[0])
    assert template.frame.flip == (side == "right")
    assert template.frame.scale[0] < 0.3
    mask, box, inside, weight = lesion(template)
    synthetic = synthesis(template, seed=0)
    (ours,) = painted([template.mammogram.stored[inside]], [weight], [synthetic], [template], [box])
    pasted = paste(template, synthetic, mask)[inside]
    assert ours.dtype == torch.uint16
    assert (pasted != template.mammogram.stored[inside]).mean() > 0.5
    assert np.abs(ours.numpy().astype(int) - pasted).max() <= 1

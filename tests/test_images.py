"""Images in and out: every form reads as the same tensor, 8 and 16 bits survive, the rest is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from gbci_fast.errors import GBCIError
from gbci_fast.images import from_tensor, to_tensor

EIGHT = np.arange(256, dtype=np.uint8).reshape(16, 16)
SIXTEEN = np.arange(65536, dtype=np.uint16).reshape(256, 256)
UNIT8 = torch.from_numpy(EIGHT.astype(np.float32) / np.float32(255))[None, None]
UNIT16 = torch.from_numpy(SIXTEEN.astype(np.float32) / np.float32(65535))[None, None]

FORMS_8 = {
    "pil-L": Image.fromarray(EIGHT),
    "uint8": EIGHT,
    "uint8-channel": EIGHT[..., None],
    "uint8-batch": EIGHT[None, ..., None],
    "tensor": torch.from_numpy(EIGHT),
    "tensor-channel": torch.from_numpy(EIGHT)[None],
    "tensor-batch": torch.from_numpy(EIGHT)[None, None],
}
FORMS_16 = {
    "pil-I;16": Image.fromarray(SIXTEEN),
    "pil-I": Image.fromarray(SIXTEEN.astype(np.int32)),
    "uint16": SIXTEEN,
    "uint16-swapped": SIXTEEN.astype(">u2"),
    "float32": SIXTEEN.astype(np.float32) / np.float32(65535),
    "float64": SIXTEEN / 65535,
    "tensor": UNIT16,
    "tensor-2d": UNIT16[0, 0],
    "list": [SIXTEEN],
}


@pytest.mark.parametrize("image", FORMS_8.values(), ids=FORMS_8)
def test_eight_bit_forms(image):
    read, depth = to_tensor(image, "image")
    assert torch.equal(read, UNIT8)
    assert depth == 255


@pytest.mark.parametrize("image", FORMS_16.values(), ids=FORMS_16)
def test_sixteen_bit_and_float_forms(image):
    read, depth = to_tensor(image, "image")
    assert read.dtype == torch.float32
    assert torch.equal(read, UNIT16)
    assert depth == 65535


@pytest.mark.parametrize("image", [Image.fromarray(EIGHT > 99), EIGHT > 99, torch.from_numpy(EIGHT > 99)])
def test_bilevel_forms(image):
    assert torch.equal(to_tensor(image, "mask")[0][0, 0], torch.from_numpy(EIGHT > 99).float())


def test_every_stored_value_comes_back():
    (eight,) = from_tensor(UNIT8, "pil", 255)
    (sixteen,) = from_tensor(UNIT16, "pil", 65535)
    assert (eight.mode, sixteen.mode) == ("L", "I;16")
    assert np.array_equal(np.asarray(eight), EIGHT)
    assert np.array_equal(np.asarray(sixteen), SIXTEEN)


def test_arrays_and_tensors_out():
    two = torch.cat([UNIT8, 1 - UNIT8])
    assert from_tensor(two, "pt", 255) is two
    array = from_tensor(two, "np", 255)
    assert array.shape == (2, 16, 16, 1)
    assert np.array_equal(array[1, ..., 0], 1 - UNIT8[0, 0].numpy())
    assert len(from_tensor(two, "pil", 255)) == 2
    with pytest.raises(GBCIError, match="the sampled image holds NaN or infinity"):
        from_tensor(two / 0, "pil", 255)


def test_a_list_becomes_a_batch_in_the_larger_depth():
    read, depth = to_tensor([EIGHT, torch.rand(3, 1, 16, 16)], "image")
    assert read.shape == (4, 1, 16, 16)
    assert depth == 65535


REFUSED = {
    "rgb": (Image.new("RGB", (4, 4)), "image has PIL mode 'RGB'; expected a gray image (L or I;16)"),
    "rgba-array": (
        np.zeros((4, 4, 4)),
        "image has shape [4, 4, 4]; expected [H, W], [H, W, 1] or [B, H, W, 1]",
    ),
    "three-channels": (torch.zeros(3, 4, 4), "image has shape [1, 3, 4, 4]; expected one channel, [B, 1, H, W]"),
    "five-axes": (torch.zeros(1, 1, 1, 4, 4), "image has shape [1, 1, 1, 4, 4]; expected one channel, [B, 1, H, W]"),
    "one-axis": (np.zeros(16), "image has shape [16]; expected one channel, [B, 1, H, W]"),
    "no-pixel": (np.zeros((0, 4)), "image has shape [1, 1, 0, 4]; expected at least one pixel"),
    "no-image": ([], "image is an empty list; expected at least one image"),
    "int32": (np.zeros((4, 4), np.int32), "image has dtype int32; expected uint8, uint16 or float in [0, 1]"),
    "long": (torch.zeros(4, 4, dtype=torch.long), "image has dtype torch.int64; expected uint8 or float in [0, 1]"),
    "not-scaled": (np.full((4, 4), 255.0), "image has values from 255 to 255; expected [0, 1]"),
    "negative": (torch.full((4, 4), -0.5), "image has values from -0.5 to -0.5; expected [0, 1]"),
    "nan": (torch.tensor([[0.0, torch.nan]]), "image has values from nan to nan; expected [0, 1]"),
    "too-large-I": (
        Image.fromarray(np.full((4, 4), 131070, np.int32)),
        "image has values from 2 to 2; expected [0, 1]",
    ),
    "name": ("photo.png", "image is a str; expected a PIL image, an array or a tensor"),
    "nested": ([[0, 1], [1, 0]], "image is a list; expected a PIL image, an array or a tensor"),
    "sizes": ([EIGHT, EIGHT[:8]], "image holds images of sizes [(8, 16), (16, 16)]; expected one size"),
}


@pytest.mark.parametrize(("image", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(image, sentence):
    with pytest.raises(GBCIError) as raised:
        to_tensor(image, "image")
    assert str(raised.value) == sentence

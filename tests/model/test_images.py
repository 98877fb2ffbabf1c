"""Images in and out: every form reads as the same tensor, 8 and 16 bits are kept, other forms are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from gbci_fast.errors import GBCIError
from gbci_fast.model.images import from_tensor, to_mask, to_tensor

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


DRAWN = EIGHT > 99
INTEGERS = {name: np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", ">u2", "int32", "int64", "uint64")}


def forms_of_mask(levels):
    """A mask of these two values, as every integer type that holds them, by name."""
    low, high = levels
    values = np.where(DRAWN, high, low)
    for name, dtype in INTEGERS.items():
        if high <= np.iinfo(dtype).max:
            typed = values.astype(dtype)
            yield f"array {name}", typed
            yield f"batch {name}", typed[None, ..., None]
            if dtype.isnative:
                yield f"tensor {name}", torch.from_numpy(typed)
                yield f"tensor batch {name}", torch.from_numpy(typed)[None, None]
    if high <= 255:
        yield "pil L", Image.fromarray(values.astype(np.uint8))
    yield "pil I;16", Image.fromarray(values.astype(np.uint16))
    yield "pil I", Image.fromarray(values.astype(np.int32))


@pytest.mark.parametrize("levels", [(0, 1), (0, 255), (0, 100), (20, 220), (0, 2**15), (0, 2**16 - 1)])
def test_a_mask_of_integers_means_the_same_in_any_type_and_depth(levels):
    want = torch.from_numpy(DRAWN).float()[None, None]
    forms = dict(forms_of_mask(levels))
    assert len(forms) > 10
    assert [name for name, form in forms.items() if not torch.equal(to_mask(form, "mask"), want)] == []


def test_integer_masks_of_a_batch_are_judged_one_by_one():
    faint, nothing = DRAWN.astype(np.uint8), np.zeros((16, 16), np.uint8)
    want = torch.from_numpy(np.stack([DRAWN, DRAWN, np.zeros_like(DRAWN)])).float()[:, None]
    three = np.stack([faint, faint * 255, nothing])
    assert torch.equal(to_mask(three[..., None], "mask"), want)
    assert torch.equal(to_mask(torch.from_numpy(three)[:, None], "mask"), want)
    assert torch.equal(to_mask(list(three), "mask"), want)


def test_float_and_bilevel_masks():
    for given in (DRAWN, Image.fromarray(DRAWN), torch.from_numpy(DRAWN), DRAWN * 0.6, torch.from_numpy(DRAWN * 0.6)):
        assert torch.equal(to_mask(given, "mask")[0, 0], torch.from_numpy(DRAWN).float())
    assert not to_mask(DRAWN * 0.4, "mask").any()


def test_soft_edges_of_integer_masks():
    """More gray values than a label map is likely to have: nine in 8 bits, and seventeen if the values are small."""
    for soft in (EIGHT % 9 * 31, EIGHT % 17):
        assert torch.equal(to_mask(soft, "mask")[0, 0], torch.from_numpy(soft > soft.max() / 2).float())


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (EIGHT % 3, "mask has the values 0, 1, 2; expected two values, or the many grays of soft edges"),
        (
            torch.from_numpy(EIGHT % 3),
            "mask has the values 0, 1, 2; expected two values, or the many grays of soft edges",
        ),
        (EIGHT % 3 * 10, "mask has the values 0, 10, 20; expected two values, or the many grays of soft edges"),
        (
            EIGHT.astype(np.int32) % 8 * 9000,
            "mask has the values 0, 9000, 18000, 27000, 36000, 45000, 54000, 63000; expected two values, or the many "
            "grays of soft edges",
        ),
        (-(EIGHT % 2).astype(np.int8), "mask has values from -1; expected none below 0"),
        (np.zeros((0, 4), np.uint8), "mask has shape [1, 1, 0, 4]; expected at least one pixel"),
        (np.full((4, 4), 255.0), "mask has values from 255 to 255; expected [0, 1]"),
        (Image.new("RGB", (4, 4)), "mask has PIL mode 'RGB'; expected a gray image (L or I;16)"),
        (torch.zeros(3, 4, 4, dtype=torch.long), "mask has shape [1, 3, 4, 4]; expected one channel, [B, 1, H, W]"),
    ],
)
def test_mask_refused(mask, sentence):
    with pytest.raises(GBCIError) as raised:
        to_mask(mask, "mask")
    assert str(raised.value) == sentence


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

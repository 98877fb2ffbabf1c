"""composite against its definition in float64: windows of every size on every grid; torch.library's contracts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gbci_fast.model import masks
from gbci_fast.ops.composite import WHITE, composite, composite_ref

SAME = (1.0, 0.0, 1.0, 0.0)
FINE = (0.05, 3.2, 0.05, 6.1)  # 20 native pixels per model pixel
MIRRORED = (-0.13, 19.0, 0.12, 2.5)
COARSE = (2.3, -1.0, 3.1, 0.5)
BEYOND = (1.1, -9.0, -0.7, 31.0)  # mostly outside the decoded window
SHIFTED = (1.0, -3.0, 1.0, 5.0)
WINDOWS = {  # (height, width, affine) each; the decoded windows are 24 x 20
    "minimal": [(1, 1, SAME)],
    "odd": [(37, 50, FINE), (1, 1, MIRRORED), (3, 200, BEYOND), (129, 65, COARSE), (0, 7, SAME), (5, 64, SHIFTED)],
    "native": [(150, 171, FINE), (163, 150, MIRRORED), (158, 160, FINE)],
    "model": [(24, 20, SAME)] * 3,
}
PIXELS, PLANES = (torch.uint8, torch.uint16, torch.float32), (torch.float32, torch.bfloat16, torch.float16)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def example(windows, dtype=torch.float32, plane_dtype=torch.float32, seed=0):
    """originals, weights, synthetic, template and affine; half of the weights are 0, some runs of them are long."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    originals = [(rand(height, width) * WHITE[dtype]).to(dtype) for height, width, _ in windows]
    weights = [(2.2 * rand(height, width) - 1.1).clamp(0, 1) for height, width, _ in windows]
    for weight in weights:
        weight[weight.shape[0] // 2 : -3] = 0
        weight[:, 100:] = 0
    synthetic, template = rand(2, len(windows), 1, 24, 20).to(plane_dtype)
    return originals, weights, synthetic, template, [affine for *_, affine in windows]


def bits(image):
    """Comparable bits: NaN is like itself, -0 unlike 0."""
    return image.cpu().view(torch.int32) if image.dtype == torch.float32 else image.cpu()


def assert_same_bits(ours, expected):
    assert len(ours) == len(expected)
    for image, other in zip(ours, expected, strict=True):
        assert image.dtype == other.dtype
        assert torch.equal(bits(image), bits(other))


def assert_close(ours, expected):
    for image, other in zip(ours, expected, strict=True):
        assert (image.shape, image.dtype) == (other.shape, other.dtype)
        error = (image.double() - other.double()).abs()
        if image.dtype == torch.float32:
            assert error.numel() == 0 or error.max() < 1e-6
        else:  # one level, and only where the value is a tie but for rounding
            assert error.numel() == 0 or (error.max() <= 1 and (error > 0).sum() <= 1 + 0.01 * error.numel())


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("dtype", PIXELS, ids=str)
@pytest.mark.parametrize("plane_dtype", PLANES, ids=str)
@pytest.mark.parametrize("is_change", [False, True], ids=["replace", "change"])
def test_equals_the_reference(windows, dtype, plane_dtype, is_change):
    originals, weights, synthetic, template, affine = example(windows, dtype, plane_dtype)
    options = {"template": template if is_change else None, "affine": affine}
    ours = composite(originals, weights, synthetic, **options)
    assert_close(ours, composite_ref(originals, weights, synthetic, **options))
    for image, original, weight in zip(ours, originals, weights, strict=True):
        assert torch.equal(image[weight == 0], original[weight == 0])


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    model=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    affine=st.tuples(*[st.floats(-3, 3), st.floats(-40, 40)] * 2),
    is_change=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_equals_the_reference_on_any_grid(size, model, affine, is_change, seed):
    generator = torch.Generator().manual_seed(seed)
    original, weight = torch.rand(2, 1, 1, *size, generator=generator)
    synthetic, template = torch.rand(2, 1, 1, *model, generator=generator)
    options = {"template": template if is_change else None, "affine": [affine]}
    assert_close(
        composite(original, weight, synthetic, **options), composite_ref(original, weight, synthetic, **options)
    )


@pytest.mark.parametrize("radius", [0, 2])
def test_in_model_space_it_is_the_pipelines_composite(radius):
    generator = torch.Generator().manual_seed(0)
    image, synthetic = torch.rand(2, 3, 1, 64, 96, generator=generator)
    mask = torch.zeros(3, 1, 64, 96)
    mask[0, :, 10:30, 15:40] = mask[1, :, 0:9, 70:] = 1
    synthetic[mask == 0] = torch.nan
    ours = composite(image, masks.feather_pixels(mask, radius), synthetic)
    torch.testing.assert_close(ours, masks.composite(image, synthetic, mask, radius), rtol=0, atol=2**-23)
    assert torch.equal(ours[mask == 0], image[mask == 0])


@pytest.mark.parametrize("dtype", PIXELS, ids=str)
def test_weight_0_keeps_the_bits_whatever_they_are(dtype):
    (original,), _, synthetic, template, _ = example([(30, 70, SAME)], dtype)
    if dtype == torch.float32:
        original[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 7.5, -3e-42])
    for zero in (0.0, -0.0):
        for given_template in (None, template):
            painted = composite(
                [original], [torch.full((30, 70), zero)], synthetic * torch.nan, template=given_template, affine=[FINE]
            )
            assert_same_bits(painted, [original])


@pytest.mark.parametrize("is_change", [False, True], ids=["replace", "change"])
@pytest.mark.parametrize(
    "affine",
    [
        SAME,
        (-1.0, 20.0, -1.0, 24.0),
        (1.0, 0.0, 0.25, 1.375),
        (2.0, -0.5, 1.0, 0.0),
        (1.0, -1e-10, 1.0, -1e-10),  # before a center by less than float32 can say
    ],
)
def test_a_tap_of_weight_0_is_not_read(affine, is_change):
    """On a grid that meets model pixels' centers along an axis, NaN beside them does not come in."""
    _, _, synthetic, template, _ = example([(24, 20, SAME)])
    scale_x, offset_x, scale_y, offset_y = affine
    x, y = scale_x * (torch.arange(10.0) + 0.5) + offset_x - 0.5, scale_y * (torch.arange(9.0) + 0.5) + offset_y - 0.5
    whole = (y == y.round())[:, None] & (x == x.round())
    row, column = y.round().long()[:, None], x.round().long()
    dotted = torch.full_like(synthetic, torch.nan)
    for i, j in ((0, 0), (3, 3)):  # the only numbers are at two centers
        dotted[0, 0, row[i], column[j]] = synthetic[0, 0, row[i], column[j]]
    options = {"template": template if is_change else None, "affine": [affine]}
    painted = composite([torch.zeros(9, 10)], [torch.ones(9, 10)], dotted, **options)[0]
    expected = (dotted[0, 0] - template[0, 0] if is_change else dotted[0, 0])[row, column].clamp(0, 1)
    assert 0 < expected[whole].isnan().sum() < whole.sum()
    torch.testing.assert_close(painted[whole], expected[whole], rtol=0, atol=0, equal_nan=True)


def test_weight_1_is_the_synthesis():
    (original,), _, synthetic, template, _ = example([(24, 20, SAME)])
    one = torch.ones(24, 20)
    synthetic[0, 0, 0, 0] = 1e-9  # the difference to the pixel cannot say it
    assert torch.equal(composite([original], [one], synthetic)[0], synthetic[0, 0])
    whole = composite([(original * 65535).to(torch.uint16)], [one], synthetic)[0]
    assert torch.equal(whole.int(), (synthetic[0, 0] * 65535).round().int())
    changed = composite([original], [one], synthetic, template=template)[0]
    torch.testing.assert_close(changed, (original + (synthetic - template)[0, 0]).clamp(0, 1))
    mirrored = composite([original], [one], synthetic, affine=[(-1.0, 20.0, -1.0, 24.0)])[0]
    assert torch.equal(mirrored, synthetic[0, 0].flip(0, 1))


def test_no_change_is_the_original():
    for dtype in (torch.uint8, torch.uint16):
        originals, weights, synthetic, _, affine = example(WINDOWS["native"], dtype)
        assert_same_bits(composite(originals, weights, synthetic, template=synthetic, affine=affine), originals)


def test_integers_by_hand():
    original = torch.tensor([[10, 10, 10, 10, 10, 4095, 5000, 5000]], dtype=torch.uint16)
    weight = torch.tensor([[0.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0]])
    unit = torch.tensor([[0.0, 2.5, 30.0, 1e9, -7.0, 4095.0, 5000.0, 0.0]]) / 4095
    painted = composite([original], [weight], unit[None, None], white=4095)[0]
    # 2.5 to even; above white it is clipped where it is painted, and only there
    assert painted.tolist() == [[10, 2, 20, 4095, 0, 4095, 4095, 5000]]
    change = composite([original], [weight], unit[None, None], template=torch.zeros(1, 1, 1, 8), white=4095)[0]
    assert change.tolist() == [[10, 12, 25, 4095, 3, 4095, 4095, 5000]]


def test_nan_stays_nan_in_floats_and_is_a_black_spot_in_integers():
    synthetic, one = torch.full((1, 1, 1, 3), 0.5), torch.ones(1, 3)
    synthetic[..., 1] = torch.nan
    assert composite([torch.ones(1, 3)], [one], synthetic)[0].isnan().tolist() == [[False, True, False]]
    for dtype in (torch.uint8, torch.uint16):
        painted = composite([torch.full((1, 3), 100, dtype=dtype)], [one], synthetic)[0]
        assert painted[0].tolist() == [round(WHITE[dtype] / 2), 0, round(WHITE[dtype] / 2)]


def test_strided_planes_are_read_by_their_strides():
    originals, weights, synthetic, template, affine = example(WINDOWS["odd"])
    expected = composite(originals, weights, synthetic, template=template, affine=affine)
    pair = torch.cat([synthetic, template], 1).to(memory_format=torch.channels_last)
    assert pair[:, 1:].stride(3) == 2
    assert_same_bits(composite(originals, weights, pair[:, :1], template=pair[:, 1:], affine=affine), expected)
    column_major = synthetic.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same_bits(composite(originals, weights, column_major, template=template, affine=affine), expected)
    one = synthetic[:1].expand(len(originals), 1, 24, 20)
    assert_same_bits(
        composite(originals, weights, one, affine=affine), composite(originals, weights, one.clone(), affine=affine)
    )


def test_a_window_does_not_depend_on_its_batch_or_on_the_number_of_threads():
    originals, weights, synthetic, template, affine = example(WINDOWS["native"] + WINDOWS["odd"], torch.uint16)
    batch = composite(originals, weights, synthetic, template=template, affine=affine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert_same_bits(batch, composite(originals, weights, synthetic, template=template, affine=affine))
    finally:
        torch.set_num_threads(threads)
    order = [4, 0, 7, 2, 8, 1, 6, 3, 5]
    pick = [[part[i] for i in order] for part in (originals, weights, affine)]
    permuted = composite(*pick[:2], synthetic[order], template=template[order], affine=pick[2])
    assert_same_bits(permuted, [batch[i] for i in order])
    for i in range(len(batch)):
        single = composite(
            originals[i : i + 1],
            weights[i : i + 1],
            synthetic[i : i + 1],
            template=template[i : i + 1],
            affine=affine[i : i + 1],
        )
        assert_same_bits(single, batch[i : i + 1])


def flat(dtype=torch.uint16):
    """Arguments of the operator itself."""
    originals, weights, synthetic, template, affine = example([(3, 5, SAME), (4, 2, FINE)], dtype)
    pixels, weight = (torch.cat([image.flatten() for image in images]) for images in (originals, weights))
    sizes = torch.tensor([image.shape for image in originals])
    return pixels, weight, synthetic, template, sizes, torch.tensor(affine, dtype=torch.float64), WHITE[dtype]


def test_opcheck():
    for dtype in PIXELS:
        arguments = flat(dtype)
        torch.library.opcheck(torch.ops.gbci_fast.composite.default, arguments)
        torch.library.opcheck(torch.ops.gbci_fast.composite.default, (*arguments[:3], None, *arguments[4:]))


def test_compiles_without_graph_breaks():
    def painted(originals, weights, synthetic, template):
        return composite(originals, weights, synthetic + 0, template=template)

    compiled = torch.compile(painted, fullgraph=True, backend="aot_eager", dynamic=True)
    for windows in ([(24, 20, SAME)] * 2, [(7, 20, SAME)] * 2):
        originals, weights, synthetic, template, _ = example(windows)
        arguments = torch.stack(originals)[:, None], torch.stack(weights)[:, None], synthetic, template
        assert torch.equal(compiled(*arguments), painted(*arguments))
        ragged = [originals[0], originals[1][:5]], [weights[0], weights[1][:5]], synthetic, None
        assert all(map(torch.equal, compiled(*ragged), painted(*ragged)))


def test_windows_one_after_the_other_need_no_copy_into_that_form():
    originals, weights, synthetic, template, affine = example(WINDOWS["odd"], torch.uint8)
    pixels, weight = (torch.cat([image.flatten() for image in images]) for images in (originals, weights))
    options = {"template": template, "affine": affine}
    painted = composite(pixels, weight, synthetic, sizes=[image.shape for image in originals], **options)
    expected = composite(originals, weights, synthetic, **options)
    assert torch.equal(painted, torch.cat([image.flatten() for image in expected]))


def replaced(**changes):
    names = ("pixels", "weight", "synthetic", "template", "sizes", "affine", "white")
    arguments = dict(zip(names, flat(), strict=True))
    return tuple((arguments | changes).values())


PIX, WEIGHT, SYNTHETIC, TEMPLATE, SIZES, AFFINE, _ = flat()
NAN = torch.tensor([SAME, (1.0, 0.0, torch.nan, 0.0)], dtype=torch.float64)
FAR = torch.tensor([(1.0, -3e9, 1.0, 0.0), SAME], dtype=torch.float64)
REJECTIONS = [
    (replaced(pixels=PIX.short()), "pixels must be uint8, uint16 or float32, got Short"),
    (replaced(pixels=PIX[None]), "pixels must be [N], got [1, 23]"),
    (replaced(pixels=PIX.repeat(2)[::2]), "pixels must be contiguous, got stride 2"),
    (replaced(weight=WEIGHT.double()), "weight must be float32, got Double"),
    (replaced(weight=WEIGHT[1:]), "weight must be [N] with N = 23 as in pixels, got [22]"),
    (replaced(weight=WEIGHT.repeat(2)[::2]), "weight must be contiguous, got stride 2"),
    (replaced(sizes=SIZES.int()), "sizes must be Long [B, 2] on the CPU, got Int [2, 2]"),
    (replaced(sizes=SIZES[:, :1]), "sizes must be Long [B, 2] on the CPU, got Long [2, 1]"),
    (replaced(sizes=SIZES[:0]), "sizes must hold at least one window, got [0, 2]"),
    (replaced(sizes=SIZES - 4), "sizes must be from 0 to 2^31 - 1, got -1 for window 0"),
    (replaced(sizes=SIZES + 2**31), "sizes must be from 0 to 2^31 - 1, got 2147483651 for window 0"),
    (replaced(sizes=SIZES + 1), "the windows of sizes hold more pixels than the 23 of pixels"),
    (replaced(sizes=SIZES - 1), "the windows of sizes hold 11 pixels, but pixels holds 23"),
    (replaced(affine=AFFINE.float()), "affine must be Double [B, 4] on the CPU, got Float [2, 4]"),
    (replaced(affine=AFFINE[:1]), "affine must have a row for each of the 2 windows, got [1, 4]"),
    (replaced(affine=NAN), "affine must be finite and within 2^31, got nan for window 1"),
    (replaced(affine=FAR), "affine must be finite and within 2^31, got -3e+09 for window 0"),
    (replaced(synthetic=SYNTHETIC.double()), "synthetic must be float32, bfloat16 or float16, got Double"),
    (replaced(synthetic=SYNTHETIC[0]), "synthetic must be [B, 1, h, w] with B = 2 as in sizes, got [1, 24, 20]"),
    (replaced(synthetic=SYNTHETIC[:1]), "synthetic must be [B, 1, h, w] with B = 2 as in sizes, got [1, 1, 24, 20]"),
    (replaced(synthetic=SYNTHETIC[:, :, :0]),
     "synthetic must be from 1 to 2^30 - 1 pixels high and wide, got [2, 1, 0, 20]"),
    (replaced(template=TEMPLATE.half()), "template must have the dtype of synthetic, Float, got Half"),
    (replaced(template=TEMPLATE[:1]), "template must be [B, 1, h, w] with B = 2 as in sizes, got [1, 1, 24, 20]"),
    (replaced(template=TEMPLATE[..., 1:]),
     "template must have the shape of synthetic, [2, 1, 24, 20], got [2, 1, 24, 19]"),
    (replaced(white=65536.0), "white must be a whole number from 1 to 65535 for UInt16 pixels, got 65536"),
    (replaced(white=254.5), "white must be a whole number from 1 to 65535 for UInt16 pixels, got 254.5"),
    (replaced(white=0.0), "white must be a whole number from 1 to 65535 for UInt16 pixels, got 0"),
    (replaced(pixels=PIX.byte(), white=256.0), "white must be a whole number from 1 to 255 for Byte pixels, got 256"),
    (replaced(pixels=PIX.float()), "white must be 1 for Float pixels, got 65535"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), REJECTIONS)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(RuntimeError) as raised:
        torch.ops.gbci_fast.composite(*args)
    assert message in str(raised.value).splitlines()[0]


IMAGE, OTHER = torch.zeros(4, 6), torch.zeros(6, 4)
FORMS = [
    ([IMAGE], torch.zeros(1, 1, 4, 6), "weights must come in the form of originals: as many, or likewise one tensor"),
    ([IMAGE], [IMAGE, IMAGE], "weights must come in the form of originals: as many, or likewise one tensor"),
    ([], [], "originals is empty; expected at least one image"),
    (IMAGE, IMAGE, "originals must be [B, 1, H, W] or a sequence of [H, W], got [4, 6]"),
    ([IMAGE, IMAGE[None]], [IMAGE] * 2, "originals[1] is torch.float32 [1, 4, 6]; expected torch.float32 [H, W]"),
    ([IMAGE, IMAGE.byte()], [IMAGE] * 2, "originals[1] is torch.uint8 [4, 6]; expected torch.float32 [H, W]"),
    ([IMAGE, IMAGE], [IMAGE, OTHER], "weights[1] is [6, 4]; expected the shape of originals[1], [4, 6]"),
    ([IMAGE, IMAGE], [IMAGE, IMAGE.half()], "weights[1] is torch.float16; expected torch.float32"),
    (IMAGE[None, None], OTHER[None, None], "weights is [1, 1, 6, 4]; expected the shape of originals, [1, 1, 4, 6]"),
]


@pytest.mark.parametrize(("originals", "weights", "message"), FORMS)
def test_images_and_weights_that_do_not_match_are_named(originals, weights, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the whole message is compared
        composite(originals, weights, torch.zeros(2, 1, 8, 8))
    assert str(raised.value) == message


def test_sizes_beside_a_sequence_are_refused():
    sentence = r"sizes was given beside a sequence; expected it with originals and weights of \[N\] pixels"
    with pytest.raises(ValueError, match=sentence):
        composite([IMAGE], [IMAGE], torch.zeros(1, 1, 8, 8), sizes=[(4, 6)])


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("dtype", PIXELS, ids=str)
@pytest.mark.parametrize("plane_dtype", PLANES, ids=str)
@pytest.mark.parametrize("is_change", [False, True], ids=["replace", "change"])
def test_cuda_gives_the_bits_of_the_cpu(windows, dtype, plane_dtype, is_change):
    windows = windows * (150 // len(windows))  # more than one launch holds
    originals, weights, synthetic, template, affine = example(windows, dtype, plane_dtype)
    template = template if is_change else None
    ours = composite(
        [image.cuda() for image in originals],
        [weight.cuda() for weight in weights],
        synthetic.cuda(),
        template=None if template is None else template.cuda(),
        affine=affine,
    )
    assert all(image.is_cuda for image in ours)
    assert_same_bits(ours, composite(originals, weights, synthetic, template=template, affine=affine))


@needs_cuda
@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream_inside_a_graph():
    arguments = [part.cuda() if i < 4 else part for i, part in enumerate(flat())]
    expected = torch.ops.gbci_fast.composite(*flat())
    read = torch.zeros_like(arguments[2])
    torch.ops.gbci_fast.composite(*arguments)  # the first launch loads the module, which a capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.gbci_fast.composite(*arguments[:2], read, *arguments[3:])
    read.copy_(arguments[2])
    graph.replay()
    assert torch.equal(captured.cpu(), expected)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pixels", "weight", "synthetic", "template"])
def test_tensors_on_two_devices_are_named(name):
    arguments = [part.cuda() if i < 4 else part for i, part in enumerate(flat())]
    index = ("pixels", "weight", "synthetic", "template").index(name)
    arguments[index] = arguments[index].cpu()
    first = "weight" if name == "pixels" else name  # the first that differs from pixels
    with pytest.raises(RuntimeError, match=f"{first} must be on the device of pixels"):
        torch.ops.gbci_fast.composite(*arguments)

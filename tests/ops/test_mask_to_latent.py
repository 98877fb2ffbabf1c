"""mask_to_latent against its definition, bit for bit; torch.library's contracts; rejections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gbci_fast.ops.mask_to_latent import mask_to_latent, mask_to_latent_ref

SHAPES = {  # batch, height, width, factor
    "minimal": (1, 1, 1, 1),
    "odd": (3, 21, 35, 7),
    "wide": (2, 4, 512, 2),
    "eighth": (2, 72, 40, 8),
    "sampler": (5, 224, 224, 4),
    "whole": (2, 12, 16, 4),  # few cells: the feather reaches over all borders
}
DTYPES = (torch.bool, torch.uint8, torch.float32)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def lesions(batch, height, width, dtype=torch.float32, seed=0):
    """Masks [B, 1, H, W] with one ellipse each, from one pixel to larger than the image; the second mask is empty."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    masks = []
    for index in range(batch):
        cy, cx, ry, rx = (
            torch.rand(4, generator=generator) * torch.tensor([height, width, height / 3, width / 3])
        ) + 0.5
        inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
        masks.append(inside & (index != 1))
    inside = torch.stack(masks)[:, None]
    if dtype == torch.float32:
        return torch.where(inside, 0.51, 0.5)
    return inside if dtype == torch.bool else inside.to(dtype) * 255


def assert_equal(ours, expected):
    for name, ours_part, part in zip(("latent mask", "weight", "window"), ours, expected, strict=True):
        assert ours_part.dtype == part.dtype, name
        assert torch.equal(ours_part.cpu(), part), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feather", [0, 1, 2, 5])
def test_equals_the_reference(shape, dtype, feather):
    *size, factor = shape
    for seed, halo in ((0, 0), (1, 3), (2, 2**31 - 1)):
        mask = lesions(*size, dtype, seed)
        ours = mask_to_latent(mask, factor, feather=feather, halo=halo)
        assert_equal(ours, mask_to_latent_ref(mask, factor, feather=feather, halo=halo))


@given(
    mask=st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
        lambda size: st.lists(
            st.lists(st.booleans(), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
        )
    ),
    factor=st.integers(1, 3),
    feather=st.integers(0, 6),
    halo=st.integers(0, 4),
)
@settings(deadline=None)
def test_equals_the_reference_on_any_mask(mask, factor, feather, halo):
    mask = torch.tensor(mask)[None, None].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    ours = mask_to_latent(mask, factor, feather=feather, halo=halo)
    assert_equal(ours, mask_to_latent_ref(mask, factor, feather=feather, halo=halo))


def test_by_hand():
    mask = torch.zeros(2, 1, 8, 32)
    mask[0, 0, 3, 17] = 1  # one pixel is enough for its cell
    mask[0, 0, 7, 0] = 0.5  # not above one half
    mask[0, 0, 0, 0] = torch.nan
    cells, weight, window = mask_to_latent(mask, 4, feather=1, halo=1)
    assert cells[0, 0].tolist() == [[0, 0, 0, 0, 1, 0, 0, 0], [0] * 8]
    third = torch.tensor(1 / 3)
    torch.testing.assert_close(weight[0, 0], torch.tensor([0, 0, 1, 2, 3, 2, 1, 0]).expand(2, 8) * third)
    assert window.tolist() == [[1, 0, 8, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_masks_are_read_by_their_strides(dtype):
    masks = lesions(4, 48, 64, dtype)
    expected = mask_to_latent_ref(masks, 4, feather=1)
    column_major = masks.transpose(2, 3).contiguous().transpose(2, 3)
    interleaved = torch.cat([masks, ~masks if dtype == torch.bool else 1 - masks], 1).to(
        memory_format=torch.channels_last
    )[:, :1]
    assert interleaved.stride(3) == 2
    for mask in (column_major, interleaved):
        assert_equal(mask_to_latent(mask, 4, feather=1), expected)
    expanded = mask_to_latent(masks[:1].expand(3, 1, 48, 64), 4, feather=1)
    assert_equal(expanded, [part[:1].repeat(3, *[1] * (part.dim() - 1)) for part in expected])


def test_a_sample_does_not_depend_on_its_batch_or_on_the_number_of_threads():
    masks = lesions(40, 224, 224, torch.bool)
    batch = mask_to_latent(masks, 4, feather=1, halo=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert_equal(batch, mask_to_latent(masks, 4, feather=1, halo=2))
    finally:
        torch.set_num_threads(threads)
    assert_equal([part[7:8] for part in batch], mask_to_latent(masks[7:8], 4, feather=1, halo=2))


def test_opcheck():
    for feather in (0, 2):
        torch.library.opcheck(
            torch.ops.gbci_fast.mask_to_latent.default, (lesions(2, 16, 24, torch.uint8), 4, feather, 1)
        )


def test_compiles_without_graph_breaks():
    def blended(mask, latents):
        _, weight, window = mask_to_latent(mask, 4, feather=1)
        return latents * weight, window

    compiled = torch.compile(blended, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (16, 24):
        mask, latents = lesions(2, height, 32), torch.ones(2, 4, height // 4, 8)
        assert all(map(torch.equal, compiled(mask, latents), blended(mask, latents)))


MASK = torch.zeros(2, 1, 8, 12)
REJECTIONS = [
    ((MASK.double(), 4, 1, 0), "mask must be bool, uint8 or float32, got Double"),
    ((MASK[0], 4, 1, 0), "mask must be [B, 1, H, W], got [1, 8, 12]"),
    ((MASK.expand(2, 3, 8, 12), 4, 1, 0), "mask must be [B, 1, H, W], got [2, 3, 8, 12]"),
    ((MASK[:0], 4, 1, 0), "mask must hold at least one pixel, got [0, 1, 8, 12]"),
    ((MASK[:, :, :0], 4, 1, 0), "mask must hold at least one pixel, got [2, 1, 0, 12]"),
    ((MASK, 0, 1, 0), "factor must be at least 1, got 0"),
    ((MASK, 8, 1, 0), "mask's height and width must be divisible by factor 8, got 8 and 12"),
    ((MASK, 3, 1, 0), "mask's height and width must be divisible by factor 3, got 8 and 12"),
    ((MASK, 4, -1, 0), "feather must be from 0 to 65535, got -1"),
    ((MASK, 4, 65536, 0), "feather must be from 0 to 65535, got 65536"),
    ((MASK, 4, 1, -1), "halo must be from 0 to 2^31 - 1, got -1"),
    ((MASK[:1, :, :1, :1].expand(1, 1, 50_000, 50_000), 1, 0, 0),
     "a mask may have at most 2^31 - 1 latent cells, got 50000 x 50000"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), REJECTIONS)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(RuntimeError) as raised:
        torch.ops.gbci_fast.mask_to_latent(*args)
    assert message in str(raised.value).splitlines()[0]


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feather", [0, 1, 5])
def test_cuda_gives_the_bits_of_the_cpu(shape, dtype, feather):
    *size, factor = shape
    mask = lesions(*size, dtype)
    for arranged in (
        lambda mask: mask,
        lambda mask: mask.transpose(2, 3).contiguous().transpose(2, 3),
        lambda mask: mask[:1].expand(3, *mask.shape[1:]),
    ):
        ours = mask_to_latent(arranged(mask.cuda()), factor, feather=feather, halo=2)
        assert all(part.is_cuda for part in ours)
        assert_equal(ours, mask_to_latent(arranged(mask), factor, feather=feather, halo=2))


@needs_cuda
@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream_inside_a_graph():
    masks = lesions(3, 64, 64).cuda()
    read = torch.zeros_like(masks)
    mask_to_latent(read, 4, feather=1)  # the first launch loads the module, which a capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mask_to_latent(read, 4, feather=1, halo=1)
    read.copy_(masks)
    graph.replay()
    assert_equal(captured, mask_to_latent_ref(masks.cpu(), 4, feather=1, halo=1))

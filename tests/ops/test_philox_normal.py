"""philox_normal against its definition; torch.library's contracts; rejections."""

import subprocess
import sys

import pytest
import torch
from scipy import stats

from gbci_fast.model.noise import seed_tensor
from gbci_fast.ops.philox_normal import RTOL, philox_normal, philox_normal_ref

SHAPES = {
    "minimal": (1,),
    "odd": (3, 7, 11),
    "tile": (1, 16, 16),  # exactly one tile of the CPU kernel
    "sampler": (4, 56, 56),
}
SEEDS = [0, 1, 2**32 + 5, 2**63, 2**64 - 1]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("step", "stream"), [(0, 0), (19, 1), (2**32 - 1, 2**32 - 1)])
def test_equals_the_reference(shape, step, stream):
    seeds = seed_tensor(SEEDS)
    ours = philox_normal(seeds, shape, step=step, stream=stream)
    torch.testing.assert_close(ours, philox_normal_ref(seeds, shape, step=step, stream=stream), rtol=RTOL, atol=0)


def test_a_million_draws_equal_the_reference_and_are_standard_normal():
    seeds = seed_tensor(range(10))
    draws = philox_normal(seeds, (100_000,))
    torch.testing.assert_close(draws, philox_normal_ref(seeds, (100_000,)), rtol=RTOL, atol=0)
    flat = draws.flatten().double().numpy()
    assert abs(flat.mean()) < 4e-3
    assert abs(flat.var() - 1) < 6e-3
    assert abs(stats.skew(flat)) < 0.01
    assert abs(stats.kurtosis(flat)) < 0.02
    assert stats.kstest(flat, "norm").pvalue > 1e-3


def test_a_sample_does_not_depend_on_its_batch_or_on_the_number_of_threads():
    seeds = seed_tensor(range(40))
    batch = philox_normal(seeds, (2, 31, 33))
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert torch.equal(batch, philox_normal(seeds, (2, 31, 33)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(batch[7], philox_normal(seeds[7:8], (2, 31, 33))[0])


def test_strided_seeds_are_read_by_their_stride():
    seeds = seed_tensor(range(6))
    assert torch.equal(philox_normal(seeds[::2], (5,)), philox_normal(seeds, (5,))[::2])


@pytest.mark.parametrize("shape", [(), (0, 4), (3,)])
def test_empty_batches_and_samples(shape):
    assert philox_normal(seed_tensor([]), shape).shape == (0, *shape)
    assert philox_normal(seed_tensor([1, 2]), shape).shape == (2, *shape)


def test_opcheck():
    for num_elements in (0, 10):
        torch.library.opcheck(torch.ops.gbci_fast.philox_normal.default, (seed_tensor([3, 4]), num_elements, 1, 0))


def test_compiles_without_graph_breaks():
    def noisy(latents, seeds, step):
        return latents + philox_normal(seeds, latents.shape[1:], step=step)

    latents, seeds = torch.ones(2, 4, 5, 5), seed_tensor([8, 9])
    compiled = torch.compile(noisy, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 4, 5, 5), (2, 4, 6, 7)):
        latents = torch.ones(shape)
        assert torch.equal(compiled(latents, seeds, 3), noisy(latents, seeds, 3))


REJECTIONS = [
    ((seed_tensor([1]).int(), 4, 0, 0), r"seeds must be an int64 tensor \[B\], got Int with 1 axes"),
    ((seed_tensor([1])[None], 4, 0, 0), r"seeds must be an int64 tensor \[B\], got Long with 2 axes"),
    ((seed_tensor([1]), 2**34 + 1, 0, 0), r"num_elements must be from 0 to 2\^34, got 17179869185"),
    ((seed_tensor([1]), 4, -1, 0), r"step must be from 0 to 2\^32 - 1, got -1"),
    ((seed_tensor([1]), 4, 0, 2**32), r"stream must be from 0 to 2\^32 - 1, got 4294967296"),
]


@pytest.mark.parametrize(("args", "message"), REJECTIONS)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gbci_fast.philox_normal(*args)


def test_a_missing_extension_says_how_to_build_it():
    code = "import sys; sys.modules['gbci_fast._C'] = None; import gbci_fast.ops.philox_normal"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the compiled operators of gbci_fast cannot be loaded (")
    assert last.endswith("; build them with: pip install --no-build-isolation -e .")


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cuda_draws_the_bits_of_the_cpu(shape):
    seeds = seed_tensor(SEEDS)
    ours = philox_normal(seeds.cuda(), shape, step=3, stream=1)
    assert ours.is_cuda
    assert torch.equal(ours.cpu(), philox_normal(seeds, shape, step=3, stream=1))


@needs_cuda
@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream_inside_a_graph():
    seeds = seed_tensor(SEEDS).cuda()
    philox_normal(seeds, (100,))  # the first launch loads the module, which a capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = philox_normal(seeds, (100,), step=5)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, philox_normal_ref(seeds, (100,), step=5), rtol=RTOL, atol=0)

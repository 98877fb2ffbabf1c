"""The autoencoder with fused norms: the same function of the same parameters, and which blocks stay stock."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from gbci_fast import GBCIPipeline, accelerate
from gbci_fast.fast.modules import autoencoder
from gbci_fast.fast.modules.autoencoder import NormSiLU, with_fused_norms

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        sample_size=32,
    ).eval()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of the operator's calls."""
    seen, op = [], autoencoder.group_norm_film_silu
    monkeypatch.setattr(autoencoder, "group_norm_film_silu", lambda *args: seen.append(args[0]) or op(*args))
    return seen


def through(vae, x):
    latents = vae.encode(x).latent_dist.mode()
    return latents, vae.decode(latents).sample


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@torch.no_grad()
def test_is_the_same_function(stock, device, calls, layout):
    stock = nn.Module.to(copy.deepcopy(stock), device, memory_format=layout)
    x = torch.randn(3, 1, 32, 32, device=device)
    ours = through(with_fused_norms(stock), x)
    norms = sum(isinstance(part, nn.GroupNorm) for part in stock.modules())
    attention = 2  # one in each middle block, without SiLU after its norm
    assert len(calls) == norms - attention
    for got, expected in zip(ours, through(stock, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_in_16_bits_it_is_as_near_to_float32_as_the_stock_one(stock, device):
    stock = nn.Module.to(copy.deepcopy(stock), device)
    x = torch.randn(3, 1, 32, 32, device=device)
    exact = through(stock, x)
    narrow = nn.Module.to(copy.deepcopy(stock), torch.bfloat16, memory_format=torch.channels_last)
    ours, own = through(with_fused_norms(narrow), x.bfloat16()), through(narrow, x.bfloat16())
    for got, theirs, expected in zip(ours, own, exact, strict=True):
        assert (got - expected).square().mean() <= 1.5**2 * (theirs - expected).square().mean()


def test_shares_the_parameters_and_leaves_the_stock_one_alone(stock):
    ours = with_fused_norms(stock)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in stock.parameters()}
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert not any(isinstance(part, NormSiLU) for part in stock.modules())


def test_under_autograd_gradients_flow(stock, calls):
    x = torch.randn(2, 1, 32, 32)
    ours, theirs = (through(vae, x)[1].square().mean() for vae in (with_fused_norms(stock), stock))
    torch.testing.assert_close(ours, theirs)
    # All gradients: for a single norm's weight, PyTorch 2.13 crashes, also with the stock autoencoder.
    gradients = [torch.autograd.grad(loss, list(stock.parameters())) for loss in (ours, theirs)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    assert not calls


@torch.no_grad()
def test_what_the_operator_cannot_take_stays_as_it_was(stock, calls):
    wide, x = with_fused_norms(copy.deepcopy(stock).double()), torch.randn(2, 1, 32, 32).double()
    torch.testing.assert_close(through(wide, x)[1], through(copy.deepcopy(stock).double(), x)[1])
    norm = NormSiLU(nn.GroupNorm(2, 4))
    strided = torch.randn(2, 4, 8, 16)[..., ::2]
    torch.testing.assert_close(
        norm(strided), nn.functional.silu(nn.functional.group_norm(strided, 2, norm.weight, norm.bias))
    )
    assert not calls


@pytest.mark.parametrize("change", ["activation", "hook"])
def test_other_blocks_stay(stock, change):
    stock = copy.deepcopy(stock)
    block = stock.encoder.mid_block.resnets[0]
    if change == "activation":
        block.nonlinearity = nn.GELU()
    else:
        block.norm2.register_forward_hook(lambda *args: None)
    left = with_fused_norms(stock).encoder.mid_block.resnets[0]
    assert type(left.norm1) is type(left.norm2) is nn.GroupNorm
    assert type(left.nonlinearity) is (nn.GELU if change == "activation" else nn.SiLU)


@torch.no_grad()
def test_accelerate_takes_it(calls):
    pipe = GBCIPipeline.from_pretrained()
    fast = accelerate(pipe, tier="exact", device="cpu")
    fast.encode_image(torch.zeros(1, 1, 64, 64))
    assert calls
    assert not any(isinstance(part, NormSiLU) for part in pipe.vae.modules())

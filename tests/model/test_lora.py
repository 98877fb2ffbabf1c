"""LoRA adapters of the UNet: loaded as in diffusers, followed by the accelerated copy, without effect on others."""

import copy
import itertools
import json
import math
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from gbci_fast.errors import GBCIError
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.model import lora
from gbci_fast.model.few_step import FewStepLoRA
from gbci_fast.model.pipeline import GBCIPipeline

peft = pytest.importorskip("peft", reason="LoRA adapters need peft")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_in", "upsamplers.0.conv",
    "downsamplers.0.conv", "time_emb_proj", "class_embedding.linear_1",
)  # fmt: skip


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline()


def change(unet, seed, prefix="unet.", size=0.3):
    """Tensors of a LoRA of rank 2 for a UNet."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in unet.named_modules():
        if name.endswith(LAYERS) and hasattr(layer, "weight"):
            rows, columns, *kernel = layer.weight.shape
            down, up = (2, columns, *kernel), (rows, 2, *(1 for _ in kernel))
            tensors[f"{prefix}{name}.lora_A.weight"] = size * torch.randn(down, generator=generator)
            tensors[f"{prefix}{name}.lora_B.weight"] = size * torch.randn(up, generator=generator)
    return tensors


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def both(pipe):
    first, second = change(pipe.unet, 3), change(pipe.unet, 4)

    def load_second(made):
        made.load_lora_weights(second, adapter_name="second")
        made.set_adapters(["first", "second"], [0.3, 0.7])

    return {
        "loaded": lambda made: made.load_lora_weights(first, adapter_name="first"),
        "scaled": lambda made: made.set_adapters("first", 0.4),
        "disabled": lambda made: made.disable_lora(),
        "enabled": lambda made: made.enable_lora(),
        "two": load_second,
        "fused": lambda made: made.fuse_lora(lora_scale=0.5),
        "unfused": lambda made: made.unfuse_lora(),
        "one deleted": lambda made: made.delete_adapters("first"),
        "unloaded": lambda made: made.unload_lora_weights(),
    }


@pytest.mark.parametrize("runtime", ["fused", "eager"])
def test_a_fast_pipeline_follows_as_the_eager_one_does(pipe, sample, runtime):
    fast = accelerate(pipe, runtime, "exact")
    plain = sample(fast)
    seen = {}
    for name, do in both(pipe).items():
        do(pipe)
        do(fast)
        seen[name] = sample(pipe)
        assert relative(sample(fast), seen[name]) < 1e-5, name
        assert fast.decision.runtime == runtime
        if name in ("two", "disabled", "fused"):  # accelerate may find this state
            assert relative(sample(accelerate(pipe, runtime, "exact")), seen[name]) < 1e-5, name
    for name, other in (("loaded", "disabled"), ("scaled", "loaded"), ("two", "scaled"), ("fused", "two")):
        assert relative(seen[name], seen[other]) > 0.1
    for name in ("disabled", "unloaded"):
        assert relative(seen[name], plain) < 1e-5


def test_neither_pipeline_changes_the_other(pipe, sample):
    fast = accelerate(pipe, tier="exact")
    before = sample(pipe)
    fast.load_lora_weights(change(pipe.unet, 3))
    fast.fuse_lora()
    with_it = sample(fast)
    assert relative(with_it, before) > 0.1
    assert torch.equal(sample(pipe), before)
    pipe.load_lora_weights(change(pipe.unet, 4))
    pipe.fuse_lora()
    assert torch.equal(sample(fast), with_it)


def test_it_is_described_in_a_line(pipe, sample):
    fast = accelerate(pipe, tier="exact")
    fast.load_lora_weights(change(pipe.unet, 3), adapter_name="lesions")
    sample(fast)
    number = len(change(pipe.unet, 3)) // 2
    assert fast.describe() == f"runtime fused, tier exact, float32\nadapter lesions in {number} layers"
    fast.fuse_lora()
    sample(fast)
    assert fast.describe().endswith(f"adapter lesions in {number} layers, fused")
    fast.disable_lora()
    sample(fast)
    assert fast.describe().endswith(f"adapters of {number} layers are disabled")
    for name in ("lesions", "others"):  # disabled ones, and active ones
        fast.delete_adapters(name)
        sample(fast)
        assert fast.describe() == "runtime fused, tier exact, float32"
        fast.enable_lora()
        fast.load_lora_weights(change(pipe.unet, 3), adapter_name="others")
        sample(fast)
        assert fast.describe().endswith(f"adapter others in {number} layers")


def test_tolerance_keeps_its_bound_with_an_adapter(pipe, sample):
    pipe.load_lora_weights(change(pipe.unet, 3, size=0.1))
    reference = sample(pipe)
    narrow = copy.deepcopy(pipe)
    for part in (narrow.unet, narrow.vae):
        torch.nn.Module.to(part, torch.bfloat16)
    fast = accelerate(pipe, "fused", dtype=torch.bfloat16)
    errors = [(sample(made) - reference).square().mean().sqrt() for made in (fast, narrow)]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_an_adapter_that_is_trained_on_is_seen(pipe, sample):
    fast = accelerate(pipe, tier="exact")
    for made in (pipe, fast):
        made.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    fast.unet.load_state_dict(pipe.unet.state_dict())
    for step in range(2):
        assert relative(sample(fast), sample(pipe)) < 1e-5
        for made in (pipe, fast):
            for name, weight in made.unet.named_parameters():
                if "lora_B" in name:
                    weight.data.add_(0.5 * (step + 1))


@pytest.mark.parametrize("form", ["file", "folder", "dictionary", "saved by the UNet"])
def test_forms_of_a_lora(pipe, sample, tmp_path, form):
    tensors = change(pipe.unet, 3)
    twin = copy.deepcopy(pipe)
    twin.load_lora_weights(tensors, adapter_name="first")
    given = tensors
    if form == "saved by the UNet":
        twin.unet.save_lora_adapter(tmp_path, adapter_name="first")
        given = tmp_path
    elif form != "dictionary":
        save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
        given = tmp_path if form == "folder" else tmp_path / "pytorch_lora_weights.safetensors"
    pipe.load_lora_weights(given)
    assert pipe.get_active_adapters() == ["default_0"]
    assert torch.equal(sample(pipe), sample(twin))


def test_what_is_no_lora_of_this_unet_is_one_sentence(pipe, sample, tmp_path, monkeypatch):
    tensors = change(pipe.unet, 3)
    name = "unet.conv_in.lora_B.weight"
    torch.save(tensors, tmp_path / "lora.bin")
    (tmp_path / "cut.safetensors").write_bytes(b"nothing")
    save_file({}, tmp_path / "empty.safetensors")
    width = len(pipe.unet.conv_in.weight)
    for given, sentence in (
        (tmp_path / "lora.bin", "lora.bin is no .safetensors file"),
        (tmp_path / "cut.safetensors", "cut.safetensors cannot be read as a LoRA"),
        (tmp_path / "empty.safetensors", "empty.safetensors has no tensors"),
        (tmp_path / "none.safetensors", "none.safetensors cannot be read as a LoRA"),
        ({"x": torch.zeros(2)}, "the LoRA has x; expected tensors of a LoRA, such as conv_in.lora_A.weight"),
        ({"unet.conv_in.lora_A.weight": torch.zeros(2, 9, 3, 3)}, "changes conv_in by [[2, 9, 3, 3], None]; it is"),
        ({"unet.conv_up.lora_A.weight": torch.zeros(2, 9, 3, 3)}, "the LoRA changes conv_up, which this UNet lacks"),
        (tensors | {name: torch.zeros(7, 2, 1, 1)}, f"by [[2, 9, 3, 3], [7, 2, 1, 1]]; it is [{width}, 9, 3, 3]"),
        (tensors | {name: tensors[name] * torch.nan}, "conv_in.lora_B.weight with values that are not finite"),
        (tensors | {"text_encoder.a.lora_A.weight": torch.zeros(2, 2)}, "as there is no text encoder"),
    ):
        before = sample(pipe)
        with pytest.raises(GBCIError, match=re.escape(sentence)):
            pipe.load_lora_weights(given)
        assert torch.equal(sample(pipe), before)
    with pytest.raises(GBCIError, match=r"lora\.bin is no \.safetensors file"):
        pipe.load_lora_weights(tmp_path, weight_name="lora.bin")
    for options, sentence in (
        (
            {"weight_nam": "lora.safetensors"},
            "load_lora_weights has no option 'weight_nam'; expected any of weight_name, ",
        ),
        ({"hotswap": True}, "load_lora_weights has no option 'hotswap'; expected any of "),
        ({"use_safetensors": False}, "use_safetensors is False; expected True"),
    ):
        with pytest.raises(GBCIError, match=re.escape(sentence)):
            pipe.load_lora_weights(tensors, **options)
    pipe.load_lora_weights(tensors, adapter_name="first", use_safetensors=True)
    with pytest.raises(GBCIError, match="adapter_name is 'first', which the UNet already has"):
        pipe.load_lora_weights(tensors, adapter_name="first")
    monkeypatch.setattr(lora, "USE_PEFT_BACKEND", False)
    with pytest.raises(GBCIError, match=re.escape("needs peft and transformers: pip install 'gbci_fast[lora]'")):
        pipe.load_lora_weights(tensors)


DAMAGED = {
    "a pattern that is none": ({"r": 2, "rank_pattern": {"(": 3}}, ""),
    "a rank per layer that is another": ({"r": 2, "rank_pattern": {"conv_in": 3}}, ""),
    "an alpha that is no number": ({"r": 2, "lora_alpha": math.nan}, "has the scale nan for adapter"),
    "an alpha of one layer that is infinite": ({"r": 2, "alpha_pattern": {"conv_in": math.inf}}, "conv_in has the"),
    "a rank that is no number": ({"r": "two"}, ""),
}
OTHERS = ("an adapter", "two of which one is active", "a deleted one")
LATE = ("a rank per layer that is another", "an alpha of one layer that is infinite")  # the adapter was there already


@pytest.mark.parametrize(
    ("before", "damage"), [*(("nothing", damage) for damage in DAMAGED), *itertools.product(OTHERS, LATE)]
)
def test_a_load_that_fails_leaves_the_unet_as_it_was(pipe, sample, tmp_path, before, damage):
    config, said = DAMAGED[damage]
    if before != "nothing":
        pipe.load_lora_weights(change(pipe.unet, 3), adapter_name="first")
    if before == "two of which one is active":
        pipe.load_lora_weights(change(plain_unet(pipe), 4), adapter_name="second")
        pipe.set_adapters("second", 0.5)
    if before == "a deleted one":
        pipe.delete_adapters("first")
    tensors, path = change(plain_unet(pipe), 5), tmp_path / "lora.safetensors"
    modules = {"target_modules": sorted({name.removeprefix("unet.").split(".lora_")[0] for name in tensors})}
    metadata = {f"unet.{key}": value for key, value in (modules | config).items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    image, names = sample(pipe), [(name, type(part)) for name, part in pipe.unet.named_modules()]
    adapters = getattr(pipe.unet, "peft_config", {}).copy()
    with pytest.raises(GBCIError, match="^" + re.escape(f"{path} cannot be loaded: ") + ".*" + said):
        pipe.load_lora_weights(path)
    assert torch.equal(sample(pipe), image)
    assert getattr(pipe.unet, "peft_config", {}) == adapters
    if before == "nothing":
        assert [(name, type(part)) for name, part in pipe.unet.named_modules()] == names
        pipe.save_pretrained(tmp_path / "whole")
        assert torch.equal(
            GBCIPipeline.from_pretrained(tmp_path / "whole").unet.conv_in.weight, pipe.unet.conv_in.weight
        )
    pipe.load_lora_weights(change(plain_unet(pipe), 5))  # what is right loads as ever
    assert relative(sample(pipe), image) > 1e-3


def test_layers_of_deleted_adapters_are_not_saved_either(pipe, sample, tmp_path):
    before = sample(pipe)
    pipe.load_lora_weights(change(pipe.unet, 3), adapter_name="first")
    pipe.delete_adapters("first")
    for made in (pipe, accelerate(pipe)):
        with pytest.raises(GBCIError, match=re.escape("expected unload_lora_weights() before")):
            made.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "yes")
    again = GBCIPipeline.from_pretrained(tmp_path / "yes")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), before)


def test_a_checkpoint_is_not_saved_with_adapters(pipe, sample, tmp_path):
    pipe.load_lora_weights(change(pipe.unet, 3), adapter_name="first")
    for made in (pipe, accelerate(pipe)):
        with pytest.raises(GBCIError, match=re.escape("the UNet has adapters (first), which a checkpoint does not")):
            made.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    pipe.fuse_lora()
    with_it = sample(pipe)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "yes")
    again = GBCIPipeline.from_pretrained(tmp_path / "yes")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), with_it)


DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4),
        cross_attention_dim=24, down_block_types=(CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP),
    ).eval()  # fmt: skip


@torch.no_grad()
def run(unet, **options):
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 24, generator=generator)
    return unet(x, 501, encoder_hidden_states=context, **options).sample


def load(unet, seed=3, name="first"):
    unet.load_lora_adapter(change(unet, seed), adapter_name=name, prefix="unet")


def test_a_fast_unet_follows_and_stays_fused(unet):
    fast = accelerate(unet, tier="exact")
    blocks, tensors = fast.num_fused, change(unet, 3)
    steps = {
        "loaded": lambda made: made.load_lora_adapter(tensors, adapter_name="first", prefix="unet"),
        "scaled": lambda made: made.set_adapters("first", 0.4),
        "disabled": lambda made: made.disable_adapters(),
        "enabled": lambda made: made.enable_adapters(),
        "fused": lambda made: made.fuse_lora(lora_scale=0.5),
        "unfused": lambda made: made.unfuse_lora(),
        "unloaded": lambda made: made.unload_lora(),
    }
    plain, seen = run(unet), {}
    for name, do in steps.items():
        do(unet)
        do(fast)
        seen[name] = run(unet)
        assert relative(run(fast), seen[name]) < 1e-5, name
        again = accelerate(unet, tier="exact")
        assert relative(run(again), seen[name]) < 1e-5, name
        assert fast.num_fused == again.num_fused == blocks
        assert len(fast.describe().splitlines()) <= 6
    for name, other in (("loaded", "disabled"), ("fused", "scaled")):
        assert relative(seen[name], seen[other]) > 0.1
    for name in ("disabled", "unloaded"):
        assert relative(seen[name], plain) < 1e-5


def test_a_fast_unet_and_its_original_go_their_own_ways(unet):
    fast, before = accelerate(unet, tier="exact"), run(unet)
    load(fast)
    fast.fuse_lora()
    with_it = run(fast)
    assert relative(with_it, before) > 0.1
    assert torch.equal(run(unet), before)
    load(unet, seed=4)
    unet.fuse_lora()
    assert torch.equal(run(fast), with_it)


def test_the_scale_of_a_call_is_the_adapters(unet):
    load(unet)
    fast = accelerate(unet, tier="exact")
    seen = []
    for scale in (1.0, 0.5, 0.7, 0.7, 0.7, 1.0, 0.0, 1.0):
        options = {"cross_attention_kwargs": {"scale": scale}}
        watch = fast._derived.watch
        seen.append((run(fast, **options), fast._derived.watch is watch))
        assert relative(seen[-1][0], run(unet, **options)) < 1e-5, scale
    assert [same for _, same in seen[2:5]] == [False, True, True]  # merged once for all steps of a call
    assert relative(seen[1][0], seen[0][0]) > 0.05
    assert not fast._declined


KINDS = {
    "LoRA with biases": peft.LoraConfig(r=2, lora_bias=True, target_modules=["to_out.0", "conv1", "proj_in"]),
    "DoRA": peft.LoraConfig(r=2, use_dora=True, target_modules=["to_q", "to_out.0", "conv1"]),
    "LoKr": peft.LoKrConfig(r=2, target_modules=["to_q", "to_out.0", "conv1"]),
    "IA3": peft.IA3Config(target_modules=["to_k", "to_v", "conv1"], feedforward_modules=["conv1"]),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_other_kinds_of_adapters_are_merged_too(unet, config):
    before = run(unet)
    unet.add_adapter(copy.deepcopy(config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if any(kind in name for kind in ("lora_", "lokr_", "ia3_")):
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    fast = accelerate(unet, tier="exact")
    assert relative(run(fast), run(unet)) < 1e-5
    assert relative(run(fast), before) > 1e-2
    assert not fast.stock_reasons


def test_a_lora_in_kohya_s_format(pipe, sample):
    ours, kohya, alpha = {}, {}, 0.5
    for name, tensor in change(pipe.unet, 3).items():
        layer, _, part = name.removeprefix("unet.").partition(".lora_")
        if "attn" in layer:
            scaled = tensor * (alpha / 2) if part.startswith("B") else tensor
            ours[name] = scaled
            key = f"lora_unet_{layer.replace('.', '_')}"
            kohya[f"{key}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
            kohya[f"{key}.alpha"] = torch.tensor(alpha)
    twin, before = copy.deepcopy(pipe), sample(pipe)
    pipe.load_lora_weights(kohya)
    twin.load_lora_weights(ours)
    assert relative(sample(pipe), sample(twin)) < 1e-5
    assert relative(sample(pipe), before) > 1e-2


def test_an_adapter_that_drops_out_keeps_its_block_stock(unet):
    unet.add_adapter(peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q"], init_lora_weights=False))
    unet.eval()
    fast = accelerate(unet, tier="exact")
    assert relative(run(fast), run(unet)) < 1e-5
    assert not fast.stock_reasons
    fast.train()
    run(fast)
    reason = "transformer_blocks.0.attn1.to_q has an adapter that is not merged"
    assert reason in fast.describe()
    assert "lora_A" not in fast.describe()


def test_a_few_step_student_has_the_adapter_too(pipe, sample):
    weight = pipe.unet.conv_in.weight
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "conv_in.up": 0.3 * torch.randn(len(weight), 2, generator=generator),
        "conv_in.down": 0.3 * torch.randn(2, weight[0].numel(), generator=generator),
    }
    few_step = FewStepLoRA.of(tensors, guidance_scale=2.0, steps=2)
    pipe = GBCIPipeline(**{**pipe.components, "few_step": few_step})
    pipe.set_progress_bar_config(disable=True)
    fast = accelerate(pipe, tier="approximate", dtype=torch.float32)
    call = {"guidance_scale": 2.0, "known_region": False}
    before = sample(fast, **call)
    for made in (pipe, fast):
        made.load_lora_weights(change(plain_unet(pipe), 3))
    student = pipe.few_step_pipeline()
    reference = sample(student, **call | {"guidance_scale": 1.0})
    assert relative(sample(fast, **call), reference) < 1e-5
    assert relative(before, reference) > 0.1


def plain_unet(pipe):
    unet = copy.deepcopy(pipe.unet)
    if hasattr(unet, "peft_config"):
        unet.unload_lora()
    return unet

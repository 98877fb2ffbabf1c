"""Storing and loading the eager pipeline, and the shape of the packaged model."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gbci_fast import accelerate
from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError, InputWarning
from gbci_fast.model import pipeline
from gbci_fast.model.conditioning import ConditionEncoder
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training.ldm import build_pipeline
from gbci_fast.training.stages import ldm_preset, vae_preset
from gbci_fast.training.vae import build_vae

# diffusers' own, of its schedulers under NumPy 2 and of the older spelling of `dtype`
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),
]


def test_stored_pipeline_gives_the_same_bits(pipe, paint, image, mask, tmp_path, monkeypatch):
    expected = paint(pipe, image[:1], mask[:1], report="mass")
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    assert list((tmp_path / "whole").rglob("*.bin")) == []
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "whole" / "model_index.json").read_text())["conditioner"] == [
        "gbci_fast.conditioning", "ConditionEncoder",
    ]  # fmt: skip
    monkeypatch.setattr(pipeline, "PACKAGED_WEIGHTS", tmp_path / "whole")
    for path in (tmp_path / "whole", str(tmp_path / "shards"), None):
        loaded = GBCIPipeline.from_pretrained(path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(paint(loaded, image[:1], mask[:1], report="mass"), expected)


def test_the_packaged_checkpoint_knows_the_first_attributes_and_says_so():
    """Its config names none, since it is older than the entry."""
    folder = pipeline.PACKAGED_WEIGHTS / "conditioner"
    assert "attributes" not in json.loads((folder / "config.json").read_text())
    packaged = GBCIPipeline.from_pretrained()
    packaged.set_progress_bar_config(disable=True)
    assert packaged.conditioner.ignores == ("shape", "margin", "pathology", "subtlety")
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in packaged.conditioner.state_dict().items())
    known = {"view_position": "CC", "finding_categories": ["Mass"], "finding_birads": 5}
    gray, mask = torch.full((1, 1, 64, 64), 0.4), torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 20:40] = 1
    options = {"num_inference_steps": 1, "seed": 0, "output_type": "pt"}
    for fast in (packaged, accelerate(packaged, tier="exact"), accelerate(packaged, tier="approximate")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", InputWarning)
            plain = fast(gray, mask, attributes=known, **options).images
        with pytest.warns(InputWarning) as said:
            told = fast(gray, mask, attributes=[known | {"margin": "spiculated", "subtlety": 3}], **options).images
        assert [str(each.message) for each in said if each.category is InputWarning] == [
            "this checkpoint does not know margin, subtlety, and ignores it"
        ]
        assert torch.equal(told, plain)
    assert (
        accelerate(packaged).describe().splitlines()[-1] == "the checkpoint ignores shape, margin, pathology, subtlety"
    )


def test_the_config_keeps_the_attributes(pipe, tmp_path):
    encoder = ConditionEncoder(image_size=64, width=64, depth=1, pooled_dim=64, attributes=("margin", "age")).eval()
    GBCIPipeline(**{**pipe.components, "conditioner": encoder}).save_pretrained(tmp_path)
    loaded = GBCIPipeline.from_pretrained(tmp_path).conditioner
    assert list(loaded.config.attributes) == ["margin", "age"]
    assert loaded.encode_attributes([Attributes()]).shape == (1, 2, 64)
    config = tmp_path / "conditioner" / "config.json"
    values = json.loads(config.read_text())
    for names in (["margin", "size"], "margin", 3, [["margin"]]):
        config.write_text(json.dumps(values | {"attributes": names}))
        with pytest.raises(GBCIError, match="attributes of the conditioner is"):
            GBCIPipeline.from_pretrained(tmp_path)


def test_a_subclass_loads_its_own_folder_and_the_plain_one(pipe, paint, image, mask, tmp_path):
    class Sub(GBCIPipeline):
        pass

    expected = paint(pipe, image[:1], mask[:1])
    pipe.save_pretrained(tmp_path / "plain")
    Sub(**pipe.components).save_pretrained(tmp_path / "sub")
    for folder in ("plain", "sub"):
        loaded = Sub.from_pretrained(tmp_path / folder)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is Sub
        assert torch.equal(paint(loaded, image[:1], mask[:1]), expected)
    with pytest.raises(GBCIError, match=r"model_index\.json names the pipeline 'Sub'; expected 'GBCIPipeline'"):
        GBCIPipeline.from_pretrained(tmp_path / "sub")


@pytest.mark.parametrize("missing", ["scheduler", "unet", "conditioner"])
def test_parts_that_were_given_as_none_are_set_before_a_call(pipe, paint, image, mask, tmp_path, missing):
    expected = paint(pipe, image[:1], mask[:1])
    pipe.save_pretrained(tmp_path)
    loaded = GBCIPipeline.from_pretrained(tmp_path, **{missing: None})
    loaded.set_progress_bar_config(disable=True)
    with pytest.raises(GBCIError, match=f"^the pipeline's {missing} is None; set {missing} before it is called$"):
        paint(loaded, image[:1], mask[:1])
    setattr(loaded, missing, pipe.components[missing])
    assert torch.equal(paint(loaded, image[:1], mask[:1]), expected)


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_half_precision(pipe, paint, image, mask, tmp_path, keyword):
    pipe.save_pretrained(tmp_path)
    half = GBCIPipeline.from_pretrained(tmp_path, **{keyword: torch.bfloat16})
    half.set_progress_bar_config(disable=True)
    assert {module.dtype for module in (half.vae, half.unet, half.conditioner)} == {torch.bfloat16}
    image, mask = image[:2], mask[:2]
    described = {
        "attributes": [{"view_position": "CC", "finding_birads": 5}, None],
        "report": ["spiculated mass", None],
    }
    ours = paint(half, image, mask, **described)
    assert ours.dtype == torch.float32
    assert torch.equal(ours[mask == 0], image[mask == 0])
    exact = paint(pipe, image, mask, **described)
    assert (ours - exact).abs().mean() < 0.05


def test_offload_order_names_every_module(pipe):
    named = {name for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert set(pipe.model_cpu_offload_seq.split("->")) == named


BLOCKED = """
import sys
sys.modules["gbci_fast._C"] = sys.modules["gbci_fast.ops"] = None
import torch
from gbci_fast import GBCIPipeline
pipe = GBCIPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image, mask = torch.full((1, 1, 64, 64), 0.5), torch.zeros(1, 1, 64, 64)
mask[..., 20:40, 20:40] = 1
print(repr(pipe(image, mask, num_inference_steps=2, seed=0, eta=1.0, output_type="pt").images.double().sum().item()))
assert not [name for name in sys.modules if name.startswith("gbci_fast.ops.")]
"""


def test_runs_without_extension_and_kernels(pipe, paint, tmp_path):
    pipe.save_pretrained(tmp_path)
    ran = subprocess.run([sys.executable, "-c", BLOCKED, tmp_path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 20:40] = 1
    here = paint(pipe, torch.full((1, 1, 64, 64), 0.5), mask, num_inference_steps=2, eta=1.0)
    assert float(ran.stdout) == pytest.approx(here.double().sum().item(), rel=1e-6)


@pytest.fixture(scope="module")
def base():
    """The packaged model's shape, on the meta device."""
    with torch.device("meta"):
        return build_pipeline(ldm_preset("base")[0], build_vae(vae_preset("base")[0]), 224)


def test_base_preset_is_small_enough(base):
    sizes = {name: sum(p.numel() for p in getattr(base, name).parameters()) for name in ("unet", "conditioner", "vae")}
    assert sizes["unet"] <= 14e6
    assert sizes["conditioner"] <= 2.5e6
    assert sizes["vae"] <= 2.5e6
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        tokens = 14 * 14 + 8 + 32  # image, attributes, the longest report
        base.unet(torch.empty(1, 9, 56, 56), torch.tensor(0), torch.empty(1, tokens, 128), torch.empty(1, 256))
    assert 4e9 < counter.get_total_flops() <= 16e9


def test_base_preset_has_nine_channels_and_heads_of_32(base):
    assert base.unet.config.in_channels == base.unet.conv_in.weight.shape[1] == 9
    attentions = [module for module in base.unet.modules() if isinstance(module, Attention)]
    assert len(attentions) >= 10
    assert {module.inner_dim // module.heads for module in attentions} == {32}
    encoders = [module for module in base.conditioner.modules() if isinstance(module, nn.MultiheadAttention)]
    assert {module.head_dim for module in encoders} == {32}

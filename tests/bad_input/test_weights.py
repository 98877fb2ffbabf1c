"""Damaged and hostile pipeline folders: the same pipeline, or one sentence; and no code of theirs runs."""

import functools
import itertools
import json
import math
import shutil
from fnmatch import fnmatch

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gbci_fast.errors import GBCIError
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.model import pipeline_folder
from gbci_fast.model.checkpoint import load_pipeline
from gbci_fast.model.few_step import FewStepLoRA
from gbci_fast.model.pipeline import GBCIPipeline

CONFIGS = [f"{part}/config.json" for part in ("conditioner", "few_step", "unet", "vae")]
CONFIGS += ["scheduler/scheduler_config.json", "model_index.json"]
SHARD = "unet/diffusion_pytorch_model-00002-of-00003.safetensors"
SHARDS = "unet/diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("conditioner", "few_step", "vae")] + [SHARD]
DESCRIBED = {"attributes": {"finding_categories": ["Mass"], "age": 50}, "report": "big mass", "seed": 1}


@pytest.fixture(scope="module")
def whole(tiny_pipeline, tmp_path_factory):
    """A pipeline folder with all components, the UNet in three shards."""
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    tensors = {}
    for name in ("conv_in", "time_embedding.linear_1"):
        weight = pipe.unet.get_submodule(name).weight
        tensors[f"{name}.up"] = torch.randn(len(weight), 2) * 0.01
        tensors[f"{name}.down"] = torch.randn(2, weight[0].numel()) * 0.01
    pipe.register_modules(few_step=FewStepLoRA.of(tensors, guidance_scale=2.0, steps=4))
    folder = tmp_path_factory.mktemp("whole") / "weights"
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "unet")
    size = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    pipe.unet.save_pretrained(folder / "unet", max_shard_size=int(size / 2.5))
    assert (folder / SHARD).is_file()
    return folder


def images_of(folder):
    """What a pipeline folder paints, eager and with its few-step student: float32 [2, 64, 64, 1]."""
    image = np.random.default_rng(0).random((64, 64), np.float32)
    mask = np.zeros((64, 64), bool)
    mask[20:41, 10:35] = True
    pipe = load_pipeline(folder)
    fast = accelerate(pipe, tier="approximate", dtype=torch.float32)
    call = {"num_inference_steps": 2, "output_type": "np"} | DESCRIBED
    return np.concatenate([one(image, mask, guidance_scale=2.0, **call).images for one in (pipe, fast)])


@pytest.fixture(scope="module")
def expected(whole):
    return images_of(whole)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "weights")


def sentence_or_images(folder):
    """(the refusal of a folder, or None; the images that it paints, or None); other exceptions fail the test."""
    try:
        return None, images_of(folder)
    except GBCIError as error:
        return str(error), None


def contents(data):
    """{what is wrong: the bytes of a damaged file}."""
    random = np.random.default_rng(len(data))
    yield from {
        "empty": b"", "half": data[: len(data) // 2], "head": data[:10], "one less": data[:-1],
        "noise": random.bytes(len(data)), "zeros": bytes(len(data)), "null": b"null", "list": b"[]", "object": b"{}",
        "nested": b"[" * 100_000, "utf-16": "{}".encode("utf-16"),
    }.items()  # fmt: skip
    header = len(data) if data[:1] == b"{" else 8 + int.from_bytes(data[:8], "little")
    for at in random.choice(header, 6, replace=False).tolist():
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(random.integers(8))
        yield f"bit at {at}", bytes(flipped)


@pytest.mark.parametrize("file", [*CONFIGS, SHARDS, *WEIGHTS])
def test_a_damaged_file_is_one_sentence_or_does_not_matter(folder, expected, file):
    path = folder / file
    data = path.read_bytes()
    refused = []
    for what, damaged in contents(data):
        path.write_bytes(damaged)
        said, images = sentence_or_images(folder)
        if said is not None:
            refused.append(what)
        elif path.suffix == ".json" and what.startswith("bit at"):  # a changed number gives another valid model
            assert np.isfinite(images).all(), what
        else:
            assert np.array_equal(images, expected), what
    kept = {"one less"} if path.suffix == ".json" else set()  # the newline at its end
    assert {what for what, _ in contents(data) if not what.startswith("bit at")} - set(refused) == kept
    path.unlink()
    assert sentence_or_images(folder)[0] is not None
    path.mkdir()
    assert sentence_or_images(folder)[0] is not None


@pytest.mark.parametrize("file", CONFIGS)
def test_a_config_without_a_value_or_with_one_of_another_type(folder, expected, file):
    path = folder / file
    values = json.loads(path.read_text())
    wrongs = itertools.cycle((None, "x", 10**9, {"a": 1}, ["os", "system"], math.nan, True))
    for key, wrong in zip(values, wrongs, strict=False):
        path.write_text(json.dumps({name: value for name, value in values.items() if name != key}))
        said, images = sentence_or_images(folder)
        if key == "few_step":  # a pipeline without a student
            assert said is None
            assert np.array_equal(images[:1], expected[:1])
        elif not key.startswith("_"):
            assert said is not None, key
        path.write_text(json.dumps(values | {key: wrong}))
        said, images = sentence_or_images(folder)
        assert said is not None or np.isfinite(images).all(), (key, wrong)
        assert said is not None or wrong != 10**9 or key.startswith("_"), key


def with_scheduler(folder, kind, **values):
    """Exchanges the folder's scheduler for one of diffusers with these values."""
    getattr(diffusers, kind)(**values).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -math.inf}),
        ("EulerDiscreteScheduler", {"sigma_max": 1e5}),
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 1e6}),
    ],
)
def test_large_values_of_a_scheduler_that_are_no_sizes(folder, kind, values):
    with_scheduler(folder, kind, **values)
    config = GBCIPipeline.from_pretrained(folder).scheduler.config
    assert {name: config[name] for name in values} == values


@pytest.mark.parametrize(
    ("kind", "values", "most"),
    [
        ("LCMScheduler", {"original_inference_steps": 3}, 3),
        ("DDIMScheduler", {"num_train_timesteps": 3}, 3),
        ("DDIMScheduler", {"num_train_timesteps": 4, "steps_offset": 1}, 3),
    ],
)
def test_schedulers_of_few_steps(folder, kind, values, most):
    with_scheduler(folder, kind, **values)
    pipe = GBCIPipeline.from_pretrained(folder)
    image, mask = torch.full((1, 1, 64, 64), 0.5), torch.ones(1, 1, 64, 64)
    assert pipe(image, mask, num_inference_steps=1, output_type="pt", **DESCRIBED).images.isfinite().all()
    with pytest.raises(GBCIError, match="num_inference_steps"):
        pipe(image, mask, num_inference_steps=most + 2, **DESCRIBED)


def test_a_size_of_a_scheduler_is_limited(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 10**9}))
    with pytest.raises(GBCIError, match=r"scheduler_config\.json has num_train_timesteps 1000000000; expected at most"):
        GBCIPipeline.from_pretrained(folder)


def changed(tensors, name, change):
    """The tensors with the one named `name` replaced by ``change(tensor)``, or left out if that is None."""
    others = {key: value for key, value in tensors.items() if key != name}
    result = change(tensors[name])
    return others if result is None else others | {name: result.contiguous()}


TENSORS = {
    "removed": (lambda tensors, name: changed(tensors, name, lambda x: None), "lacks "),
    "renamed": (lambda tensors, name: changed(tensors | {"other": tensors[name].clone()}, name, lambda x: None), ""),
    "added": (lambda tensors, name: tensors | {"other": torch.ones(3)}, "holds the unknown other"),
    "cut": (lambda tensors, name: changed(tensors, name, lambda x: x[:-1]), ""),
    "flat": (lambda tensors, name: changed(tensors, name, lambda x: x.flatten()[None, None]), ""),
    "scalar": (lambda tensors, name: changed(tensors, name, lambda x: torch.tensor(1.0)), ""),
    "whole numbers": (lambda tensors, name: changed(tensors, name, torch.Tensor.long), "as I64; expected F64, F32"),
    "truth values": (lambda tensors, name: changed(tensors, name, torch.Tensor.bool), "as BOOL; expected F64, F32"),
    "nan": (lambda tensors, name: changed(tensors, name, lambda x: x * torch.nan), "holds NaN or infinity"),
    "one infinity": (lambda tensors, name: changed(tensors, name, _with_infinity), "holds NaN or infinity"),
    "none": (lambda tensors, name: {}, ""),
}


def _with_infinity(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.inf
    return tensor


@pytest.mark.parametrize(("change", "said"), TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("file", WEIGHTS)
def test_damaged_tensors(folder, file, change, said):
    tensors = load_file(folder / file)
    name = sorted(tensors)[len(tensors) // 2]
    save_file(change(tensors, name), folder / file, metadata={"format": "pt"})
    with pytest.raises(GBCIError, match="cannot be loaded as a pipeline: ") as raised:
        GBCIPipeline.from_pretrained(folder)
    assert said in str(raised.value)


def test_wider_tensors_are_the_same_pipeline(folder, expected):
    for file in WEIGHTS:
        save_file({name: x.double() for name, x in load_file(folder / file).items()}, folder / file, {"format": "pt"})
    assert np.array_equal(images_of(folder), expected)


@pytest.mark.parametrize("wrong", ["left out", "another shard", "no file", "number"])
def test_a_damaged_table_of_shards(folder, wrong):
    table = json.loads((folder / SHARDS).read_text())
    places = table["weight_map"]
    names = [name for name, file in places.items() if file == SHARD.removeprefix("unet/")]
    if wrong == "left out":
        places = {name: file for name, file in places.items() if name not in names}
    else:
        value = {"another shard": min(places.values()), "no file": "none.safetensors", "number": 7}[wrong]
        places |= dict.fromkeys(names, value)
    (folder / SHARDS).write_text(json.dumps(table | {"weight_map": places}))
    with pytest.raises(GBCIError, match="cannot be loaded as a pipeline: "):
        load_pipeline(folder)


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil:\n    pass\n"
HOSTILE = {
    "class of its own": (
        {"unet": ["evil", "Evil"]},
        "names evil.Evil as unet; expected diffusers.UNet2DConditionModel",
    ),
    "scheduler of its own": ({"scheduler": ["evil", "Evil"]}, "expected a scheduler of diffusers"),
    "scheduler's module": ({"scheduler": ["diffusers", "utils"]}, "expected a scheduler of diffusers"),
    "class of another library": ({"vae": ["os", "system"]}, "names os.system as vae; expected diffusers.AutoencoderKL"),
    "class of another kind": ({"vae": ["diffusers", "UNet2DConditionModel"]}, "expected diffusers.AutoencoderKL"),
    "own class elsewhere": (
        {"conditioner": ["gbci_fast.few_step", "FewStepLoRA"]},
        "expected gbci_fast.conditioning.",
    ),
    "student of its own": ({"few_step": ["evil", "Evil"]}, "names evil.Evil as few_step"),
    "component of its own": ({"evil": ["evil", "Evil"]}, "names the component 'evil'; expected vae, unet"),
    "pipeline of its own": ({"_class_name": ["evil", "Evil"]}, "names the pipeline ['evil', 'Evil']; expected"),
    "another pipeline": ({"_class_name": "StableDiffusionPipeline"}, "names the pipeline 'StableDiffusionPipeline'"),
    "custom pipeline": ({"custom_pipeline": "evil"}, "has 'custom_pipeline', which names code to import"),
    "nothing": ({"unet": [None, None]}, "names [None, None] as unet"),
    "no pair": ({"unet": "UNet2DConditionModel"}, "names 'UNet2DConditionModel' as unet"),
}


@pytest.mark.parametrize(("index", "said"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("load", [GBCIPipeline.from_pretrained, load_pipeline])
def test_classes_are_looked_at_before_anything_is_loaded(folder, monkeypatch, index, said, load):
    for place in (folder, folder / "unet", folder / "scheduler", folder / "few_step"):
        (place / "evil.py").write_text(CODE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    values = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(values | index))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    with pytest.raises(GBCIError) as raised:
        load(folder)
    assert str(raised.value).startswith(f"{folder} cannot be loaded as a pipeline: model_index.json ")
    assert said in str(raised.value)
    assert list(folder.rglob("ran")) == []


@pytest.mark.parametrize("file", CONFIGS[:-1])
@pytest.mark.parametrize("key", ["auto_map", "quantization_config"])
def test_configs_that_name_code(folder, file, key):
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | {key: {"AutoModel": "evil.Evil", "quant_method": "evil"}}))
    with pytest.raises(GBCIError, match=f"{file} has '{key}', which names code to import"):
        GBCIPipeline.from_pretrained(folder)


def test_code_beside_weights(folder):
    (folder / "unet" / "evil.py").write_text(CODE)
    with pytest.raises(GBCIError, match=r"unet/evil\.py is code; expected weights and configs alone"):
        GBCIPipeline.from_pretrained(folder)
    with pytest.raises(GBCIError, match="custom_pipeline is 'evil'; a GBCIPipeline runs no other's code"):
        GBCIPipeline.from_pretrained(folder, custom_pipeline="evil")


def test_pickles_are_not_executed(folder):
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": functools.partial(print, "ran")}, folder / "vae" / "diffusion_pytorch_model.bin")
    for load in (GBCIPipeline.from_pretrained, load_pipeline):
        with pytest.raises(GBCIError, match="cannot be loaded as a pipeline: "):
            load(folder)


def test_components_that_are_given_are_not_looked_for(folder, whole):
    shutil.rmtree(folder / "vae")
    vae = load_pipeline(whole).vae
    assert GBCIPipeline.from_pretrained(folder, vae=vae).vae is vae


def test_no_folder(tmp_path):
    with pytest.raises(GBCIError, match="none cannot be loaded as a pipeline: it is not a folder"):
        GBCIPipeline.from_pretrained(tmp_path / "none")


@pytest.fixture
def hub(whole, tmp_path, monkeypatch):
    """A Hub with one repository, a copy of the folder; and what was asked of it."""
    repository, fetched, asked = shutil.copytree(whole, tmp_path / "hub"), tmp_path / "fetched", []

    def fetch(name, allow_patterns, **options):
        assert name == "some/model"
        asked.append(options)
        for path in repository.rglob("*"):
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                (fetched / path.relative_to(repository)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, fetched / path.relative_to(repository))
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(GBCIPipeline, "download", None)
    return repository, fetched, asked


def test_a_repository_is_fetched_and_loaded_without_its_code(hub, expected):
    repository, fetched, asked = hub
    (repository / "unet" / "evil.py").write_text(CODE)
    options = {"revision": "v1", "token": "secret", "cache_dir": "cache", "local_files_only": True}
    pipe = GBCIPipeline.from_pretrained("some/model", torch_dtype=torch.float32, **options)
    assert pipe.few_step is not None
    assert asked == [options]
    assert {path.suffix for path in fetched.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert np.array_equal(images_of(fetched), expected)


@pytest.mark.parametrize("name", [["some_community", "Evil"], ["pipeline", "Evil"]])
def test_a_repository_s_pipeline_of_its_own_is_not_looked_for(hub, name):
    repository, _, asked = hub
    (repository / "pipeline.py").write_text(CODE)
    index = json.loads((repository / "model_index.json").read_text())
    (repository / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    with pytest.raises(GBCIError, match=r"model_index\.json names the pipeline \["):
        GBCIPipeline.from_pretrained("some/model")
    assert asked == [{}]


def test_a_repository_that_is_not_there(monkeypatch):
    def fetch(*_, **__):
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(GBCIError, match=r"^some/model cannot be loaded as a pipeline: no such repository$"):
        GBCIPipeline.from_pretrained("some/model")


def test_the_listed_classes_are_those_of_a_pipeline(whole):
    index = json.loads((whole / "model_index.json").read_text())
    assert {name: tuple(index[name]) for name in pipeline_folder.CLASSES} == pipeline_folder.CLASSES
    assert {name for name in index if not name.startswith("_")} == {*pipeline_folder.CLASSES, pipeline_folder.SCHEDULER}

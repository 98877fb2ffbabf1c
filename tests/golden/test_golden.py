"""What the packaged weights paint stays what it was: images of every tier, and the files of a small job.

``golden.npz`` holds the arrays, ``golden.json`` their digests, by machine: other instruction sets round otherwise. On a
machine whose digests are not stored the arrays must be close. ``pytest tests/golden --renew`` renews both files.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gbci_fast import GBCIPipeline, accelerate
from gbci_fast.data.vindr import find_inputs
from gbci_fast.generate.identities import job_identities
from gbci_fast.generate.job import run_job
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings, SamplerSettings
from gbci_fast.jobs.files import hash_weights
from gbci_fast.model.checkpoint import PACKAGED_WEIGHTS
from gbci_fast.phantom import generate_phantom

ARRAYS, DIGESTS = Path(__file__).with_name("golden.npz"), Path(__file__).with_name("golden.json")
SIZE, STEPS = 96, 4
# Largest RMS distance to the stored array, in latents (standard deviation 1) or image levels (0 to 1). AVX2 in place of
# AVX-512 moves float32 by 1e-6 and bfloat16 by 2e-4.
BOUNDS = {"trajectory": 1e-5, "exact": 1e-5, "tolerance": 2e-3, "approximate": 1e-5, "student": 1e-5, "job": 1e-5}
# Files whose bytes hold painted pixels or their digests: compared as arrays where no digest is stored.
PAINTED = ("images/", "preview.png", "manifest.parquet", ".finished/")


def machine():
    """What decides on rounding: PyTorch's version, the instruction set, and the CPU, whose caches decide on tiles."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in lines}
    named = [cpu.get(key, "?") for key in ("vendor_id", "cpu family", "model", "cache size")]
    return " ".join([torch.__version__, torch.backends.cpu.get_cpu_capability(), *named])


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The number of threads decides on the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe():
    pipe = GBCIPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, guidance_scale=2.0, **options):
    """Two descriptions in one image with some texture."""
    y, x = np.mgrid[:SIZE, :SIZE]
    image = torch.from_numpy(0.4 + 0.2 * np.sin(x / 7) * np.cos(y / 9)).float()[None, None]
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 40:58, 36:60] = 1
    attributes = [
        {"view_position": "CC", "laterality": "L", "finding_categories": ["Mass"], "finding_birads": 5, "age": 61.0},
        {"view_position": "MLO", "breast_density": "D", "finding_categories": ["Suspicious Calcification"]},
    ]
    report = ["irregular spiculated mass of 12 mm", None]
    options = {"num_inference_steps": STEPS, "seed": [11, 12], "output_type": "np", **options}
    return pipe(image, mask, attributes=attributes, report=report, guidance_scale=guidance_scale, **options).images


def trajectory(pipe):
    """Latents after every step of the eager pipeline, and its images."""
    steps = []

    def keep(pipe, step, timestep, inputs):
        steps.append(inputs["latents"].clone())
        return {}

    images = paint(pipe, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"])
    return {"latents": torch.stack(steps).numpy(), "images": images}


CASES = {
    "trajectory": trajectory,
    "exact": lambda pipe: {"images": paint(accelerate(pipe, tier="exact"))},
    "tolerance": lambda pipe: {"images": paint(accelerate(pipe, tier="tolerance", dtype=torch.bfloat16))},
    "approximate": lambda pipe: {"images": paint(accelerate(pipe, tier="approximate", dtype=torch.float32))},
    "student": lambda pipe: {
        "images": paint(accelerate(pipe, tier="approximate", dtype=torch.float32), guidance_scale=1.0)
    },
}


def read(path):
    return json.loads(path.read_text()) if path.is_file() else {}


def store(name, digests, arrays):
    """Digests of this machine beside those of others; arrays instead of the last ones."""
    stored = read(DIGESTS)
    stored.setdefault(machine(), {})[name] = digests
    DIGESTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    kept = dict(np.load(ARRAYS)) if ARRAYS.is_file() else {}
    kept |= {f"{name}/{part}": array for part, array in arrays.items()}
    np.savez_compressed(ARRAYS, **dict(sorted(kept.items())))


def check_close(name, arrays):
    stored = np.load(ARRAYS)
    for part, array in arrays.items():
        before = stored[f"{name}/{part}"]
        assert array.shape == before.shape
        rms = np.sqrt(np.mean((array.astype(np.float64) - before) ** 2))
        assert rms <= BOUNDS[name], f"{name}/{part} moved by an RMS of {rms:.3g}; at most {BOUNDS[name]} is rounding"


@pytest.mark.parametrize("name", CASES)
def test_images_are_the_stored_ones(pipe, name, request):
    arrays = CASES[name](pipe)
    digests = {part: sha256(array) for part, array in arrays.items()}
    if request.config.getoption("--renew", default=False):
        store(name, digests, arrays)
    check_close(name, arrays)
    if machine() in read(DIGESTS):
        assert digests == read(DIGESTS)[machine()][name]


def test_a_job_writes_the_stored_files(pipe, tmp_path, request):
    generate_phantom(tmp_path / "phantom", studies=1, seed=3, size=(192, 160))
    output = tmp_path / "data"
    plan = make_plan(find_inputs(tmp_path / "phantom"), variants=1, seed=0)
    sampler = SamplerSettings(num_inference_steps=STEPS)
    settings = JobSettings(seed=0, batch_size=2, sampler=sampler, weights_hash=hash_weights(PACKAGED_WEIGHTS))
    identities = job_identities(output, 0, {item.template.path for item in plan})
    run_job(accelerate(pipe, tier="exact"), plan, output, settings, identities=identities, on_batch=lambda images: None)

    files = sorted(path for path in output.rglob("*") if path.is_file())
    digests = {path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    pictures = sorted(output.glob("images/**/*.png"))
    assert len(pictures) == len(plan) == 4
    arrays = {f"{index}": np.asarray(Image.open(path)) / 65535 for index, path in enumerate(pictures)}
    if request.config.getoption("--renew", default=False):
        store("job", digests, {part: array.astype(np.float32) for part, array in arrays.items()})
    check_close("job", arrays)
    manifest = pd.read_parquet(output / "manifest.parquet")
    assert manifest.weights_hash.eq(hash_weights(PACKAGED_WEIGHTS)).all()
    stored = read(DIGESTS)
    if machine() in stored:
        assert digests == stored[machine()]["job"]
    else:
        others = next(iter(stored.values()))["job"]
        unpainted = {name: digest for name, digest in digests.items() if not name.startswith(PAINTED)}
        assert unpainted == {name: others[name] for name in others if not name.startswith(PAINTED)}

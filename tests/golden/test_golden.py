"""What the packaged weights paint stays what it was: images of every tier, and the files of a small job.

``golden.npz`` holds the arrays, ``golden.json`` their digests by machine, because other CPUs and libraries round
otherwise. On every machine the arrays must be close; on a machine whose digests are stored, the bytes must be equal.
``pytest tests/golden --renew`` renews both files.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import pyarrow
import pytest
import scipy
import torch
from PIL import Image

from gbci_fast import GBCIPipeline, accelerate
from gbci_fast.data.vindr import find_inputs
from gbci_fast.evaluate.metrics import grow
from gbci_fast.generate.identities import job_identities
from gbci_fast.generate.job import run_job
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings, SamplerSettings
from gbci_fast.jobs.files import hash_weights
from gbci_fast.model.pipeline import PACKAGED_WEIGHTS

ARRAYS, DIGESTS = Path(__file__).with_name("golden.npz"), Path(__file__).with_name("golden.json")
SIZE, STEPS = 96, 4
MASK = slice(40, 58), slice(36, 60)  # rows and columns
AROUND = slice(32, 68), slice(28, 68)  # the mask and 8 pixels around it, and the same in latents
AROUND_LATENTS = slice(8, 17), slice(7, 17)
# Largest RMS distance to the stored array around the mask, in latents (standard deviation 1) or image levels (0 to 1).
# AVX2 in place of AVX-512 moves float32 by 1e-6 and bfloat16 by 4e-4.
BOUNDS = {"trajectory": 1e-5, "exact": 1e-5, "tolerance": 2e-3, "approximate": 1e-5, "student": 1e-5, "job": 2e-5}
# Files of a job whose bytes depend on painted pixels.
PAINTED = ("images/", "preview.png", "manifest.parquet", ".finished/")
LIBRARIES = (torch, np, scipy, PIL, pyarrow)


def machine():
    """What decides on rounding and bytes: libraries, instruction set, and the CPU, whose caches decide on tiles."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    cpu = {key.strip(): value.strip() for key, _, value in lines}
    named = [cpu.get(key, "?") for key in ("vendor_id", "cpu family", "model", "cache size")]
    versions = [f"{library.__name__} {library.__version__}" for library in LIBRARIES]
    return ", ".join([*versions, torch.backends.cpu.get_cpu_capability(), " ".join(named)])


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
    mask[..., *MASK] = 1
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


def job(pipe, folder):
    """A job over four templates that are drawn in integers, which no CPU rounds."""
    templates, output = folder / "templates", folder / "data"  # the folder's name is the study's
    templates.mkdir()
    y, x = np.ogrid[:192, :160]
    for name, step in (("a_L_CC", 3), ("b_L_CC", 5), ("c_L_MLO", 7), ("d_L_MLO", 11)):
        inside = (y - 96) ** 2 * 4 + x**2 * 2 < 30000
        grain = (x * step + y * (step + 4) + x * y) % 97
        Image.fromarray(np.where(inside, 20000 + 200 * grain, 300).astype(np.uint16)).save(templates / f"{name}.png")
    plan = make_plan(find_inputs(templates), variants=1, seed=0)
    sampler = SamplerSettings(num_inference_steps=STEPS)
    settings = JobSettings(seed=0, batch_size=2, sampler=sampler, weights_hash=hash_weights(PACKAGED_WEIGHTS))
    identities = job_identities(output, 0, {item.template.path for item in plan})
    run_job(accelerate(pipe, tier="exact"), plan, output, settings, identities=identities, on_batch=lambda images: None)
    manifest = pd.read_parquet(output / "manifest.parquet")
    assert len(manifest) == len(plan) == 4
    assert manifest.weights_hash.eq(hash_weights(PACKAGED_WEIGHTS)).all()
    images, masks = (
        [np.asarray(Image.open(output / name)) for name in manifest[column]] for column in ("png_file", "mask_file")
    )
    arrays = {
        str(i): (image / 65535)[grow(mask > 0, 4)].astype(np.float32)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True))
    }
    files = sorted(path for path in output.rglob("*") if path.is_file())
    digests = {path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return arrays, digests


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
    """Stores digests of this machine beside those of others, and arrays instead of the last ones."""
    stored = read(DIGESTS)
    stored.setdefault(machine(), {})[name] = digests
    DIGESTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    kept = dict(np.load(ARRAYS)) if ARRAYS.is_file() else {}
    kept |= {f"{name}/{part}": array for part, array in arrays.items()}
    np.savez_compressed(ARRAYS, **dict(sorted(kept.items())))


@pytest.fixture(scope="module")
def painted(pipe, request, tmp_path_factory):
    """`painted(name)`: arrays and digests of a case, made once."""

    @functools.cache
    def paint_case(name):
        if name == "job":
            arrays, digests = job(pipe, tmp_path_factory.mktemp("job"))
        else:
            arrays = CASES[name](pipe)
            digests = {part: sha256(array) for part, array in arrays.items()}
        if request.config.getoption("--renew", default=False):
            store(name, digests, arrays)
        return arrays, digests

    return paint_case


@pytest.mark.parametrize("name", [*CASES, "job"])
def test_images_are_close_to_the_stored_ones(painted, name):
    arrays, _ = painted(name)
    stored = np.load(ARRAYS)
    for part, array in arrays.items():
        before = stored[f"{name}/{part}"]
        assert array.shape == before.shape
        difference = array.astype(np.float64) - before
        if part == "latents":
            difference = difference[..., *AROUND_LATENTS]
        elif part == "images":
            difference = difference[:, *AROUND]
        rms = np.sqrt(np.mean(difference**2))
        assert rms <= BOUNDS[name], f"{name}/{part} moved by an RMS of {rms:.3g}; at most {BOUNDS[name]} is rounding"


@pytest.mark.parametrize("name", [*CASES, "job"])
def test_bytes_are_the_stored_ones(painted, name):
    _, digests = painted(name)
    if machine() not in read(DIGESTS):
        pytest.skip(f"no digests are stored for {machine()}: `pytest tests/golden --renew` on a trusted commit")
    assert digests == read(DIGESTS)[machine()][name]


def test_a_job_s_other_files_are_the_stored_ones_on_every_machine(painted):
    _, digests = painted("job")
    for stored in read(DIGESTS).values():
        unpainted = {file: digest for file, digest in stored["job"].items() if not file.startswith(PAINTED)}
        assert len(unpainted) >= 11  # job.json, two tables, and two masks of each image
        assert {file: digest for file, digest in digests.items() if not file.startswith(PAINTED)} == unpainted

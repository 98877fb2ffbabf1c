"""Jobs on disk: the same bytes every time, interrupted or not, and refusals."""

import json
import re
import shutil
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gbci_fast.data.deidentify import KeptIdentifiers
from gbci_fast.data.vindr import VinDr, find_inputs
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.generate import job, sinks
from gbci_fast.generate.identities import Identities
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings, SamplerSettings
from gbci_fast.jobs.files import sha256_of
from gbci_fast.model.few_step import FewStepLoRA
from gbci_fast.model.pipeline import GBCIPipeline


class StopError(Exception):
    """Something that nobody expects."""


def stop_now(image):
    raise KeyboardInterrupt


def manifest_of(output):
    return pd.read_parquet(output / "manifest.parquet")


def test_same_job_same_bytes(make_job, phantom, finished, tree, tmp_path):
    make_job(phantom, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(finished)


@pytest.mark.parametrize(("tier", "bound"), [("exact", 1e-3), ("tolerance", 0.1), ("approximate", 0.1)])
def test_the_fast_path_keeps_the_promises(make_job, pipe, phantom, tree, tmp_path, tier, bound, stop_after):
    """The same bytes, interrupted or not; and other batches change no image beyond the tier's rounding."""
    fast = accelerate(pipe, tier=tier)
    settings = {
        "runtime": fast.decision.runtime,
        "tier": tier,
        "sampler": SamplerSettings(num_inference_steps=2, guidance_scale=3.0),
    }
    make_job(phantom, tmp_path / "data", pipe=fast, settings=settings)
    with pytest.raises(StopError):
        make_job(phantom, tmp_path / "cut", pipe=fast, settings=settings, on_batch=stop_after(2, StopError))
    make_job(phantom, tmp_path / "cut", pipe=accelerate(pipe, tier=tier), settings=settings, resume=True)
    assert tree(tmp_path / "cut") == tree(tmp_path / "data")
    make_job(phantom, tmp_path / "other", pipe=fast, settings={**settings, "batch_size": 3})
    for name in manifest_of(tmp_path / "data").dicom_file:
        image, other = (read_mammogram(tmp_path / folder / name).unit() for folder in ("data", "other"))
        difference = (image - other)[image != other]
        assert difference.size == 0 or np.sqrt(np.mean(np.square(difference))) < bound


def test_another_seed_gives_other_images_under_other_names(images_of, make_job, phantom, finished, tmp_path):
    make_job(phantom, tmp_path / "other", seed=1)
    assert not images_of(tmp_path / "other").keys() & images_of(finished).keys()
    first, second = manifest_of(finished), manifest_of(tmp_path / "other")
    assert not set(first.dicom_sha256) & set(second.dicom_sha256)
    assert not set(first.png_sha256) & set(second.png_sha256)


def test_the_batch_size_changes_no_image_beyond_rounding(images_of, make_job, phantom, finished, tmp_path):
    make_job(phantom, tmp_path / "data", settings={"batch_size": 3})
    for name in manifest_of(tmp_path / "data").dicom_file:
        image, other = read_mammogram(tmp_path / "data" / name), read_mammogram(finished / name)
        difference = np.abs(image.unit() - other.unit())
        assert difference.max() < 2e-3
    assert images_of(tmp_path / "data").keys() == images_of(finished).keys()


def test_manifest(finished, phantom):
    manifest = manifest_of(finished)
    assert len(manifest) == 4
    assert manifest["index"].tolist() == list(range(4))
    assert manifest.batch.tolist() == [0, 0, 1, 1]
    for kind in ("dicom", "png", "mask"):
        digests = [sha256_of(finished / name) for name in manifest[f"{kind}_file"]]
        assert manifest[f"{kind}_sha256"].tolist() == digests
    records = {record.image_id: record for record in VinDr(phantom).images}
    assert manifest.template_sha256.tolist() == [sha256_of(records[name].path) for name in manifest.template_image_id]
    row = manifest.iloc[0]
    expected = {
        "variant": 0, "height": 192, "width": 160, "mask_source": "auto", "report": "", "spacing_assumed": False,
        "job_seed": 0, "formats": "dicom,png", "num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 2,
        "scheduler": "DDIMScheduler", "few_step": False, "runtime": "eager", "tier": "exact", "dtype": "fp32",
        "weights_hash": "ab" * 32, "gbci_fast": "0.1.0", "compression": "rle",
        "template_file": f"{row.template_image_id}.dicom",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert json.loads(row.attributes)["finding_categories"] == ["Mass"]
    mask = np.asarray(Image.open(finished / row.mask_file)) == 255
    ys, xs = np.nonzero(mask)
    assert xs.min() < row.xmin < row.xmax < xs.max() + 1  # the mask has a rim more than the lesion
    assert ys.min() < row.ymin < row.ymax < ys.max() + 1


def test_manifest_tells_of_the_few_step_student(make_job, pipe, templates, tmp_path):
    weight = pipe.unet.conv_in.weight
    tensors = {"conv_in.up": torch.ones(len(weight), 1), "conv_in.down": torch.ones(1, weight[0].numel())}
    change = FewStepLoRA.of(tensors, guidance_scale=make_job.sampler.guidance_scale, steps=4)
    carrying = GBCIPipeline(**{**pipe.components, "few_step": change})
    found = {}
    for few_step in (True, False):
        fast = accelerate(carrying, tier="approximate", few_step=few_step)
        make_job(templates / "full_LCC.dcm", tmp_path / str(few_step), pipe=fast)
        found[few_step] = manifest_of(tmp_path / str(few_step)).iloc[0]
    assert {asked: row.few_step for asked, row in found.items()} == {True: True, False: False}
    assert found[True].png_sha256 != found[False].png_sha256


def test_the_preview_shows_a_choice_of_images(make_job, templates, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PREVIEW_ROWS", 2)
    make_job(templates / "full_LCC.dcm", tmp_path / "data", variants=3)
    assert len(manifest_of(tmp_path / "data")) == 3
    assert Image.open(tmp_path / "data" / "preview.png").size == (8 * 224, 2 * 224 + 18)


def test_no_table_holds_an_absolute_path(make_job, templates, tmp_path):
    Image.fromarray(np.full((160, 120), 255, np.uint8)).save(tmp_path / "mask.png")
    output = tmp_path / "data"
    make_job(templates / "full_LCC.dcm", output, mask=str(tmp_path / "mask.png"))
    tables = [path.read_text() for path in output.iterdir() if path.suffix in (".csv", ".json")]
    tables.append(manifest_of(output).to_csv())
    assert len(tables) == 4
    for folder in (tmp_path, templates):
        assert not any(str(folder) in table for table in tables)


@pytest.mark.parametrize(("count", "error"), [(2, StopError), (4, KeyboardInterrupt)])
def test_interrupted_then_resumed(
    assert_valid_part, make_job, phantom, finished, tree, tmp_path, count, error, stop_after
):
    output = tmp_path / "data"
    with pytest.raises(error):
        make_job(phantom, output, on_batch=stop_after(count, error))
    assert_valid_part(output, make_plan(VinDr(phantom).images, variants=1, seed=0), count)
    assert (output / ".progress").is_dir()
    counts = []
    make_job(phantom, output, resume=True, on_batch=counts.append)
    assert counts == list(range(count, 5, 2))
    assert tree(output) == tree(finished)


@pytest.mark.parametrize("name", ["dicom.write_synthesis", "png.encode_synthesis"])
def test_a_stop_within_a_batch_leaves_none_of_its_files(
    assert_valid_part, make_job, phantom, finished, tree, tmp_path, monkeypatch, name
):
    output, write, calls = tmp_path / "data", attrgetter(name)(sinks), []

    def write_three(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise StopError
        return write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"gbci_fast.generate.sinks.{name}", write_three)
        with pytest.raises(StopError):
            make_job(phantom, output)
    assert_valid_part(output, make_plan(VinDr(phantom).images, variants=1, seed=0), 2)
    assert all(any(path.iterdir()) for path in output.rglob("*") if path.is_dir())
    make_job(phantom, output, resume=True)
    assert tree(output) == tree(finished)


def test_a_killed_run_is_resumed(make_job, phantom, finished, tree, tmp_path, stop_after):
    output = tmp_path / "data"
    with pytest.raises(StopError):
        make_job(phantom, output, on_batch=stop_after(2, StopError))
    # No clean-up ran: no tables, but files of the second batch, and some under temporary names.
    for name in ("manifest.parquet", "breast-level_annotations.csv", "finding_annotations.csv", "preview.png"):
        (output / name).unlink()
    begun = make_plan(VinDr(phantom).images, variants=1, seed=0)[2:4]
    half_written = [
        output / "images" / begun[0].study_id / f"{begun[0].image_id}.dicom",
        output / "images" / begun[0].study_id / f".{begun[0].image_id}.png.99.tmp",
        output / "masks" / begun[1].study_id / f".{begun[1].image_id}.png.99.tmp",
        output / ".manifest.parquet.99.tmp",
        output / ".progress" / ".batch-000001.json.99.tmp",
    ]
    for path in half_written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    make_job(phantom, output, resume=True)
    assert tree(output) == tree(finished)


@pytest.mark.parametrize("existed", [False, True])
def test_stopped_before_the_first_batch_is_finished_nothing_stays(
    make_job, phantom, finished, tree, tmp_path, monkeypatch, existed
):
    output = tmp_path / "data"
    if existed:
        output.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(job, "preview_panels", stop_now)
        with pytest.raises(KeyboardInterrupt):
            make_job(phantom, output)
    assert list(tmp_path.rglob("*")) == ([output] if existed else [])
    make_job(phantom, output, resume=True)
    assert tree(output) == tree(finished)


def test_resuming_a_finished_job_does_nothing(make_job, phantom, finished, tmp_path, monkeypatch):
    output, counts = shutil.copytree(finished, tmp_path / "data"), []
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    monkeypatch.delattr(GBCIPipeline, "__call__")
    make_job(phantom, output, resume=True, on_batch=counts.append)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert counts == [4]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "job_seed 0, not 1, other descriptions"),
        ({"variants": 2}, "images 4, not 8, other masks, other descriptions"),
        ({"overrides": {"finding_birads": 5}}, "other descriptions"),
        ({"report": "a mass"}, "other descriptions"),
        ({"mask": "annotations"}, "images 4, not 2, other masks, other descriptions"),
        ({"settings": {"batch_size": 4}}, "batch_size 2, not 4"),
        ({"settings": {"formats": ("png",)}}, "formats dicom,png, not png"),
        (
            {"settings": {"sampler": SamplerSettings(num_inference_steps=2)}},
            "num_inference_steps 1, not 2",
        ),
        ({"settings": {"weights_hash": "cd" * 32}}, "other weights_hash"),
        ({"settings": {"runtime": "fused"}}, "runtime eager, not fused"),
        ({"settings": {"tier": "tolerance", "dtype": "bf16"}}, "tier exact, not tolerance, dtype fp32, not bf16"),
    ],
)
def test_another_job_is_not_resumed(make_job, phantom, finished, tree, changes, sentence):
    before = tree(finished)
    with pytest.raises(GBCIError, match=f"holds another job: {sentence}.*; resume with the same arguments"):
        make_job(phantom, finished, resume=True, **changes)
    assert tree(finished) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_something_else(make_job, phantom, tmp_path, resume):
    (tmp_path / "notes.txt").write_text("mine")
    sentence = "holds no job to resume" if resume else "is not empty; pass --resume"
    with pytest.raises(GBCIError, match=sentence):
        make_job(phantom, tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", ["", "[1]", "{", "\0"])
def test_a_damaged_job_file(make_job, phantom, tmp_path, content):
    (tmp_path / "job.json").write_text(content)
    with pytest.raises(GBCIError, match=r"job.json cannot be read, so .* holds no job to resume"):
        make_job(phantom, tmp_path, resume=True)


def test_an_output_that_is_a_file(make_job, phantom, tmp_path):
    (tmp_path / "data").write_text("mine")
    with pytest.raises(GBCIError, match="data is a file; expected a folder"):
        make_job(phantom, tmp_path / "data")


def test_a_missing_image_is_noticed_before_anything_is_made(make_job, phantom, tmp_path):
    root = shutil.copytree(phantom, tmp_path / "root")
    for record in VinDr(root).images[2:]:
        record.path.unlink()
    with pytest.raises(GBCIError, match=r"\.dicom does not exist; expected every image of the input \(1 more in"):
        make_job(root, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_one_job_at_a_time(make_job, phantom, finished, tree, tmp_path):
    output, seen = tmp_path / "data", []

    def second(images):
        if images == 2:
            with pytest.raises(GBCIError, match="data is in use by another run; wait until it ends"):
                make_job(phantom, output, resume=True)
            seen.append(images)

    make_job(phantom, output, on_batch=second)
    assert seen == [2]
    assert tree(output) == tree(finished)  # no lock is left either


def test_the_lock_of_a_dead_process_holds_nobody_up(make_job, phantom, finished, tree, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".lock").touch()
    make_job(phantom, tmp_path / "data")
    assert tree(tmp_path / "data") == tree(finished)


def test_template_ids_name_no_file(images_of, make_job, templates, tmp_path):
    """An id out of a file's name or a table goes into the tables as text, and never into a path."""
    (tmp_path / "input").mkdir()
    shutil.copy(templates / "full_LCC.dcm", tmp_path / "input" / "..evil_LCC.dcm")
    (record,) = find_inputs(tmp_path / "input" / "..evil_LCC.dcm")
    record = replace(record, image_id="../../evil", study_id="../up")
    make_job([record], tmp_path / "deep" / "data", identities=Identities(KeptIdentifiers()))
    assert manifest_of(tmp_path / "deep" / "data").template_image_id.tolist() == ["../../evil"]
    made = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert made == {"input", "deep"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]
    names = [part for name in images_of(tmp_path / "deep" / "data") for part in Path(name).with_suffix("").parts[1:]]
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in names)


def test_unknown_view_is_refused_for_dicom_and_blank_in_tables(make_job, templates, tmp_path):
    shutil.copy(templates / "sixteen_LCC.png", tmp_path / "scan.png")
    with pytest.raises(GBCIError, match=r"scan.png: view is unknown and side unknown; DICOM needs both: write them"):
        make_job(tmp_path / "scan.png", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    make_job(tmp_path / "scan.png", tmp_path / "data", settings={"formats": ("png",)})
    (image,) = VinDr(tmp_path / "data").images
    assert (image.view_position, image.laterality, image.path.suffix) == (None, None, ".png")
    assert manifest_of(tmp_path / "data").dicom_file.tolist() == [""]
    named = {"overrides": {"view_position": "MLO", "laterality": "R"}}
    make_job(tmp_path / "scan.png", tmp_path / "named", **named)
    (image,) = VinDr(tmp_path / "named").images
    assert (image.read().view_position, image.read().laterality) == ("MLO", "R")


def test_equal_names_in_different_folders_do_not_collide(images_of, make_job, templates, tmp_path):
    for folder in ("one", "two", "deep/one"):
        (tmp_path / "input" / folder).mkdir(parents=True)
        shutil.copy(templates / "full_LCC.dcm", tmp_path / "input" / folder / "same_LCC.dcm")
    make_job(tmp_path / "input", tmp_path / "data")
    images = VinDr(tmp_path / "data").images
    assert len({image.image_id for image in images}) == 3
    assert len(images_of(tmp_path / "data")) == 9
    assert manifest_of(tmp_path / "data").dicom_sha256.nunique() == 3


@pytest.mark.parametrize("formats", [("tiff",), ("dicom", "tiff"), ()])
def test_unknown_format(formats):
    with pytest.raises(GBCIError, match=r"format is '.*'; expected one or more of dicom, png"):
        JobSettings(seed=0, formats=formats)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_table_holds(seed):
    with pytest.raises(GBCIError, match=f"seed is {seed}; expected a whole number from 0 to 9223372036854775807"):
        JobSettings(seed=seed)


def test_batch_size_of_nothing():
    with pytest.raises(GBCIError, match="batch_size is 0; expected at least 1"):
        JobSettings(seed=0, batch_size=0)

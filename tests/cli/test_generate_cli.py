"""`gbci-fast generate` from arguments to exit status: data, error sentences, Ctrl-C."""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gbci_fast.cli import main
from gbci_fast.data.vindr import VinDr
from gbci_fast.generate.priors import PACKAGED, load_priors
from gbci_fast.model.conditioning import ConditionEncoder
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.phantom import generate_phantom

QUICK = ("--variants", "1", "--steps", "1", "--guidance", "1", "--batch-size", "2")


@pytest.fixture(scope="module")
def weights(tiny_checkpoint):
    return tiny_checkpoint(224)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "root"
    generate_phantom(root, studies=1, seed=0, size=(192, 160))
    return root


@pytest.fixture(scope="module")
def image(phantom):
    return VinDr(phantom).images[0].path


@pytest.fixture(autouse=True)
def _own_signal_handler():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def generate(*arguments):
    return main(["generate", *map(str, arguments)])


def test_a_data_set(weights, phantom, tmp_path, capfd):
    output = tmp_path / "deep" / "data"
    options = ("--set", "finding_birads=5", "--set", "finding_categories=Mass, Asymmetry", "--report", "two words")
    assert generate(phantom, "--output", output, "--weights", weights, *QUICK, *options) == 0
    out, err = capfd.readouterr()
    first, how, *notes = out.splitlines()
    assert first == f"4 synthetic images in {output}; look at {output / 'preview.png'}"
    assert re.fullmatch("sampled with runtime fused, tier tolerance, (bfloat16|float32)", how)
    assert len(notes) == how.endswith("float32")  # why not bfloat16
    lines = err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["2/4 images", "4/4 images"]
    assert all(" images/s, 0:00:" in line for line in lines)
    images = VinDr(output).images
    assert len(images) == 4
    for image in images:
        assert image.findings[0].attributes.finding_categories == ("Mass", "Asymmetry")
        assert image.findings[0].attributes.finding_birads == 5
        assert image.findings[0].report(image) == "two words"
    manifest = pd.read_parquet(output / "manifest.parquet")
    assert set(manifest.num_inference_steps) == set(manifest.guidance_scale) == {1}
    assert len(manifest.weights_hash[0]) == 64
    assert set(manifest.runtime) == {"fused"}
    assert set(manifest.tier) == {"tolerance"}
    assert set(manifest.dtype) == {"bf16" if how.endswith("bfloat16") else "fp32"}
    assert {path.name for path in output.iterdir()} == {
        "breast-level_annotations.csv", "finding_annotations.csv", "finding_masks", "images", "job.json",
        "manifest.parquet", "masks", "preview.png", ".finished",
    }  # fmt: skip

    # Once more: nothing to do; without --resume: a refusal.
    assert generate(phantom, "--output", output, "--weights", weights, *QUICK, *options, "--resume") == 0
    assert capfd.readouterr().out == out
    assert generate(phantom, "--output", output, "--weights", weights, *QUICK, *options) == 1
    assert "is not empty; pass --resume" in capfd.readouterr().err


def test_how_it_is_sampled_is_part_of_the_job(weights, image, tmp_path, capfd):
    """The job records the decision. Another runtime, tier or dtype is another job. Images equal eager's to 1e-4."""
    common = ("--weights", weights, *QUICK[:-1], 2, "--format", "png", "--guidance", 3)
    ours, eager = tmp_path / "ours", tmp_path / "eager"
    assert generate(image, "--output", ours, *common, "--runtime", "fused", "--tier", "exact") == 0
    assert capfd.readouterr().out.splitlines()[1] == "sampled with runtime fused, tier exact, float32"
    assert generate(image, "--output", eager, *common, "--runtime", "eager", "--tier", "exact") == 0
    for other in (
        ("--runtime", "eager", "--tier", "exact"),
        ("--runtime", "fused", "--tier", "tolerance", "--dtype", "fp32"),
        ("--runtime", "fused", "--tier", "tolerance", "--dtype", "bf16"),
    ):
        assert generate(image, "--output", ours, *common, *other, "--resume") == 1
        assert "holds another job: " in (error := capfd.readouterr().err)
        assert ("runtime" in error, "dtype" in error) == ("eager" in other, "bf16" in other)
    rows = [pd.read_parquet(folder / "manifest.parquet").iloc[0] for folder in (ours, eager)]
    assert [(row["runtime"], row["tier"], row["dtype"]) for row in rows] == [
        ("fused", "exact", "fp32"),
        ("eager", "exact", "fp32"),
    ]
    a, b = (
        np.asarray(Image.open(folder / row.png_file), np.int64) for folder, row in zip((ours, eager), rows, strict=True)
    )
    assert 0 < np.abs(a - b).max() < 1e-4 * 65535


def test_what_cannot_be_is_refused_in_a_sentence(weights, image, tmp_path, capfd):
    options = ("--weights", weights, *QUICK, "--tier", "exact", "--dtype", "bf16")
    assert generate(image, "--output", tmp_path / "data", *options) == 1
    assert "dtype is torch.bfloat16 with tier 'exact'; expected torch.float32" in capfd.readouterr().err
    assert not (tmp_path / "data").exists()


def test_png_alone_and_a_mask_file(weights, image, tmp_path):
    Image.fromarray(np.pad(np.full((40, 40), 255, np.uint8), ((76, 76), (10, 110)))).save(tmp_path / "mask.png")
    options = ("--mask", tmp_path / "mask.png", "--format", "png", "--dtype", "bf16")
    assert generate(image, "--output", tmp_path / "data", "--weights", weights, *QUICK, *options) == 0
    (made,) = VinDr(tmp_path / "data").images
    assert made.path.suffix == ".png"
    assert made.findings[0].box == (10, 76, 50, 116)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (
            ("--balance", "natural", "--variants", "40"),
            r"note: \d+ of 160 lesions are of other categories than Mass \(",
        ),
        (("--set", "finding_categories=Asymmetry"), r"note: 16 of 16 lesions are of .* \(16 Asymmetry\); the packaged"),
        (("--set", "finding_categories=Asymmetry,Mass"), ""),
        (("--set", "finding_categories=No Finding"), ""),
        (("--set", "finding_categories=unknown"), ""),
    ],
)
def test_categories_that_the_packaged_model_does_not_paint_are_said(phantom, weights, tmp_path, capfd, options, note):
    assert generate(phantom, *options, "--write-plan", tmp_path / "plan.csv") == 0
    assert re.match(note, said := capfd.readouterr().err)
    assert bool(said) == bool(note)
    assert generate(phantom, "--plan", tmp_path / "plan.csv", "--write-plan", tmp_path / "again.csv") == 0
    assert capfd.readouterr().err == said
    assert generate(phantom, *options, "--weights", weights, "--write-plan", tmp_path / "other.csv") == 0
    assert capfd.readouterr().err == ""  # no note for the user's own weights


@pytest.fixture(scope="module")
def old_weights(tiny_pipeline, tmp_path_factory):
    """A checkpoint that knows the first attributes alone, as the packaged one."""
    folder = tmp_path_factory.mktemp("old") / "checkpoint"
    encoder = ConditionEncoder(image_size=224, width=64, depth=1, report_depth=1, pooled_dim=64)
    GBCIPipeline(**{**tiny_pipeline(224).components, "conditioner": encoder}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (("--set", "margin=spiculated", "--set", "subtlety=3", "--set", "finding_birads=5"), "margin, subtlety"),
        (("--balance", "pathology"), "pathology"),
        (("--plan", "plan.csv"), "shape"),
        (("--mask", "annotations"), None),  # shape and margin of the phantom's table
        (("--set", "margin=unknown"), None),
    ],
)
def test_what_the_checkpoint_does_not_know_is_said_once(
    phantom, old_weights, weights, tmp_path, capfd, monkeypatch, options, ignored
):
    monkeypatch.chdir(tmp_path)
    name = VinDr(phantom).images[0].image_id
    (tmp_path / "plan.csv").write_text(f"image,shape,margin\n{name},oval,\n{name},,unknown\n")
    common = ("--format", "png", *(QUICK[2:] if "--plan" in options else QUICK))
    assert generate(phantom, "--output", "old", "--weights", old_weights, *common, *options) == 0
    printed, said = capfd.readouterr()
    notes = [line for line in said.splitlines() if "does not know" in line]
    sentence = "note: this checkpoint does not know {}, and ignores what was set. The tables state it nevertheless; "
    assert [line[: len(sentence) - 2 + len(ignored or "")] for line in notes] == (
        [sentence.format(ignored)] if ignored else []
    )
    assert "ignores" not in printed
    assert generate(phantom, "--output", "new", "--weights", weights, *common, *options) == 0
    assert "does not know" not in capfd.readouterr().err


def test_no_finding_has_no_margin(phantom, tmp_path, capfd):
    options = ("--set", "finding_categories=No Finding", "--set", "margin=spiculated")
    assert generate(phantom, *options, "--write-plan", tmp_path / "plan.csv") == 1
    assert capfd.readouterr().err == ("gbci-fast generate: margin is 'spiculated' beside 'No Finding'; expected none\n")


def test_rows_that_repeat_a_finding_are_said(phantom, tmp_path, capfd):
    root = shutil.copytree(phantom, tmp_path / "root")
    table = root / "finding_annotations.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([*rows, *rows[1:]]) + "\n")
    assert generate(root, "--mask", "annotations", "--write-plan", tmp_path / "plan.csv") == 0
    assert re.fullmatch(
        rf"note: {table}, line \d and 1 more rows: the same image, box, finding_categories and finding_birads as in an "
        "earlier row; counted as one lesion\n",
        capfd.readouterr().err,
    )


def test_what_cannot_be_read_is_an_error_or_listed(weights, image, tmp_path, capfd):
    folder, output = tmp_path / "in", tmp_path / "data"
    folder.mkdir()
    shutil.copy(image, folder / "a_LCC.dcm")
    (folder / "study").symlink_to(tmp_path / "unmounted")
    (folder / os.fsdecode(b"M\xfcller_LCC.dcm")).hardlink_to(folder / "a_LCC.dcm")
    options = (folder, "--output", output, "--weights", weights, *QUICK, "--format", "png", "--keep-identifiers")
    assert generate(*options) == 1
    (sentence,) = capfd.readouterr().err.splitlines()
    assert "has a name that is not plain text (UTF-8); rename it (1 more cannot be looked at either)" in sentence
    assert not output.exists()
    assert generate(*options, "--skip-bad") == 0
    assert "skipped 2 of 3" in capfd.readouterr().out
    assert pd.read_csv(output / "skipped.csv").to_dict("records") == [
        {
            "file": r"M\udcfcller_LCC.dcm",
            "reason": r"'M\udcfcller_LCC.dcm' has a name that is not plain text (UTF-8); rename it",
        },
        {"file": "study", "reason": "study is a link that leads nowhere"},
    ]
    assert len(VinDr(output).images) == 1


@pytest.mark.parametrize("option", ["INPUT", "--output"])
def test_a_loop_of_links_is_one_sentence(image, tmp_path, capfd, option):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    paths = (tmp_path / "a", tmp_path / "data") if option == "INPUT" else (image, tmp_path / "a")
    assert generate(paths[0], "--output", paths[1], *QUICK) == 1
    (sentence,) = capfd.readouterr().err.splitlines()
    assert f"{tmp_path / 'a'}" in sentence
    assert not (tmp_path / "data").exists()


def test_a_plan_is_written_edited_and_run(weights, phantom, tmp_path, capfd):
    plan, output = tmp_path / "plan.csv", tmp_path / "data"
    options = ("--seed", "3", "--priors", PACKAGED)
    assert generate(phantom, *options, "--balance", "finding_categories", "--variants", "1", "--write-plan", plan) == 0
    assert capfd.readouterr().out == f"4 synthetic images planned in {plan}; edit it and run it with --plan\n"
    rows = pd.read_csv(plan)
    assert len(rows) == rows.finding_categories.nunique() == 4
    edited = rows.iloc[[2, 0]].assign(finding_categories="Asymmetry|Mass")
    edited.to_csv(plan, index=False)
    quick = (*QUICK[2:], "--format", "png", "--weights", weights)
    assert generate(phantom, *options, *quick, "--plan", plan, "--output", output) == 0
    manifest = pd.read_parquet(output / "manifest.parquet")
    assert list(manifest.seed) == list(edited.seed)
    assert list(manifest.template_image_id) == list(edited.image)
    assert set(manifest.priors_hash) == {load_priors().digest}
    assert {image.findings[0].attributes.finding_categories for image in VinDr(output).images} == {
        ("Mass", "Asymmetry")
    }


@pytest.mark.parametrize("option", [("--output", "out"), ("--steps", "5"), ("--format", "png"), ("--resume",)])
def test_an_option_that_decides_nothing_of_a_written_plan_is_refused(image, tmp_path, capfd, option):
    with pytest.raises(SystemExit, match="2"):
        generate(image, "--write-plan", tmp_path / "plan.csv", *option)
    assert f"argument {option[0]}: not allowed with --write-plan" in capfd.readouterr().err
    assert not (tmp_path / "plan.csv").exists()


def test_ctrl_c(weights, phantom, tmp_path):
    """A real SIGINT to another process, after the first of eight batches."""
    output = tmp_path / "data"
    arguments = ["generate", str(phantom), "--output", str(output), "--weights", str(weights), *QUICK]
    arguments += ["--variants", "2", "--batch-size", "1", "--format", "png"]
    # Started in the background, a process would ignore SIGINT.
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import gbci_fast.cli as cli"
    command = [sys.executable, "-c", f"{script}; sys.exit(cli.main())", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert next(process.stderr).startswith("1/8 images")
        process.send_signal(signal.SIGINT)
        *_, finished, last = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert last == "gbci-fast generate: interrupted"
    images = VinDr(output).images
    assert finished == f"{len(images)} of 8 images are finished in {output}; --resume continues"
    assert 1 <= len(images) < 8
    assert {image.path for image in images} == set((output / "images").rglob("*.*"))
    assert main([*arguments, "--resume"]) == 0
    assert len(VinDr(output).images) == 8
    assert VinDr(output).missing() == []


def test_a_polite_kill_of_the_whole_group(weights, phantom, tmp_path):
    """SIGTERM as a job scheduler sends it: to the workers, too."""
    output = tmp_path / "data"
    arguments = ["generate", str(phantom), "--output", str(output), "--weights", str(weights), *QUICK]
    arguments += ["--variants", "8", "--batch-size", "1", "--format", "png", "--workers", "2"]
    command = [sys.executable, "-c", "import gbci_fast.cli as cli; cli.sys.exit(cli.main())", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert next(process.stderr).startswith("2/32 images")
        os.killpg(process.pid, signal.SIGTERM)
        *_, finished, last = process.stderr.read().splitlines()  # until the last process of the group has ended
    assert process.returncode == 130
    assert last == "gbci-fast generate: interrupted"
    images = VinDr(output).images
    assert finished == f"{len(images)} of 32 images are finished in {output}; --resume continues"
    assert VinDr(output).missing() == []


def test_an_output_that_no_table_can_name_is_refused_before_the_work(weights, image, tmp_path, capsys):
    for option in ("output", "write-plan"):
        name = tmp_path / os.fsdecode(b"\xff")
        assert generate(image, f"--{option}", name, "--weights", weights, *QUICK) == 1
        err = capsys.readouterr().err
        assert err.endswith(f"\\udcff is not UTF-8; choose another name for --{option}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def half_bad(image, tmp_path):
    """A folder with a good input and an input that shows nothing, which only its pixels reveal."""
    folder, content = tmp_path / "input", image.read_bytes()
    folder.mkdir()
    (folder / "a.dcm").write_bytes(content)
    (folder / "b.dcm").write_bytes(content[: -2 * 192 * 160] + b"\xff\xff\xff\xff" + bytes(2 * 192 * 160 - 4))
    return folder


def test_a_bad_input_says_what_is_finished(weights, half_bad, tmp_path, capfd):
    output = tmp_path / "data"
    assert generate(half_bad, "--output", output, "--weights", weights, *QUICK, "--batch-size", "1") == 1
    first, finished, sentence = capfd.readouterr().err.splitlines()
    assert first.startswith("1/2 images")
    assert finished == f"1 of 2 images are finished in {output}; --resume continues"
    assert sentence.startswith(f"gbci-fast generate: {half_bad / 'b.dcm'}: no breast found")
    assert len(VinDr(output).images) == 1


def test_skip_bad(weights, half_bad, tmp_path, capfd):
    output = tmp_path / "data"
    assert generate(half_bad, "--output", output, "--weights", weights, *QUICK, "--skip-bad") == 0
    made, _, *_, skipped = capfd.readouterr().out.splitlines()
    assert made == f"1 synthetic images in {output}; look at {output / 'preview.png'}"
    assert skipped == f"skipped 1 of 2, see {output / 'skipped.csv'}"
    assert len(VinDr(output).images) == 1
    (half_bad / "a.dcm").unlink()
    assert generate(half_bad, "--output", tmp_path / "none", "--weights", weights, *QUICK, "--skip-bad") == 1
    assert "gbci-fast generate: all 1 images were skipped, so nothing was made" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_identities(weights, image, tmp_path, capfd):
    """By default a pseudonym of a plain file's name; the same pseudonym for the same key file; or the name itself."""
    (tmp_path / "key").write_bytes(bytes(16))
    named = tmp_path / "in" / "doe_jane.dicom"
    named.parent.mkdir()
    named.write_bytes(image.read_bytes())
    key, found = ("--identity-key", tmp_path / "key"), {}
    for name, options in (("a", ()), ("b", key), ("c", (*key, "--seed", 1)), ("d", ("--keep-identifiers",))):
        assert generate(named, "--output", tmp_path / name, "--weights", weights, *QUICK, *options) == 0
        (found[name],) = pd.read_parquet(tmp_path / name / "manifest.parquet").template_image_id
    assert found["b"] == found["c"] != found["a"]
    assert all(re.fullmatch("[0-9a-f]{16}", found[name]) for name in "abc")
    assert found["d"] == "doe_jane"
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        generate(named, "--output", tmp_path / "e", *key, "--keep-identifiers")
    assert "argument --keep-identifiers: not allowed with argument --identity-key" in capfd.readouterr().err
    assert generate(named, "--output", tmp_path / "e", "--identity-key", tmp_path / "none") == 1
    assert f"{tmp_path / 'none'} is not a file; expected one of at least 16 bytes" in capfd.readouterr().err
    assert not (tmp_path / "e").exists()


def test_terminated_politely(weights, image, tmp_path, capfd, monkeypatch):
    def terminate(synthesis):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("gbci_fast.generate.job.preview_panels", terminate)
    assert generate(image, "--output", tmp_path / "data", "--weights", weights, *QUICK) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "gbci-fast generate: interrupted"
    assert not (tmp_path / "data").exists()


BAD = {
    "no input": (["{tmp}/absent"], "absent does not exist; expected a DICOM or PNG file or a folder of them"),
    "empty folder": (["{tmp}"], "holds no DICOM or PNG file and no breast-level_annotations.csv"),
    "no image": (["{tmp}/text.dcm"], "text.dcm: neither DICOM nor PNG by its content"),
    "variants": (["--variants", "0"], "variants is 0; expected at least 1"),
    "batch size": (["--batch-size", "0"], "batch_size is 0; expected at least 1"),
    "format": (["--format", "dicom,tiff"], "format is 'dicom,tiff'; expected one or more of dicom, png"),
    "no format": (["--format", ""], "format is ''; expected one or more of dicom, png"),
    "steps": (["--steps", "0"], "num_inference_steps is 0; expected at least 1"),
    "guidance": (["--guidance", "nan"], "guidance_scale is nan; expected a finite number"),
    "device": (["--device", "abacus"], "device is 'abacus'; expected"),
    "weights": (["--weights", "{tmp}"], "has no model_index.json; expected a pipeline folder"),
    "set": (["--set", "finding_birads"], "--set 'finding_birads' is not NAME=VALUE"),
    "set name": (["--set", "birads=4"], "attribute 'birads' is not known; expected one of laterality, view_position"),
    "set value": (["--set", "finding_birads=9"], "finding_birads is 9; expected one of 1, 2, 3, 4, 5"),
    "set number": (["--set", "age=old"], "age is 'old'; expected a number"),
    "annotations": (["--mask", "annotations"], "no input has an annotated box; use --mask auto or a mask file"),
    "mask file": (["--mask", "{tmp}/absent.png"], "absent.png cannot be read as a mask image"),
    "mask size": (["--mask", "{tmp}/small.png"], "small.png is 8x8 but the image is"),
    "balance": (["--balance", "age"], "balance is 'age'; expected natural or out of finding_categories"),
    "priors": (["--priors", "{tmp}/text.dcm"], "text.dcm cannot be read as lesion priors"),
    "output": (["--output", "{tmp}/text.dcm"], "text.dcm is a file; expected a folder to write to"),
    "output in a file": (["--output", "{tmp}/text.dcm/data"], "text.dcm"),
}


@pytest.mark.parametrize(("changes", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(weights, image, tmp_path, capfd, changes, sentence):
    if "holds no DICOM" not in sentence:
        (tmp_path / "text.dcm").write_text("no image" * 100)
        Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
    before = sorted(tmp_path.iterdir())
    changes = [text.format(tmp=tmp_path) for text in changes]
    source = [] if not changes[0].startswith("--") else [image]
    defaults = ["--output", tmp_path.parent / f"{tmp_path.name}-data", "--weights", weights, *QUICK]
    assert generate(*source, *defaults, *changes) == 1
    error = capfd.readouterr().err
    assert error.startswith("gbci-fast generate: ")
    assert sentence in error
    assert sorted(tmp_path.iterdir()) == before
    assert not defaults[1].exists()


def test_output_inside_the_input(weights, phantom, capfd):
    for output in (phantom, phantom / "data"):
        assert generate(phantom, "--output", output, "--weights", weights, *QUICK) == 1
        assert "lies in" in capfd.readouterr().err
    assert not (phantom / "data").exists()


@pytest.mark.parametrize("damage", ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_damaged_weights(weights, image, tmp_path, capfd, damage):
    copied = tmp_path / "weights"
    for path in weights.rglob("*.*"):
        (copied / path.relative_to(weights)).parent.mkdir(parents=True, exist_ok=True)
        (copied / path.relative_to(weights)).write_bytes(
            path.read_bytes()[: 100 if path.match(f"*/{damage}") else None]
        )
    assert generate(image, "--output", tmp_path / "data", "--weights", copied, *QUICK) == 1
    assert "cannot be loaded as a pipeline" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "option",
    [["--compression", "zip"], ["--steps", "many"], ["--dtype", "fp8"], ["--plan", "x.csv", "--variants", "1"], []],
)
def test_bad_usage(image, option, capsys):
    arguments = [str(image), *(["--output", "data", *option] if option else [])]
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", *arguments])
    assert exit_info.value.code == 2
    assert "usage: gbci-fast generate" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", "--help"])
    assert exit_info.value.code == 0
    assert "gbci-fast generate mammograms/ --output out/synthetic" in capsys.readouterr().out

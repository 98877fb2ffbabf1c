"""`gbci-fast doctor`: its findings, its sentences on missing parts, and its exit status."""

import json
import subprocess
import sys
import types

import pytest
import torch

import gbci_fast.ops
from gbci_fast.choices import RUNTIMES, TIERS
from gbci_fast.cli import main
from gbci_fast.errors import GBCIError
from gbci_fast.fast import doctor
from gbci_fast.fast.tensorrt.flavor import FLAVORS

WITHOUT = """
import sys
for name in {names}:
    sys.modules[name] = None
from gbci_fast.cli import main
sys.exit(main(["doctor", "--json"]))
"""


def without(*names):
    """Exit status and report of a process that cannot import the named modules."""
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(names=names)], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def usable(findings, device="cpu"):
    return {finding["name"]: finding["usable"] for finding in findings if finding["device"] == device}


@pytest.fixture(scope="module")
def report():
    return doctor.examine().to_json()


def test_what_runs_here(report):
    assert report["eager_works"]
    assert report["checkpoint"] == []
    assert report["choice"][0].startswith("on cuda: runtime " if torch.cuda.is_available() else "on cpu: runtime ")
    flavors = {f"tensorrt, {name}" for name in FLAVORS}
    assert usable(report["runtimes"]).keys() == (set(RUNTIMES) - {"auto"}) | flavors
    assert not any(usable(report["runtimes"])[name] for name in ("tensorrt", *flavors))  # on the CPU
    assert usable(report["runtimes"])["fused"]
    assert usable(report["tiers"]).keys() == {f"{tier}, {dtype}" for tier in TIERS for dtype in doctor.DTYPE_NAMES}
    assert usable(report["tiers"])["exact, float32"]
    assert not usable(report["tiers"])["exact, bfloat16"]
    assert usable(report["ops"])["blend_step"]
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said where there is no GPU")
def test_a_missing_gpu_is_said_everywhere(report):
    sentence = f"needs an NVIDIA GPU: torch finds none (torch {torch.__version__} was built "
    for kind in ("runtimes", "ops", "tiers"):
        reasons = [finding["reasons"] for finding in report[kind] if finding["device"] == "cuda"]
        assert reasons
        assert all(first.startswith(sentence) for first, *_ in reasons)


def test_a_flavor_of_tensorrt_says_how_to_install_it_or_what_is_wrong_with_it(monkeypatch, capsys, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    for module in FLAVORS["tensorrt-rtx"].modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert [doctor._flavor_version(flavor) for flavor in FLAVORS.values()] == ["of unknown version", None]
    reasons = {one.name: one.reasons for one in doctor._flavor_usability({"cuda": ["no GPU"]})}
    install = "pip install 'gbci_fast[tensorrt-rtx]'"
    assert reasons == {
        "tensorrt, tensorrt": [
            "no GPU",
            "tensorrt cannot be loaded (libnvinfer.so.10 is missing); install it again: pip install tensorrt",
        ],
        "tensorrt, tensorrt-rtx": ["no GPU", f"tensorrt-rtx is not installed: {install}"],
    }
    monkeypatch.setattr(doctor, "_load", lambda: None)
    monkeypatch.setattr(doctor, "_choice", lambda pipe, device: [])
    monkeypatch.setattr(doctor, "_accelerates", lambda pipe, device, **_: [])
    assert main(["doctor"]) == 0
    assert f"\ntensorrt-rtx is not installed: {install}\n" in capsys.readouterr().out


def test_every_operator_is_found_by_itself(report, tmp_path, monkeypatch):
    assert usable(report["ops"]).keys() >= {"blend_step", "mask_to_latent", "philox_normal"}
    (tmp_path / "new_op.py").write_text("raise ImportError('no engine is installed: pip install engine')")
    (tmp_path / "_shared.py").write_text("")
    monkeypatch.setattr(gbci_fast.ops, "__path__", [str(tmp_path)])
    assert doctor._ops() == ["new_op"]
    assert doctor._op("new_op", "cpu") == ["no engine is installed: pip install engine"]


def test_a_module_of_another_distribution_has_a_version(tmp_path, monkeypatch):
    (tmp_path / "bare_module.py").write_text("__version__ = '3.1'")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._version("bare_module") == "3.1"
    assert doctor._version("no_such_module") is None


def test_an_operator_says_what_it_needs(monkeypatch):
    module = types.ModuleType("gbci_fast.ops.new_op")
    module.triton_op = None  # as imported by an operator that has a Triton kernel
    monkeypatch.setitem(sys.modules, "gbci_fast.ops.new_op", module)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    no_triton = "triton is not installed: pip install triton"
    assert doctor._op("new_op", "cpu") == []
    assert doctor._op("new_op", "cuda") == [no_triton]
    assert doctor._op("new_op", "cuda", ["no GPU"]) == ["no GPU", no_triton]
    module.DEVICES = ("cpu",)
    assert doctor._op("new_op", "cuda")[-1] == "is for cpu alone: nothing asks for it on cuda"
    unbuilt = "gbci_fast was built without kernels for xpu: install nvcc and build it again"
    assert doctor._op("blend_step", "xpu") == [unbuilt]


def test_a_choice_of_backends_is_told_one_by_one(monkeypatch):
    module = types.ModuleType("gbci_fast.ops.new_op")
    module.BACKENDS = ("own", "xformers", "narrow")
    module.backend_refusals = lambda backend, q, *_: [f"narrow does not take {q.dtype}"] if backend == "narrow" else []
    monkeypatch.setitem(sys.modules, "gbci_fast.ops.new_op", module)
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "xformers" else "1")
    no_xformers = "xformers is not installed: pip install xformers"
    assert {one.name: one.reasons for one in doctor._op_usability("new_op", "cpu", [])} == {
        "new_op": [],
        "new_op, own": [],
        "new_op, xformers": [no_xformers],
        "new_op, narrow": ["narrow does not take torch.float32"],
    }
    findings = doctor._op_usability("new_op", "cuda", ["no GPU"])
    assert [finding.reasons for finding in findings] == [["no GPU"], ["no GPU"], ["no GPU", no_xformers], ["no GPU"]]


def test_nothing_but_the_eager_pipeline_is_there():
    status, report = without("gbci_fast._C", "triton", "xformers")
    assert status == 0
    assert report["eager_works"]
    assert report["versions"]["triton"] is report["versions"]["xformers"] is None
    assert "compiled operators of gbci_fast cannot be loaded" in report["choice"][0]
    compiled = {"blend_step", "conv3x3", "group_norm_film_silu", "mask_to_latent", "philox_normal"}
    lost = [finding for finding in report["ops"] if finding["name"] in compiled]
    runtimes = [finding for finding in report["runtimes"] if not finding["name"].startswith("tensorrt, ")]
    for findings in (lost, runtimes, report["tiers"]):
        reasons = [finding["reasons"][0] for finding in findings if finding["device"] == "cpu"]
        assert reasons
        assert all("build them with: pip install --no-build-isolation -e ." in reason for reason in reasons)


def test_without_an_eager_pipeline_it_fails(monkeypatch, capsys):
    def damaged():
        raise GBCIError("unet/config.json is damaged")

    monkeypatch.setattr(doctor, "_load", damaged)
    with pytest.raises(SystemExit) as exit_info:
        main(["doctor"])
    assert exit_info.value.code == 1
    out = capsys.readouterr().out
    assert "packaged checkpoint: unet/config.json is damaged" in out
    assert "blend_step" in out


def test_the_table_numbers_its_reasons(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_load", lambda: None)
    monkeypatch.setattr(doctor, "_choice", lambda pipe, device: [f"on {device}: runtime fused"])
    monkeypatch.setattr(doctor, "_accelerates", lambda pipe, device, **_: [] if device == "cpu" else ["no kernels"])
    monkeypatch.setattr(
        doctor, "_op", lambda name, device, no: ["geglu lacks its engine"] if name == "geglu" else list(no)
    )
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (number,) = (line.split("]")[0].strip("[") for line in lines if line.endswith("] geglu lacks its engine"))
    (row,) = (line for line in lines if " geglu " in line and "│" in line)
    assert f"no [{number}]" in row
    (row,) = (line for line in lines if " fused " in line and "│" in line)
    assert row.count("yes") == 1
    notes = [line for line in lines if line.startswith("[")]
    assert [note.split("]")[0] for note in notes] == [f"[{i + 1}" for i in range(len(notes))]
    assert len({note.split("] ")[1] for note in notes}) == len(notes) >= 2

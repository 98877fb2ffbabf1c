"""The flavors of TensorRT: which is installed, and the errors of those that cannot be used."""

import sys
import types

import pytest
import torch

from gbci_fast.errors import GBCIError
from gbci_fast.fast.tensorrt import flavor as flavor_module
from gbci_fast.fast.tensorrt.flavor import FLAVORS, GENERIC, Record, errors, pick_flavor

CUDA = torch.device("cuda")


def module(version="10.13.0", **attributes):
    made = types.ModuleType("tensorrt")
    made.__spec__ = types.SimpleNamespace(name="tensorrt")
    vars(made).update(__version__=version, **attributes)
    return made


def test_one_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(GBCIError) as refused:
        pick_flavor("auto", CUDA)
    assert str(refused.value) == (
        "tensorrt is not installed: pip install tensorrt; "
        "tensorrt-rtx is not installed: pip install 'gbci_fast[tensorrt-rtx]'"
    )
    assert FLAVORS["tensorrt-rtx"].refusals(CUDA) == [
        "tensorrt-rtx is not installed: pip install 'gbci_fast[tensorrt-rtx]'"
    ]


def test_one_whose_libraries_are_missing_is_to_be_installed_again(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot\\nopen')")
    monkeypatch.syspath_prepend(tmp_path)
    expected = r"tensorrt cannot be loaded \(libnvinfer.so.10: cannot open\); install it again: pip install tensorrt"
    with pytest.raises(GBCIError, match=expected):
        FLAVORS["tensorrt"].load()


@pytest.mark.parametrize(("version", "usable"), [("10.12.9", False), ("10.13.0.35", True), ("11.2.0", True)])
def test_too_old_a_one_is_refused(monkeypatch, version, usable):
    monkeypatch.setitem(sys.modules, "tensorrt", module(version))
    expected = [] if usable else [f"tensorrt is {version}; expected 10.13 or later: pip install tensorrt"]
    assert FLAVORS["tensorrt"].refusals(CUDA) == expected


def test_an_unknown_one_is_refused():
    with pytest.raises(GBCIError, match="flavor is 'lite'; expected one of auto, tensorrt, tensorrt-rtx"):
        pick_flavor("lite", None)


def test_the_one_for_data_centers_builds_for_the_gpu_that_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", module())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GBCIError, match="tensorrt builds for the GPU that is there, and torch finds none"):
        pick_flavor("tensorrt", None)
    assert pick_flavor("tensorrt", CUDA).capabilities() == ()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert FLAVORS["tensorrt"].target(CUDA) == "9.0"


def test_it_says_that_it_runs_on_gpus_alone(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", module())
    (reason,) = FLAVORS["fake"].__class__.__mro__[1].refusals(FLAVORS["fake"], torch.device("cpu"))
    assert reason == "fake runs on NVIDIA GPUs alone; device is cpu"


def test_a_gpu_without_a_name_gets_the_generic_engine(fake, monkeypatch):
    class Real(flavor_module.Flavor):
        pass

    flavor = Real(**{name: getattr(FLAVORS["fake"], name) for name in Real.__dataclass_fields__})
    assert flavor.capabilities() == ("8.0", "8.6", "12.0")
    for capability, target in (((8, 6), "8.6"), ((12, 0), "12.0"), ((9, 0), GENERIC)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert flavor.target(CUDA) == target


def test_the_log_goes_to_all_who_listen(fake):
    logger = FLAVORS["fake"].logger
    assert logger is FLAVORS["fake"].logger
    with logger.capture() as outer:
        with logger.capture() as inner:
            logger.native.log(fake.Severity.ERROR, "first\nline")
        logger.native.log(fake.Severity.INFO, "second")
    logger.native.log(fake.Severity.ERROR, "to nobody")
    assert inner == [Record("ERROR", "first\nline")]
    assert outer == [*inner, Record("INFO", "second")]
    assert errors(outer) == "first line"
    assert errors([]) == "it says no reason"


def test_tensorrt_rtx_is_there():
    pytest.importorskip("tensorrt_rtx_bindings")
    flavor = pick_flavor("tensorrt-rtx", None)
    assert tuple(map(int, flavor.version.split("."))) >= flavor.least
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(flavor.capabilities())

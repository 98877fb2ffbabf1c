"""What would break an install: packages left out, unpinned requirements, a missing compiler, imports."""

import fnmatch
import importlib.metadata
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gbci_fast

ROOT = Path(__file__).resolve().parents[1]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def script():
    """What setup.py defines, and under "setup" what it gives to setuptools; nothing is built."""
    arguments = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
        names = runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    return {**names, "setup": arguments}


def folder_of(package: str, package_dir: dict[str, str]) -> Path:
    return ROOT / package_dir.get(package, package.replace(".", "/"))


def test_every_folder_of_modules_is_in_the_wheel(script):
    packages, package_dir = script["setup"]["packages"], script["setup"]["package_dir"]
    folders = [folder_of(package, package_dir) for package in packages]
    modules = (path for top in ("gbci_fast", "kernels", "training") for path in (ROOT / top).rglob("*.py"))
    assert len(folders) == len(set(folders))
    assert {path.parent.resolve() for path in modules} == set(folders)
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_kernels_is_no_package():
    """A top-level import name `kernels` would shadow the package of that name that diffusers probes for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_data_files_are_in_the_wheel(script):
    patterns = [pattern.replace("**/", "*") for pattern in script["setup"]["package_data"]["gbci_fast"]]
    pages = (ROOT / "gbci_fast").rglob("*.html")
    paths = [*(ROOT / "gbci_fast/weights").rglob("*"), ROOT / "gbci_fast/generate/priors.json", *pages]
    files = ["py.typed", *(p.relative_to(ROOT / "gbci_fast").as_posix() for p in paths if p.is_file())]
    assert {"generate/priors.json", "data/qc.html", "evaluate/page.html"} <= set(files)
    assert (ROOT / "gbci_fast" / "py.typed").is_file()
    assert [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


def test_every_requirement_is_pinned_inside_its_range():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    groups = [METADATA["dependencies"], *METADATA["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name == METADATA["name"]:  # its own extras, which are among the groups
            assert requirement.extras <= METADATA["optional-dependencies"].keys()
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_installed_metadata_is_that_of_the_source():
    assert importlib.metadata.version("gbci_fast") == METADATA["version"] == gbci_fast.__version__
    entry = importlib.metadata.entry_points(group="console_scripts", name="gbci-fast")
    assert [point.value for point in entry] == ["gbci_fast.cli:main"]


def test_a_missing_compiler_is_one_sentence():
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=ROOT,
        env={**os.environ, "CXX": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "gbci_fast needs a C++20 compiler: '/nonexistent' was not found; install g++ or set CXX"
    )


def test_importing_the_package_loads_nothing_optional():
    code = (
        "import sys, gbci_fast, gbci_fast.model.noise, gbci_fast.ops;"
        "print(sorted({'triton', 'xformers', 'tensorrt', 'transformers', 'gbci_fast._C'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Installs the lowest versions that pyproject.toml allows, and runs tests that touch every dependency with them.

    python tests/floor.py [--venv DIR] [--torch VERSION] [TEST...]

From a package index alone: about 5 GB, nearly all of it torch for CUDA; ``--torch`` takes another version of it. The
extension is built for the CPU alone. GPU packages (extra "gpu") are left out.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SMOKE = (
    "tests/model/test_pipeline.py",
    "tests/fast/test_pipeline.py",
    "tests/fast/test_export.py",
    "tests/model/test_lora.py",
    "tests/bad_input/test_weights.py",
    "tests/dicom/test_reading.py",
    "tests/dicom/test_writing.py",
    "tests/generate/test_job.py",
    "tests/generate/test_manifest.py",
    "tests/generate/test_webdataset.py",
    "tests/evaluate/test_extractors.py",
    "tests/evaluate/test_page.py",
    "tests/training/test_loop.py",
)


def requirements(metadata: dict) -> list[Requirement]:
    """Of the build, of the package, and of its extra "test" with the extras that this one names."""
    project = metadata["project"]
    found, extras = [*metadata["build-system"]["requires"], *project["dependencies"]], ["test"]
    for extra in extras:
        for text in project["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == project["name"]:
                extras += sorted(requirement.extras)
            else:
                found.append(text)
    return [Requirement(text) for text in found]


def floors(metadata: dict) -> dict[str, str]:
    """{package: its lowest allowed version}, of those that have one."""
    lowest = {}
    for requirement in requirements(metadata):
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                lowest[requirement.name] = specifier.version
    return lowest


def main() -> None:
    """Makes the venv and runs the tests; its status is theirs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / "out" / "floor", help="a new folder (default: out/floor)")
    parser.add_argument("--torch", help="this version instead of the lowest")
    parser.add_argument("tests", nargs="*", default=SMOKE, help="files of tests (default: those of the smoke test)")
    args = parser.parse_args()
    lowest = floors(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    if args.torch:
        lowest["torch"] = args.torch
        lowest.pop("triton", None)  # every torch for CUDA wants its own
    subprocess.run([sys.executable, "-m", "venv", "--clear", args.venv], check=True)
    constraints = args.venv / "floors.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in lowest.items()))
    pip = [args.venv / "bin" / "pip", "--disable-pip-version-check", "install", "-q", "-c", constraints]
    build = {**os.environ, "CUDA_HOME": os.devnull}  # no nvcc: the floor is one of versions, not of kernels
    subprocess.run([*pip, "setuptools", "wheel", "numpy", "torch"], check=True, cwd=ROOT)
    subprocess.run([*pip, "--no-build-isolation", ".[test]"], check=True, cwd=ROOT, env=build)
    test = [args.venv / "bin" / "pytest", "-q", "-p", "no:cacheprovider", *args.tests]
    sys.exit(subprocess.run(test, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()

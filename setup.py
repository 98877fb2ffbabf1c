"""Package table and the C++/CUDA extension; everything else is in pyproject.toml."""

import os
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import ClassVar

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent

# `kernels/` is not a package: a top-level package `kernels` would shadow the package that diffusers probes for.
MAPPED = {"gbci_fast.ops": "kernels/ops", "gbci_fast.training": "training"}
DATA = ("py.typed", "generate/*.json", "data/*.html", "evaluate/*.html")
WEIGHTS = ("*.safetensors", "*.json", "*.md", "*.txt", "LICENSE*")
OWN = find_packages(str(ROOT), include=["gbci_fast", "gbci_fast.*"], exclude=[f"{name}*" for name in MAPPED])

# torch's stable ABI of 2.10: one build loads with every later torch, and with every Python from 3.11 on (abi3).
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Neither compiler contracts a*b+c, so that CPU and GPU round alike and draw the same noise bit for bit.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-ffp-contract=off", "-Wall", *DEFINES]
# Machine code for Ampere and Hopper, and PTX for other GPUs that are at least as new.
GENCODE = [f"-gencode=arch=compute_{a},code={b}" for a, b in (("80", "sm_80"), ("90a", "sm_90a"), ("80", "compute_80"))]
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-DUSE_CUDA", *GENCODE, *DEFINES]

SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]


def sources(suffix: str) -> list[str]:
    """Sources of the extension with a suffix. Paths are relative to this file, as setuptools requires."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/*{suffix}"))


def find_nvcc() -> str | None:
    """The path of nvcc, in CUDA_HOME if that is set, otherwise on PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def extension():
    """`gbci_fast._C`, with CUDA kernels if nvcc and a CUDA torch are installed; no GPU is needed."""
    with_cuda = find_nvcc() is not None and torch.version.cuda is not None
    return (CUDAExtension if with_cuda else CppExtension)(
        "gbci_fast._C",
        sources=[*sources(".cpp"), *(sources(".cu") if with_cuda else [])],
        depends=[*sources(".h"), "setup.py"],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )


class Build(BuildExtension.with_options(use_ninja=False)):
    user_options: ClassVar = [
        *BuildExtension.user_options,
        ("sanitize", None, "stop at a bad access or undefined behavior"),
    ]
    boolean_options: ClassVar = [*BuildExtension.boolean_options, "sanitize"]

    def initialize_options(self):
        super().initialize_options()
        self.sanitize = False

    def run(self):
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        if shutil.which(compiler) is None:
            raise SystemExit(f"gbci_fast needs a C++20 compiler: '{compiler}' was not found; install g++ or set CXX")
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise SystemExit(
                "gbci_fast needs Python's headers: Python.h was not found; install python3-dev (or -devel)"
            )
        if find_nvcc() is None:
            print("gbci_fast: nvcc was not found, so the extension is built for the CPU alone")
        elif torch.version.cuda is None:
            print("gbci_fast: torch is a CPU build, so the extension is built for the CPU alone")
        if self.sanitize:
            for module in self.extensions:
                module.extra_compile_args["cxx"] += SANITIZE_FLAGS
                module.extra_link_args += SANITIZE_FLAGS
        super().run()


if __name__ == "__main__":  # csrc/check_cuda.py runs this file for its names
    os.chdir(ROOT)
    setup(
        packages=[*OWN, *MAPPED],
        package_dir=MAPPED,
        package_data={"gbci_fast": [*DATA, *(f"weights/**/{name}" for name in WEIGHTS)]},
        ext_modules=[extension()],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )

"""Package table and the C++/CUDA extension; everything else is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from setuptools import find_packages, setup
from setuptools.modified import newer_group
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)  # setuptools wants source paths relative to this file

# `kernels/` is no package: a top-level import name `kernels` would shadow the one that diffusers probes for.
MAPPED = {"gbci_fast.ops": "kernels/ops", "gbci_fast.training": "training"}

# torch's stable ABI, as of 2.10: one build loads on every later torch, and on every Python from 3.11 (abi3).
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# No contraction of a*b+c in either compiler: CPU and GPU round alike, and draw the same noise bit for bit.
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=off", "-Wall", *DEFINES]
# Machine code for Ampere and Hopper; the PTX serves whatever else is at least as new.
GENCODE = [f"-gencode=arch=compute_{a},code={b}" for a, b in (("80", "sm_80"), ("90a", "sm_90a"), ("80", "compute_80"))]
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-DUSE_CUDA", *GENCODE, *DEFINES]

CPP_SOURCES = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
CUDA_SOURCES = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h"))


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or of PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def extension():
    """`gbci_fast._C`: with its CUDA kernels when both nvcc and a CUDA torch are here, never by looking for a GPU."""
    with_cuda = find_nvcc() is not None and torch.version.cuda is not None
    return (CUDAExtension if with_cuda else CppExtension)(
        "gbci_fast._C",
        sources=CPP_SOURCES + (CUDA_SOURCES if with_cuda else []),
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )


def check_cuda_sources(nvcc: str) -> None:
    """Compile what a CPU torch cannot link, so that a broken kernel fails here and not on the user's GPU machine."""
    includes = [f"-I{path}" for path in ("csrc", *include_paths())]
    for source in CUDA_SOURCES:
        target = ROOT / "build" / "cuda_check" / f"{Path(source).stem}.o"
        if newer_group([source, *HEADERS, "setup.py"], str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([nvcc, "-c", *NVCC_FLAGS, *includes, source, "-o", str(target)], check=True)
    print(f"gbci_fast: CPU torch, so {len(CUDA_SOURCES)} CUDA sources were compiled as a check and not linked")


class Build(BuildExtension.with_options(use_ninja=False)):
    def run(self):
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        if shutil.which(compiler) is None:
            raise SystemExit(f"gbci_fast needs a C++20 compiler: '{compiler}' was not found; install g++ or set CXX")
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise SystemExit(
                "gbci_fast needs Python's headers: Python.h was not found; install python3-dev (or -devel)"
            )
        nvcc = find_nvcc()
        if nvcc is None:
            print("gbci_fast: nvcc was not found, so the extension is built for the CPU alone")
        elif torch.version.cuda is None:
            check_cuda_sources(nvcc)
        super().run()


setup(
    packages=[*find_packages(include=["gbci_fast", "gbci_fast.*"], exclude=[f"{name}*" for name in MAPPED]), *MAPPED],
    package_dir=MAPPED,
    package_data={
        "gbci_fast": [
            "generate/*.json",
            *(f"weights/**/{name}" for name in ("*.safetensors", "*.json", "*.md", "*.txt", "LICENSE*")),
        ]
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

#!/usr/bin/env bash
# GPU tests and benchmarks on a bare CUDA machine: Python 3.12 with torch, triton and pytest, nvcc, and no network.
# Arguments go to the benchmarks' pytest: `-k cuda` leaves out the CPU's rows.
# Results go to $OUT, or to benchmarks/results. What such a Python lacks travels as wheels; to fill .wheels/ elsewhere:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#     -c constraints.txt -d .wheels diffusers importlib_metadata zipp pydicom python-gdcm pylibjpeg \
#     pylibjpeg-openjpeg pylibjpeg-rle lazy-importer hypothesis sortedcontainers pytest-benchmark \
#     py-cpuinfo2 xformers
set -euo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${OUT:-benchmarks/results}")
site=$PWD/build/site
mkdir -p "$results" "$site"

python3 -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no CUDA device here")'
python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$site" .wheels/*.whl
export PYTHONPATH=$PWD:$site
# Not `which nvcc`: that may be a wrapper far from the toolkit's libraries.
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
python3 setup.py -q check_cuda >"$results/ptxas.txt" &
python3 setup.py build_ext --inplace --force
wait $!
ln -sfn ../kernels/ops gbci_fast/ops
ln -sfn ../training gbci_fast/training

status=0
python3 -m pytest tests -m gpu -q | tee "$results/gpu_tests.txt" || status=$?
python3 -m pytest benchmarks --benchmark-json="$results/gpu.json" "$@" || status=$?
exit "$status"

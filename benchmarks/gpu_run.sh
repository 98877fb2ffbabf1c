#!/usr/bin/env bash
# GPU tests and benchmarks on a bare CUDA machine: Python 3.12 with torch, triton and pytest, nvcc, and no network.
#
#   benchmarks/gpu_run.sh [PART...] [-- OPTIONS]    # none named: the first six
#
#   tests       tests of operators, runtimes, graphs
#   ops         each operator beside eager and a copy
#   sampler     end to end, without files
#   unet        one forward beside a matrix product
#   roofline    ceilings; where the time goes, kernel by kernel
#   generate    end to end with files and shards
#   tune        other tile sizes of the Triton operators
#   memcheck    tests of the operators under compute-sanitizer
#   racecheck   the same, for races
#   compile     torch.compile's rows of sampler and unet
#   tensorrt    tests of engines, and their rows of sampler and unet
#
# Each part is meant for ten minutes; compile may take longer. OPTIONS go to pytest (of roofline and tune, to the
# script): `sampler -- --full -k 'cuda and 256-4 and few_step'` for the student.
# Results go to $OUT, or to out/gpu; rows to keep belong into benchmarks/results. What such a Python lacks travels as
# wheels; to fill .wheels/ elsewhere:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#     -c constraints.txt -d .wheels diffusers importlib_metadata zipp pydicom pylibjpeg \
#     pylibjpeg-openjpeg pylibjpeg-rle lazy-importer filelock platformdirs msgspec hypothesis \
#     sortedcontainers pytest-benchmark py-cpuinfo2 xformers
#
# The part tensorrt needs more, which is large: onnx onnxscript onnx-ir ml_dtypes protobuf flatbuffers onnxruntime
# tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs. Wheels may also lie in a folder outside the tree: WHEELS=FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        tests | ops | sampler | unet | roofline | generate | tune | memcheck | racecheck | compile | tensorrt)
            parts+=("$1")
            ;;
        *) echo "$0: the part is '$1'; its first lines name those there are" >&2 && exit 2 ;;
    esac
    shift
done
if (($#)); then shift; fi # the --
if ((${#parts[@]} == 0)); then parts=(tests ops sampler unet roofline generate); fi

results=$(realpath -m "${OUT:-out/gpu}")
site=$PWD/build/site
mkdir -p "$results" "$site"

python3 -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no CUDA device here")'
[[ -d .wheels ]] || { echo "$0: there is no .wheels/ here; its first lines say how to fill it" >&2; exit 2; }
python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$site" .wheels/*.whl ${WHEELS:+"$WHEELS"/*.whl}
export PYTHONPATH=$PWD:$site
# Not first of all nvcc on PATH: that may be a wrapper far from the toolkit's libraries.
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
[[ -x $CUDA_HOME/bin/nvcc ]] || CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
sources=$(cat setup.py csrc/*.cpp csrc/*/* | sha256sum)
if [[ $(cat build/gpu_run.sources 2>/dev/null) != "$sources" ]]; then # by content: a copied tree has new dates
    python3 csrc/check_cuda.py >"$results/ptxas.txt" &
    python3 setup.py build_ext --inplace --force
    wait $!
    echo "$sources" >build/gpu_run.sources
fi
ln -sfn ../kernels/ops gbci_fast/ops
ln -sfn ../training gbci_fast/training

bench() { # name, pytest's arguments; rows of the GPU alone, unless these have another -k
    python3 -m pytest -k 'cuda and not compile and not tensorrt' --benchmark-json="$results/gpu_$1.json" "${@:2}" | tee "$results/gpu_$1.txt"
}

status=0
for part in "${parts[@]}"; do
    echo "== $part, $(date -u +%T)"
    case $part in
        # Not all tests: some import packages for which a wheel is too large to carry.
        tests) python3 -m pytest tests/ops tests/fast/modules tests/fast/runtimes tests/fast/test_graph.py \
            tests/fast/test_sampling_options.py -m gpu -q "$@" | tee "$results/gpu_tests.txt" || status=$? ;;
        ops)
            bench ops benchmarks --ignore-glob='*_tensorrt.py' --ignore-glob='*_sampler.py' --ignore-glob='*_unet.py' \
                --ignore-glob='*_prepare.py' --ignore-glob='*_generate.py' "$@" || status=$?
            ;;
        sampler) bench sampler benchmarks/bench_sampler.py "$@" || status=$? ;;
        unet) bench unet benchmarks/bench_unet.py "$@" || status=$? ;;
        roofline | tune)
            python3 "benchmarks/$part.py" --output "$results/gpu_$part.json" "$@" | tee "$results/gpu_$part.txt" ||
                status=$?
            ;;
        generate) bench generate benchmarks/bench_generate.py "$@" || status=$? ;;
        memcheck | racecheck) python3 tests/sanitize_cuda.py "$part" "$@" | tee "$results/gpu_$part.txt" || status=$? ;;
        compile)
            bench compile benchmarks/bench_sampler.py benchmarks/bench_unet.py -k 'cuda and compile' "$@" || status=$?
            ;;
        tensorrt)
            python3 -m pytest tests/fast/tensorrt -m gpu -q | tee "$results/gpu_tensorrt.txt" ||
                status=$?
            bench tensorrt benchmarks/bench_sampler.py benchmarks/bench_unet.py -k 'cuda and tensorrt' "$@" || status=$?
            ;;
    esac
done
echo "== done, $(date -u +%T)"
exit "$status"

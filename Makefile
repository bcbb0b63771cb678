# From a fresh clone to a result: `make test` and `make bench` make the environment, build the kernels and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build venv test test-all bench lint wheel clean

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

test: build
	$(BIN)/python -m pytest tests -m 'not slow and not gpu'

test-all: build
	$(BIN)/python -m pytest tests -m 'not gpu'

bench: build
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# A wheel for this machine and an sdist that builds elsewhere.
wheel: build
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -w dist .
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

# Leaves the environment; the next build compiles everything again.
clean:
	rm -rf build dist out *.egg-info fastalex/*.so $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

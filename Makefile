# certdraft: every target does its own set-up in .venv, once. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help demo real test gpu faults test-slow interop types docs format check clean

FOLDERS := arbitration certificates configs data decoding drafters evaluation losses support train
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

# The first of these that runs and is new enough; `make PYTHON=/path/to/python3.12 test` chooses another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
# On a Linux machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves 2 GB of download.
TORCH_INDEX ?=
PIP_FLAGS := --disable-pip-version-check -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PYTEST_FLAGS ?=
REAL_FLAGS ?=
GPU_FLAGS ?=

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## the whole promise on the embedded target: traces, two drafters, decoding, report
	$(BIN)/certdraft demo

test: $(READY)  ## every test that takes seconds (about 6 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist=loadfile -q -m "not slow and not gpu and not interop" $(PYTEST_FLAGS)

real: $(READY)  ## drafters for a real 135M model on two cores: prompts, traces, training, measured speed (45 minutes)
	$(BIN)/certdraft real $(REAL_FLAGS)

gpu: $(READY)  ## on a CUDA machine: is the GPU path right, how fast, how much memory (8 minutes, one table)
	$(BIN)/python benchmarks/gpu/run.py $(GPU_FLAGS)

faults: $(READY)  ## kills, full disks, damaged and hostile files: nothing is lost, nothing foreign runs (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu and not interop" tests/faults tests/train/runs \
		tests/data/trace tests/data/record/test_data_server.py $(PYTEST_FLAGS)

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m "slow and not gpu" $(PYTEST_FLAGS)

docs: $(READY) .cache/types/certdraft  ## the documentation as a site, in .cache/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One environment per engine under .cache/interop, made once; one that cannot be made is said and skipped.
interop: $(READY)  ## exports in real engines: llama.cpp, vLLM, OpenVINO, speculators (6 GB, minutes)
	$(BIN)/python tests/interop/environments.py
	OMP_NUM_THREADS=1 CERTDRAFT_INTEROP_LOG=benchmarks/results/interop.json \
		$(BIN)/python -m pytest -q -rs -m interop tests/interop $(PYTEST_FLAGS)

# Type checkers cannot run the editable finder: show them the same tree as one folder of links.
types: $(READY) .cache/types/certdraft  ## mypy, strict
	$(BIN)/mypy

.cache/types/certdraft:
	mkdir -p $@ && ln -sfn $(addprefix ../../../,__init__.py __init__.pyi __main__.py py.typed $(FOLDERS)) $@/

format: $(READY)  ## rewrite the sources in the house format
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

check: $(READY)  ## what a change must pass: format, lint, types, tests
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(MAKE) types && $(MAKE) test

clean:  ## remove caches and build leftovers; keeps .venv and runs
	rm -rf build dist .cache/types .cache/site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "certdraft needs Python 3.11 or newer on PATH, or: make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; choose another: make PYTHON=/path/to/python"; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON) (once; minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[test,docs]'
	@touch $@

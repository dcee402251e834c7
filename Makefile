# Encore: two commands matter, `make demo` and `make test`. Both set up the same .venv first, once.

PYTHON ?= python3.11
# torch comes first and by itself, so that its build can be chosen: TORCH_INDEX adds an index to look for it, for instance
# https://download.pytorch.org/whl/cpu for the small build without CUDA.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Two test processes of one thread each, which is what the smallest machines of the continuous integration have.
PYTEST_FLAGS ?= -n 2 --dist worksteal --durations=15

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format

help:  ## Print this list
	@echo "make TARGET [TORCH_INDEX=https://download.pytorch.org/whl/cpu]"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY)  ## Make .venv with everything in it

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing $(TORCH)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "Installing encore and what it needs"
	@$(PIP) --editable ".[test]"
	@touch $(READY)

demo: $(READY)  ## Adapt, pretrain, tune, compare and translate, on what the package ships
	@$(BIN)/encore demo

check: $(READY)  ## Formatting, lint, types, layers
	@$(BIN)/ruff format --check . || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

test: check  ## All checks, then all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

format: $(READY)  ## Rewrite the code in the house format
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

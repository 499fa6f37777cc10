# From a fresh clone with Python >= 3.10, make and a C compiler: `make run`, `make test`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run setup test test-slow test-all lint clean clean-all

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo "PYTHON=python3.12 chooses the interpreter, TORCH=torch==2.11.0 another PyTorch"

run: $(VENV)/.runtime ## set up, export shvit_s1 and validate it
	$(BIN)/edgeattn export shvit_s1 --force
	$(BIN)/edgeattn validate shvit_s1-fp32.edgeattn

test: $(VENV)/.tools lint ## set up, lint and run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.tools ## only what `make test` leaves out: every variant
	$(BIN)/python -m pytest -n 2 --dist load -m slow

test-all: test test-slow ## `make test`, then every variant

lint: $(VENV)/.tools ## format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(VENV)/.tools ## only the virtual environment, with the test tools

clean: ## remove what tools and examples left here
	rm -rf build dist *.egg-info *.edgeattn .mypy_cache .pytest_cache .ruff_cache
	find edgeattn export kernels models plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## also remove the virtual environment
	rm -rf $(VENV)

$(VENV)/.runtime: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[cpu,report]"
	$(BIN)/python -m pip install --quiet --editable ".[rtx]" || echo "TensorRT-RTX cannot be installed here: its checks will be skipped"
	@touch $@

$(VENV)/.tools: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

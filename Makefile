# make demo: set up, then watch a fine-tuning job be preempted and come back.  make test: set up, then all tests.

PYTHON ?= python3
BIN := .venv/bin
PATHS := src launcher jobs tests conf slurm

.PHONY: demo test check setup slurm clean

demo: $(BIN)/.ready
	@$(BIN)/python tests/demo.py

test: check slurm
	$(BIN)/pytest

check: $(BIN)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=src:. $(BIN)/lint-imports
	$(BIN)/python -m outlast.config.reference | diff docs/configuration.md -

setup: $(BIN)/.ready

# The real Slurm that the tests run on. Not root, or not Debian: those tests are skipped, and say why.
slurm: $(BIN)/.ready
	@slurm/devcluster/install.sh

$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "outlast needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "setuptools>=77" torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed]'
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# make demo: set up, then watch a fine-tuning job be preempted and come back.  make unit: checks and unit tests.  make test: all.

PYTHON ?= python3
BIN := .venv/bin
PATHS := src launcher jobs tests conf slurm

TWO_AT_A_TIME := $(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test unit check setup slurm clean

demo: $(BIN)/.ready
	@$(BIN)/python tests/demo.py

# Two tests at a time; then, one by one, those that measure time or share the devcluster.
test: check slurm
	@failed=; \
	$(TWO_AT_A_TIME) -m "not alone and not slurm" || failed=1; \
	$(BIN)/pytest -m "alone or slurm" || failed=1; \
	test -z "$$failed" || { echo "make test: failed, see above"; exit 1; }

# The checks and the unit tests.
unit: check
	$(TWO_AT_A_TIME) tests/unit tests/golden

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

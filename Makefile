# make demo: set up, then watch a fine-tuning job be preempted and come back.  make unit: checks and unit tests.  make test: all.

PYTHON ?= python3
BIN := .venv/bin
PATHS := src launcher jobs tests conf slurm

AT_A_TIME := --dist=loadfile --no-loadscope-reorder --numprocesses

.PHONY: demo test unit check setup slurm chromium clean

demo: $(BIN)/.ready
	@$(BIN)/python tests/demo.py

# Slurm's tests mostly wait: two processes for them, with a devcluster each, and one for the others. Then, one by one,
# those that measure time.
test: check slurm chromium
	@failed=; \
	$(BIN)/pytest $(AT_A_TIME)=3 -m "not alone" || failed=1; \
	$(BIN)/pytest -m alone || failed=1; \
	test -z "$$failed" || { echo "make test: failed, see above"; exit 1; }

# The checks and the unit tests.
unit: check
	$(BIN)/pytest $(AT_A_TIME)=2 tests/unit tests/golden

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

# The browser in which the tests look at reports. It can't be installed here: those tests are skipped, and say why.
chromium:
	@tests/chromium.sh

$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "outlast needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "setuptools>=77" torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed]'
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

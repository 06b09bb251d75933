# Everything needs Python ≥ 3.10, make and a package index; nothing needs a C++ compiler.
#   make check                                          compare every rule, backend and form with the equations
#   make reproduce [SCALE=smoke|quick|reduced|paper]    the same, then draw the papers' figures
#   make test                                           run all tests and notebooks; says what it skips and why
#   make mutants                                        on copies: plant faults that tests must see; add a rule
#   PYTHON=python3.12 make …                            another interpreter for .venv (make clean when it changes)
PYTHON ?= python3
SCALE ?= quick
OUT ?= fwp-results
VENV := .venv
BIN := $(VENV)/bin
# One thread per worker: the tests are many and small, and more threads than cores only wait for each other. The timeout
# is for a test that hangs, so it must be longer than the slowest test on the slowest machine.
TIMEOUT := 3600
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 8 --dist loadgroup --timeout $(TIMEOUT)

.PHONY: check reproduce test mutants test-gpu lint bench static notebooks wheel clean

check: $(VENV)/.installed
	$(BIN)/fwp check

reproduce: check
	$(BIN)/fwp reproduce --scale $(SCALE) --out $(OUT)

test: $(VENV)/.installed
	$(PYTEST) $(PARALLEL) --nbmake --nbmake-timeout $(TIMEOUT) notebooks tests

mutants: $(VENV)/.installed
	$(PYTEST) $(PARALLEL) -m mutants tests/test_mutants.py tests/test_recipe.py

# On the Python, PyTorch and Triton that the machine has, from a bare checkout.
test-gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "test-gpu: PyTorch finds no GPU here")'
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:benchmarks $(PYTHON) -m pytest -m gpu $$(grep -lE 'mark\.gpu|MARKS' tests/test_*.py)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for notebook in notebooks/*.ipynb; do \
	  $(BIN)/jupytext --to py:percent --output - --quiet $$notebook | diff - $${notebook%.ipynb}.py \
	  || { echo "$$notebook and its .py differ: make notebooks"; exit 1; }; \
	done

bench: $(VENV)/.installed
	$(BIN)/fwp bench --peers

# Compiles the Triton kernels for GPUs that need not be there, into benchmarks/results/static.csv.
static: $(VENV)/.installed
	TRITON_INTERPRET=0 $(BIN)/python -m fwp_benchmarks.static benchmarks/results/static.csv

# Takes over what was edited last, .ipynb or .py, and runs all of them anew, outputs kept.
notebooks: $(VENV)/.installed
	$(BIN)/jupytext --sync notebooks/*.py
	$(BIN)/python -m pytest --nbmake --nbmake-timeout $(TIMEOUT) --overwrite notebooks

wheel: $(VENV)/.installed
	$(BIN)/python -m build --no-isolation

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): PyTorch is large, this takes some minutes the first time."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Installed: $$($(BIN)/python -c 'import platform, torch; print("Python", platform.python_version(), "with PyTorch", torch.__version__)')"

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

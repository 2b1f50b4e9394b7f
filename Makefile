# `make demo` and `make test` do all their set-up themselves: a virtual environment in $(VENV), made once.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(2, os.cpu_count() or 1))')
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint format docs clean

help:
	@echo "make demo    simulate a screen, train SAMS-VAE and its siblings, write a report to results/demo"
	@echo "make test    fast tests"
	@echo "make slow    long tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the files"
	@echo "make docs    the documentation, in docs/_build/html"
	@echo "make clean   remove what the other targets made, except $(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pertvae needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: installed again only when the dependencies or the tested versions changed.
$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-test
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/.installed-test
	$(BIN)/pertvae benchmark --simulate --models samsvae cpavae svaeplus conditionalvae --seeds 0 --out results/demo

# Workers times threads is the number of cores, never more.
test slow: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS)

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow -n $(WORKERS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "wrote docs/_build/html/index.html"

clean:
	rm -rf build dist results/demo docs/_build docs/generated .mypy_cache .pytest_cache .ruff_cache .hypothesis

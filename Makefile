# On a fresh machine with Python 3.10 or newer: make demo, make test.
# Each installs into VENV first, and again only when setup.py, pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= logical

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Workers on all cores, each on one thread (tests/conftest.py); ARGS="-n 0" runs the tests in one process.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: help install demo test quick numeric lint format docs release-check clean

help:
	@echo "make demo     try each method on the models that ship, in 3 minutes; ARGS=--full; results go to out/"
	@echo "make test     run the tests; ARGS=\"-k name -x\" goes to pytest"
	@echo "make quick    run one case of every fast test: whether a change did harm, in 2 minutes"
	@echo "make numeric  run the tests that compare numbers, with other kernels than usual"
	@echo "make lint     check style and formatting with ruff; make format repairs them"
	@echo "make docs     build the pages of docs/ with an API page, to be searched, into build/site/"
	@echo "make release-check  build sdist and wheel into dist/, check their content and metadata, import the wheel"
	@echo "make clean    remove $(VENV), builds and caches"

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/diffusers-ext demo $(ARGS)

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

quick: $(INSTALLED)
	$(PYTEST) --quick $(ARGS)

numeric: $(INSTALLED)
	MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default $(PYTEST) -m numeric $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

release-check: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python .ci/check_wheel.py dist/*.whl

clean:
	rm -rf $(VENV) build dist diffusers_ext.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

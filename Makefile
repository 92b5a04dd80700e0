# Every target sets up what it needs: `make demo` and `make test` work on a machine with python3.11
# (or 3.12) and make alone.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Most tests wait for processes to start: two at a time use two cores.
TEST_PROCESSES ?= 2
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-all check unit format docs benchmark rehearsal clean

help:
	@echo "make demo [DATA=folder]  train, export, infer over S3 and evaluate, with embedded data"
	@echo "make test                the tests that need no GPU, after make check"
	@echo "make test-all            with those that take minutes: more faults, more sizes"
	@echo "make check               formatting, lint, types, unit and architecture tests"
	@echo "make install             create $(VENV) from requirements.lock"
	@echo "make format              format the code"
	@echo "make docs                build the documentation as a site in build/site"
	@echo "make rehearsal           a cluster of several nodes on this machine, and what it survives"
	@echo "make benchmark           run tests/benchmarks and print the tables"
	@echo "make clean               remove $(VENV) and everything that commands have made here"

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo "python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: install
	$(BIN)/retinaray demo $(if $(DATA),--data "$(DATA)") $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit tests/architecture

test: CHOICE = not gpu and not slow
test-all: CHOICE = not gpu

# In the order of the tree: the long files come early, and the many short ones of tests/unit fill every process to the end.
test test-all: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "$(CHOICE)" -n $(TEST_PROCESSES) --dist loadfile \
		--no-loadscope-reorder --durations 40 --durations-min 5

unit: install
	$(BIN)/python -m pytest -q tests/unit

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install
	$(BIN)/python -m mkdocs build --strict

benchmark: install
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

rehearsal: install
	$(BIN)/python cluster/rehearsal/rehearsal.py $(ARGS)

clean:
	rm -rf $(VENV) build dist demo_run .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

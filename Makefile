# `make` alone shows what there is. Everything lives in .venv, which the first command makes.
# Another interpreter: PYTHON=python3.12 make test; more tests at once: JOBS=8 make test

PYTHON ?= python3
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo test check format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Train MoA on the toy world and draw the results to runs/demo/
	$(BIN)/python scripts/demo.py

test: check ## Run everything that continuous integration runs (the same as check)

check: $(VENV)/.installed ## Lint, format, types, architecture, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

format: $(VENV)/.installed ## Rewrite the sources in the project's format and fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(VENV)/.installed ## Make .venv with the package and the developers' tools in it

clean: ## Remove .venv and what builds and checks leave behind (runs/ and data/ stay)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else "Python 3.10 to 3.13 is needed, %s is %d.%d: PYTHON=python3.x make ..." % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the package and its dependencies (several GB, some minutes) ..."
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

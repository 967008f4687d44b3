# The project's commands; `make help` lists them. Works with GNU Make 3.81 and later.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The interpreter that makes the virtual environment: python3 if it is 3.10 to 3.13, else the newest that is.
PYTHON_FITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$candidate -c '$(PYTHON_FITS)' 2>/dev/null && echo $$candidate && break; done)

PYTEST_ARGS ?=

# Nothing is fetched from a model hub, and ranks that share a machine do not fight over its cores.
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint clean

help:
	@echo "make demo      train a small vision-language model on this machine and export it"
	@echo "make test      lint, type checks and all tests (PYTEST_ARGS='-k zigzag' picks some)"
	@echo "make lint      ruff, mypy and the import contracts only"
	@echo "make install   create $(VENV) with the versions of constraints.txt (the others do so when needed)"
	@echo "make clean     remove build output and caches; $(VENV) stays"
	@echo ""
	@echo "PYTHON=/path/to/python3 chooses the interpreter of $(VENV): 3.10 to 3.13."

install: $(STAMP)

$(STAMP): constraints.txt setup.py
	@if [ ! -x $(BIN)/python ]; then \
		python="$(PYTHON)"; \
		if [ -z "$$python" ]; then \
			echo "error: no Python 3.10 to 3.13 on the PATH. Install one, or name it: make PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		if ! "$$python" -c '$(PYTHON_FITS)'; then \
			echo "error: PYTHON=$$python is not Python 3.10 to 3.13. Name one that is: make PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		echo "==> creating $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	@echo "==> installing tetrascope and what it needs (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/digits_vqa/demo.sh

lint: $(STAMP)
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> import contracts"
	@$(BIN)/lint-imports --no-logo

test: lint
	@echo "==> pytest"
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

clean:
	@rm -rf build dist *.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find tetrascope tests examples -type d -name __pycache__ -prune -exec rm -rf {} +

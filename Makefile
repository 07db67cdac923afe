# effjax needs make and Python 3.11 to 3.13, nothing else: every target makes .venv from
# the requirements files first, when it is missing or they have changed.
#
#   make quickstart   train a small model, make it cheaper in six ways, print the table
#   make test         the fast tests          (ARGS="-k rope" picks some)
#   make test-all     every test, compiled as programs of users are
#   make lint         ruff and the import contracts
#   make oracle       adds PyTorch and the other packages the tests compare with
#   make clean        removes .venv and every cache; runs/ stays
#
# PYTHON=/path/to/python3.12 chooses the interpreter, JOBS the number of test processes.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3.13 python3.12 python3.11 python3 python
JOBS ?= logical
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

# An interpreter counts if it really runs (a pyenv shim may not), has the right version
# and can make an environment (Debian ships that part as python3-venv).
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

.PHONY: quickstart test test-all lint oracle clean $(VENV)
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)
	$(BIN)/python -m effjax run --config configs/quickstart.py
	@echo "The report: runs/quickstart/report.html (and report.md, pareto.png)"

test: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	EFFJAX_OPTIMIZED=1 $(PYTEST) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports

oracle: $(VENV)/.oracle

$(VENV): $(VENV)/.runtime

# The stamps are written last, so an interrupted install starts again.
$(VENV)/.runtime: requirements.txt pyproject.toml
	@if ! $(BIN)/python -c '$(USABLE)' 2>/dev/null; then \
	  for python in $(PYTHON); do \
	    if $$python -c '$(USABLE)' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: no Python 3.11 to 3.13 with venv among: $(PYTHON)." \
	      "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	    exit 2; \
	  fi; \
	  echo "Making $(VENV) with $$found; about a minute."; \
	  $$found -m venv --clear $(VENV); \
	fi
	$(PIP) -r requirements.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(PIP) -r requirements-dev.txt -e '.[dev]'
	@touch $@

$(VENV)/.oracle: $(VENV)/.dev requirements-oracle.txt
	$(PIP) -r requirements-oracle.txt -e '.[oracle]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .ruff_cache .import_linter_cache .hypothesis
	rm -rf .pytest_cache
	find effjax tests configs notebooks -name __pycache__ -prune -exec rm -rf {} +

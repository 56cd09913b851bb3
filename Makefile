# Everything here runs inside .venv, which is made on first use and made anew when pyproject.toml changes.
#   make PYTHON=/path/to/python3.12 test       another interpreter
#   make PIP_ARGS="--index-url URL" quickstart another package index: a CPU-only PyTorch, say (on Linux the usual one brings CUDA)
#   make PYTEST_ARGS="-x -k gini" test         other arguments for pytest

PIP_ARGS ?=
PYTEST_ARGS ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)

BIN := .venv/bin
USER_STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# Two to four processes; one file stays in one process, so what its tests share is made once. Integration tests wait for processes
# of their own much of the time, and a file of few tests may be the longest: three processes, and files in the order of their names.
PYTEST := $(BIN)/python -m pytest -q
WORKERS := -n logical --maxprocesses=4
PARALLEL := $(WORKERS) --dist loadfile
WAITING := -n 3 --dist loadfile --no-loadscope-reorder

# The small edition of the digits that quickstart trains on, and where its run goes.
DIGITS := data/digits-small
DIGITS_ARGS ?= --train 1400 --val 100 --test 400
QUICKSTART_ARGS ?=
RUN := runs/quickstart

.PHONY: help install dev quickstart test test-integration test-full test-slow readme docs lint types layers check format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(USER_STAMP) ## .venv with paqdetr in it
dev: $(DEV_STAMP) ## the same, with what tests and checks need

quickstart: $(USER_STAMP) $(DIGITS)/test.json ## make data, train, evaluate: from nothing to a trained detector in half an hour
	$(BIN)/paqdetr train digits_quickstart $(QUICKSTART_ARGS) --data $(DIGITS) --output $(RUN) --resume
	$(BIN)/paqdetr eval $(RUN)/best.safetensors --data $(DIGITS) --split test --json $(RUN)/test.json
	@printf '\nThe run is in %s. Try next:\n' '$(RUN)'
	@printf '  %s\n' \
		'$(BIN)/paqdetr predict $(RUN)/best.safetensors $(DIGITS)/test --output runs/predicted' \
		'$(BIN)/paqdetr train dino_nano --data YOUR_FOLDER --output runs/mine' \
		'$(BIN)/paqdetr models'

$(DIGITS)/test.json: | $(USER_STAMP)
	$(BIN)/paqdetr data make digits --output $(DIGITS) $(DIGITS_ARGS)

test: $(DEV_STAMP) ## the unit tests, in minutes
	$(PYTEST) $(PARALLEL) $(PYTEST_ARGS)

test-integration: $(DEV_STAMP) ## processes, real faults, whole verbs, parity with other programs
	$(PYTEST) -m "integration and not slow" $(WAITING) $(PYTEST_ARGS)

test-full: test test-integration ## unit and integration tests

test-slow: $(DEV_STAMP) ## the tests that train for minutes
	$(PYTEST) -m slow -o faulthandler_timeout=7200 $(PYTEST_ARGS)

readme: $(DEV_STAMP) ## run the commands the documentation shows
	$(PYTEST) -m readme tests/test_readme.py $(WORKERS) $(PYTEST_ARGS)

docs: $(DEV_STAMP) ## write every generated table anew, and build the site: build/site/index.html
	$(BIN)/python tools/docs.py
	$(BIN)/zensical build --strict --clean

lint: $(DEV_STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(DEV_STAMP) ## import-linter: imports point down
	$(BIN)/lint-imports --no-cache

check: lint types layers ## lint, types and layers

format: $(DEV_STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Quoted: with nothing found the line would begin with a dash, and make would then ignore its failure.
$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
		echo 'paqdetr needs Python 3.11 or newer; found: "$(PYTHON)". Install one, or name it: make PYTHON=/path/to/python3' >&2; \
		exit 1; }
	"$(PYTHON)" -m venv .venv

$(USER_STAMP): pyproject.toml src/paqdetr/_version.py | $(BIN)/python
	@echo 'Installing paqdetr into .venv: PyTorch is large, the first time takes a few minutes.'
	@$(PIP) -e '.[digits,analyze]'
	@touch $@

$(DEV_STAMP): pyproject.toml src/paqdetr/_version.py | $(BIN)/python
	@echo 'Installing paqdetr and its development tools into .venv: PyTorch is large, the first time takes a few minutes.'
	@$(PIP) -e '.[dev]'
	@touch $(USER_STAMP) $@

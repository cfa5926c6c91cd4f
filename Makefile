# Two commands set everything up: `make demo` and `make test`. Both install into .venv if needed, at the
# versions of requirements.lock.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
DEMO_OUT ?= results/demo
# Of the demo's run: on two cores, two processes of one thread take two thirds of the time of one with two.
PROCESSES ?= 2
# Where packages come from a mirror that only pip knows: make demo INSTALL='.venv/bin/python -m pip install'
INSTALL ?= $(BIN)/uv pip install --python $(BIN)/python

.PHONY: demo test lint fast lock catalogue test-floor test-newest mutants clean

demo:
	@echo "vtc demo: installs what it needs into $(VENV) if that is not done (once, 1 to 5 minutes, 7 GB with" \
		"PyTorch's CUDA build), then scores 4 baselines and 2 methods on a small VLM (2 to 3 minutes on two idle cores, no GPU)"
	@$(MAKE) --no-print-directory $(VENV)/.demo
	$(BIN)/vtc eval --methods full,random,pool,downsample,todre,fastv --keep 0.25,0.1 \
		--tasks vtc_scenes --limit 96 --processes $(PROCESSES) --out $(DEMO_OUT)

$(VENV)/.uv: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock uv
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.uv
	$(INSTALL) --constraint requirements.lock --editable ".[eval]"
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.uv
	UV_COMPILE_BYTECODE=1 $(INSTALL) --constraint requirements.lock --editable ".[dev]"
	touch $@ $(VENV)/.demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m vtc.cli.catalogue --check

test: lint
	$(BIN)/python -m pytest

# What one runs between edits: everything but the slow tests.
fast: lint
	$(BIN)/python -m pytest -m "not slow"

# The oldest versions that pyproject.toml allows, and the newest there are.
test-floor test-newest: test-%:
	bash .ci/environment $*

# Brings both locks up to date with pyproject.toml; `make lock UPGRADE=--upgrade` takes newer releases too.
lock: $(VENV)/.uv
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		$(UPGRADE) --all-extras --output-file requirements.lock pyproject.toml
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		$(UPGRADE) --resolution lowest-direct --extra eval --extra test \
		--output-file requirements-floor.lock pyproject.toml

# Which share of mutants of the methods and ops their own tests kill; see tests/MUTANTS.md.
mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutation --count 10 --out mutants.json

# What `vtc methods` knows without importing PyTorch; a test says when it is out of date.
catalogue: $(VENV)/.dev
	$(BIN)/python -m vtc.cli.catalogue

clean:
	rm -rf $(VENV) .venv-floor .venv-newest build dist *.egg-info

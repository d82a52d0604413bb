# Everything from nothing: each target makes .venv and installs what it needs first.
# --no-compile: most modules of what is installed are never imported; Python compiles the others.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=

.PHONY: attack test slow bench lint clean

attack: $(VENV)/.installed
	$(PY) -m experiments.attack $(ARGS)

test: $(VENV)/.test
	$(PY) -m pytest -n auto --dist worksteal -m "not slow and not real and not gpu" $(ARGS)

slow: $(VENV)/.test
	XLA_FLAGS=--xla_backend_optimization_level=3 $(PY) -m pytest -m "slow or real" $(ARGS)

bench: $(VENV)/.bench
	$(PY) -m experiments.bench $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-compile -e .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PY) -m pip install -q --no-compile -e '.[test]'
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PY) -m pip install -q --no-compile -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

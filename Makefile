# Lamella's commands. `make` alone lists them; nothing but a Python of at least 3.11 has to be there beforehand.
#
#   PYTHON=python3.12 make test     another Python for the virtual environment
#   VENV=/tmp/venv make test        another place for it
#   make demo PROMPT="..."          another question

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?=
VENV ?= .venv
BIN = $(VENV)/bin
PROMPT ?= What is the capital of France?
PYTEST_ARGS ?=
PYTEST_PROCESSES ?= 3
# The files of the tests that are timed; the others need not be collected to find them.
TIMED_FILES = $$(grep -rl --include='test_*.py' 'mark\.timing' tests)
SOAK_ARGS ?=
VERSIONS_ARGS ?= --directory dist/versions
BENCH_ARGS ?= --device cpu --layers 8 --hidden 1024 --ffn 2816 --vocab 8192 --heads 16 --kv-heads 4 --dtype float32
# Compiled modules are kept: the tests start hundreds of processes that would compile all packages again.
export PYTHONDONTWRITEBYTECODE :=
# Taken as written: a `$` in the question is no variable.
export LAMELLA_DEMO_PROMPT := $(value PROMPT)

# The installed packages point at this checkout, so a copied checkout, or a changed dependency, installs again.
CHECKOUT := $(shell pwd -P | cksum | cut -d' ' -f1)
RUN_STAMP = $(VENV)/.lamella-run-$(CHECKOUT)
DEV_STAMP = $(VENV)/.lamella-dev-$(CHECKOUT)
BENCH_STAMP = $(VENV)/.lamella-bench-$(CHECKOUT)

.PHONY: help demo test lint types pytest slow faults soak wheel bench families versions compat docs clean

help:  ## list the commands
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(RUN_STAMP)  ## answer one question with a real model, through the real queue, on this machine
	@$(BIN)/python -m tools.demo

test: lint types pytest  ## everything a change has to pass: lint, types, all tests

lint: $(DEV_STAMP)  ## style, format, import directions, ceilings
	@echo "== ruff check"
	@$(BIN)/python -m ruff check
	@echo "== ruff format --check"
	@$(BIN)/python -m ruff format --check
	@echo "== lint-imports"
	@$(BIN)/python -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'
	@echo "== ceilings"
	@$(BIN)/python -m tools.ceilings

types: $(DEV_STAMP)  ## mypy --strict
	@echo "== mypy"
	@$(BIN)/python -m mypy

pytest: $(DEV_STAMP)  ## the test suite; PYTEST_ARGS="-k wire" narrows it
	@echo "== pytest $(PYTEST_ARGS)"
ifeq ($(strip $(PYTEST_ARGS)),)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tools.second_run -n $(PYTEST_PROCESSES) --dist loadfile \
	  --no-loadscope-reorder -m "not timing and not faults and not slow"
	@echo "== pytest, what is timed and therefore runs alone"
	@$(BIN)/python -m tools.second_run -m "timing and not faults and not slow" $(TIMED_FILES)
else
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

slow: $(DEV_STAMP)  ## tests that take long and whose facts cheaper ones hold as well
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

faults: $(DEV_STAMP)  ## every fault of docs/faults.md, also those that take long, one after the other
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)

soak: $(DEV_STAMP)  ## 4000 jobs over 40 kill -9s of 4 workers; SOAK_ARGS="--jobs 200 --kills 4 --engine tiny"
	@$(BIN)/python -m benchmarks.soak --json dist/soak.json $(SOAK_ARGS)

wheel: $(DEV_STAMP)  ## build dist/*.whl and prove that it works alone
	@echo "== wheel"
	@$(BIN)/python -m tools.check_wheel

bench: $(BENCH_STAMP)  ## Lamella beside AirLLM and accelerate on this machine; BENCH_ARGS="--device cuda" for a GPU
	@mkdir -p dist
	@$(BIN)/python -m benchmarks.sweep --json dist/benchmark.json --plot dist/benchmark.svg $(BENCH_ARGS)

families: $(DEV_STAMP)  ## run a tiny model of every family and write docs/families.md
	@$(BIN)/python -m tools.support_table

versions: $(DEV_STAMP)  ## the engine's tests on the oldest and the newest transformers and torch; VERSIONS_ARGS="--torch 2.13.0"
	@$(BIN)/python -m tools.versions $(VERSIONS_ARGS)

compat: $(DEV_STAMP)  ## the gateway's tests with litellm, which wants an environment of its own
	@test -x $(VENV)-litellm/bin/python || $(BIN)/python -m venv $(VENV)-litellm
	@$(VENV)-litellm/bin/python -m pip install -q --disable-pip-version-check -c tests/gateway/litellm_constraints.txt litellm
	@LITELLM_PYTHON=$(abspath $(VENV))-litellm/bin/python $(BIN)/python -m pytest tests/gateway/test_litellm.py

docs: $(DEV_STAMP)  ## write the reference pages and build the site into dist/site; any link that leads nowhere fails
	@$(BIN)/python -m tools.reference_pages
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "dist/site/index.html"

clean:  ## remove what was built or fetched here: the environment, caches, demo data, fetched models
	rm -rf $(VENV) $(VENV)-litellm dist .demo .models .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find client engine worker tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_STAMP): pyproject.toml constraints.txt
	@if [ ! -e $(DEV_STAMP) ] || [ pyproject.toml -nt $(DEV_STAMP) ] || [ constraints.txt -nt $(DEV_STAMP) ]; then \
	  $(call install,worker$(comma)embedded); fi
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt
	@$(call install,dev)
	@touch $@ $(RUN_STAMP)

$(BENCH_STAMP): $(DEV_STAMP)
	@$(call install,dev$(comma)bench)
	@touch $@

comma := ,

# Makes the environment if its pip does not work yet, then installs this checkout with the extras $(1), pinned. Only
# the large downloads are named, so that a first run shows that it goes on. Modules are compiled by all cores
# afterwards, which pip does with one; some packages ship files that no Python compiles.
define install
set -o pipefail; \
if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
  python=""; \
  for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11; do \
    if [ -n "$$candidate" ] && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
      then python="$$candidate"; break; fi; \
    if [ -n "$(PYTHON)" ]; then break; fi; \
  done; \
  if [ -z "$$python" ]; then \
    echo "error: no Python >= 3.11 found$(if $(PYTHON), at $(PYTHON)); install one, or name it: make PYTHON=/path/to/python3" >&2; \
    exit 1; fi; \
  echo "making $(VENV) with $$("$$python" --version)"; \
  "$$python" -m venv $(VENV) || { \
    echo "error: could not make $(VENV); on Debian and Ubuntu the package python3-venv is needed" >&2; exit 1; }; \
fi; \
echo "installing lamella[$(1)] into $(VENV) (the first time this fetches some hundred MB)"; \
$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile -c constraints.txt -e '.[$(1)]' \
  | awk '/Downloading .*[MG]B/ {print "  " $$2, $$3, $$4; fflush()}'; \
$(BIN)/python -m compileall -q -j 0 -x '/tests/' $(VENV)/lib >/dev/null 2>&1 || true
endef

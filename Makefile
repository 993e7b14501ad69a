# Everything runs in .venv, which the first target that needs it creates. `make` lists the targets.

VENV ?= .venv
BENCH_VENV ?= .venv-bench
BIN := $(VENV)/bin
EXTRAS ?= bayes,data,dev
JOBS ?= 2
ARGS ?=

# The first Python that is new enough; override with PYTHON=/path/to/python.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# Where torch comes from. PyPI's Linux build brings gigabytes of CUDA, so a Linux without an NVIDIA
# GPU takes the CPU build. Choose another with TORCH_INDEX=URL, or PyPI's with TORCH_INDEX= (empty).
ifeq ($(shell uname -s),Linux)
ifneq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu),gpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
endif
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)$(if $(filter %/cpu,$(TORCH_INDEX)),+cpu)

# install-torch DIR: a wheel that pip finds on this machine (PIP_FIND_LINKS) goes first. Without an
# index of its own, torch comes with the other dependencies.
define install-torch
$(if $(strip $(TORCH_INDEX)),$(1)/bin/pip install -q --no-index --no-deps '$(TORCH)' 2>/dev/null \
	|| $(1)/bin/pip install -q --index-url '$(TORCH_INDEX)' --no-deps '$(TORCH)')
endef

.DEFAULT_GOAL := help
.PHONY: help venv run demo sweep test test-slow lint format bench docs package check-package lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.installed ## Create the virtual environment with the pinned dependencies

run: $(VENV)/.installed ## Run the main experiment: FA-HMC against FA-LD and FedAvg on real data
	$(BIN)/fedsim run scenarios/fahmc_noniid.yaml $(ARGS)

demo: $(VENV)/.installed ## Run a small version of it, in under a minute
	$(BIN)/fedsim demo $(ARGS)

sweep: $(VENV)/.installed ## Choose the main experiment's prior precision and temperature again, on its validation split
	$(BIN)/fedsim run scenarios/sweeps/fahmc_noniid.yaml $(ARGS)

test: $(VENV)/.installed ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

test-slow: $(VENV)/.installed ## Run the statistical and other long tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m slow $(ARGS)

lint: $(VENV)/.installed ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed $(BENCH_VENV)/.installed ## Time fedsim beside its peers and write docs/benchmarks.md (ARGS=W1: print one table)
	FEDSIM_BENCH_VENV=$(abspath $(BENCH_VENV)) $(BIN)/python -m tests.benchmarks \
		$(or $(ARGS),--out docs/benchmarks.md)

docs: $(VENV)/.docs ## Build the documentation into site/
	mkdir -p docs/reference
	$(BIN)/python -m fedsim.scenario.reference > docs/reference/scenario.md
	$(BIN)/fedsim schema > docs/reference/scenario.schema.json
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(VENV)/.installed ## Build the sdist, and the wheel from it, into dist/
	rm -rf dist
	$(BIN)/python -m build

check-package: package ## Install that wheel in a clean environment and import everything
	rm -rf build/wheel-venv
	$(BIN)/python -m venv build/wheel-venv
	$(call install-torch,build/wheel-venv)
	build/wheel-venv/bin/pip install -q -c constraints.txt dist/*.whl
	build/wheel-venv/bin/python -I .ci/import_installed.py
	rm -rf build/wheel-venv

lock: $(VENV)/.installed ## Bring constraints.txt in line with pyproject.toml (ARGS=--upgrade: newest versions)
	$(BIN)/uv pip compile -q pyproject.toml --extra all --extra dev --extra docs --universal --python-version 3.11 \
		--no-annotate --no-header $(ARGS) -o constraints.txt
	@# The peers' extra `bench` is left out: it has an environment and pins of its own.
	@# torch pins its own CUDA packages, other ones in each of its builds.
	sed -i.bak -E '/^(cuda|nvidia|triton)[-=]/d' constraints.txt && rm constraints.txt.bak

clean: ## Remove what was built, but neither runs/ nor the virtual environment
	rm -rf dist build site docs/reference .mypy_cache .ruff_cache .pytest_cache .coverage htmlcov
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'fedsim needs Python 3.11 or newer; name one with PYTHON=/path/to/python.' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(call install-torch,$(VENV))
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# The peers of `make bench`, away from fedsim's own dependencies: pfl asks for old versions of what
# fedsim has new ones of (absl, attrs), and Flower's simulation for one exact Ray. Without
# constraints.txt for the same reason; torch alone is the same.
$(BENCH_VENV)/.installed: pyproject.toml
	@test -n '$(PYTHON)' || { echo 'fedsim needs Python 3.11 or newer; name one with PYTHON=/path/to/python.' >&2; exit 1; }
	$(PYTHON) -m venv $(BENCH_VENV)
	$(call install-torch,$(BENCH_VENV))
	$(BENCH_VENV)/bin/pip install -q '$(firstword $(subst +, ,$(TORCH)))' -e '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

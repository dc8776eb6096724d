# make demo    denoise a real photograph: sets everything up on the first call
# make test    run the tests                 make lint    style, types, layers, workflows
# make bench   CPU speed beside other runtimes    make format    apply the style
# make test-isa  the numerical tests as older CPUs would run them
# make docs    the pages of docs/, as site/       make dist    source distribution and wheel
# make clean   remove everything that make made

PYTHON ?= python3
VENV ?= .venv
# Installed only where $(PYTHON) has no PyTorch of its own. Pinned: a range would fetch whatever is newest.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
# The constraint keeps pip from replacing the PyTorch that is there.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
# Where make bench writes; empty for a folder named by the processor.
RESULTS ?=
PROCESSOR := "from fastden.bench.machine import processor; print(processor())"
# A trial that measures nothing: make bench RESULTS=trial LARGE= BENCH_ARGS="--rounds 1 --size 64 64"
LARGE ?= --large
BENCH_ARGS ?=
# The dtypes in which this CPU multiplies matrices natively.
NATIVE := "from fastden.network.onednn import native_bf16 as native; print('float32', 'bfloat16' * native())"
CUDA_SOURCES := $(wildcard csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp)

.PHONY: demo test test-isa lint format bench docs dist clean
.DELETE_ON_ERROR:

demo: $(VENV)/.base
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-isa: $(VENV)/.dev
	$(BIN)/python scripts/test_isa.py --json benchmarks/results/isa.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(if $(CUDA_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CUDA_SOURCES))

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CUDA_SOURCES),$(BIN)/clang-format -i $(CUDA_SOURCES))

bench: $(VENV)/.bench
	results="$(or $(RESULTS),benchmarks/results/cpu/$$($(BIN)/python -c $(PROCESSOR)))"; mkdir -p "$$results" || exit 1; \
	code=0; for dtype in $$($(BIN)/python -c $(NATIVE)); do \
	    $(BIN)/fastden bench model --device cpu --dtype $$dtype $(LARGE) $(BENCH_ARGS) --json "$$results/$$dtype.json" || code=1; \
	done; $(BIN)/fastden bench train --device cpu $(BENCH_ARGS) --json "$$results/train.json" || code=1; exit $$code

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo site scripts/page/node_modules *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: scripts/setup_venv.py
	$(PYTHON) scripts/setup_venv.py $(VENV) --torch "$(TORCH)"
	touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml setup.py
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py
	$(INSTALL) -e ".[dev]"
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml setup.py
	$(INSTALL) -e ".[bench]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml setup.py
	$(INSTALL) -e ".[docs]"
	touch $@

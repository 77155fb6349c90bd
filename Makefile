# Everything needed to try, test and measure blockd. Each target sets up ./.venv by itself.
#
#   make demo                       see it work
#   make test PYTHON=python3.12     with another Python, 3.11 or newer (after `make clean`)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CODE := blockd tests bench examples
DIST := dist

# Two workers, which take work from each other: some tests wait for disks and peers.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help demo test test-fast lint types sweep model-sweep storm direct-cycles fuzz-images population schemas bench \
  wheel-compiled clean
.DEFAULT_GOAL := help

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.ready ## stream and copy an image live, under a guest that checks every byte
	@$(BIN)/python examples/demo.py

test: lint types ## lint, type check, and all tests
	$(PYTEST)

test-fast: lint types ## the same without the tests marked slow, in under two minutes
	$(PYTEST) -m "not slow"

lint: $(VENV)/.ready-dev ## ruff: rules and formatting
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.ready-dev ## mypy --strict
	$(BIN)/mypy --strict

sweep: $(VENV)/.ready-dev ## look at more crashes than the tests do: make sweep STATES=2000000
	$(BIN)/python -m tests.crash.sweep --states $(or $(STATES),200000) $(if $(SEED),--seed $(SEED))

model-sweep: $(VENV)/.ready-dev ## compare guests' operations on cold files with a model: make model-sweep OPERATIONS=10000000
	$(BIN)/python -m tests.model_sweep --operations $(or $(OPERATIONS),1000000) --seed $(or $(SEED),0)

storm: $(VENV)/.ready-dev ## kill a daemon under clients and guests more often than the tests do: make storm STEPS=2000
	$(BIN)/python -m tests.storm --steps $(or $(STEPS),500) --seed $(or $(SEED),1)

direct-cycles: $(VENV)/.ready-dev ## look for stale pages after kills: make direct-cycles CYCLES=5000
	$(BIN)/python -m tests.kill.direct_cycles --cycles $(or $(CYCLES),500) --seed $(or $(SEED),1)

fuzz-images: $(VENV)/.ready-dev ## spoil more images than the tests do: make fuzz-images IMAGES=1000000
	$(BIN)/python -m tests.fuzz.fuzz_images $(or $(IMAGES),20000) --seed $(or $(SEED),0)

population: $(VENV)/.ready-dev ## compare verdicts on images with qemu-img's: make population IMAGES=2000
	$(BIN)/python -m tests.interop.population --images $(or $(IMAGES),2000) --seed $(or $(SEED),0)

schemas: $(VENV)/.ready ## write the JSON Schema of every command and event to schemas/
	$(BIN)/python -m blockd.commands.schemas schemas

bench: $(VENV)/.ready-dev ## compare with qemu-storage-daemon, where it is installed
	$(BIN)/python -m bench.run $(BENCH)

# Built from an unpacked source distribution: extension modules that are left beside their sources are imported
# instead of them.
wheel-compiled: $(VENV)/.ready-dev ## write a wheel with compiled map lookups and NBD codec to dist/: needs a C compiler
	@sources=$$(mktemp -d) && trap 'rm -rf "$$sources"' EXIT && \
	  HATCH_QUIET=1 $(BIN)/python -m hatchling build --target sdist --directory "$$sources" && \
	  HATCH_BUILD_HOOK_ENABLE_MYPYC=true $(PIP) wheel --no-deps --no-build-isolation --no-cache-dir \
	    --wheel-dir $(DIST) "$$sources"/*.tar.gz
	@ls $(DIST)/*.whl

clean: ## remove the environment and everything that was made in here
	rm -rf $(VENV) build dist demo-run *.egg-info *.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(CODE) \( -name __pycache__ -o -name '*.so' \) -prune -exec rm -rf {} +

# What it takes to run blockd.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "blockd needs Python 3.11 or newer, and '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "could not make $(VENV): on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV), once: downloading the packages that blockd needs"
	@$(PIP) install --editable .
	@touch $@

# What it takes to work on it.
$(VENV)/.ready-dev: $(VENV)/.ready
	@$(PIP) install --editable '.[dev]'
	@touch $@

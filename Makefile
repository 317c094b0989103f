# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := kernels/paceline_kernels/cpu
KERNELS_STAMP := $(VENV)/.kernels

.DEFAULT_GOAL := help
.PHONY: help setup check fmt proto metrics-page dashboards test demo up

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(STAMP) $(KERNELS_STAMP) ## Create .venv with everything (PYTHON= chooses the interpreter)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'torch~=2.13.0'
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[worker,local,autoscaler,dev]'
	@touch $@

# Without a compiler it says so and the torch implementation is used.
$(KERNELS_STAMP): $(STAMP) $(KERNELS)/build.py $(wildcard $(KERNELS)/csrc/*)
	$(BIN)/python -m paceline_kernels.cpu.build
	@touch $@

check: $(STAMP) ## Lint, types, import rules, wire contracts, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/base.binpb
	scripts/check_stubs.sh
	$(BIN)/python -m paceline.process.metrics.page | diff docs/metrics.md -
	$(BIN)/python -m deploy.grafana.dashboards --check

fmt: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

proto: $(STAMP) ## Regenerate the stubs from proto/
	scripts/generate_stubs.sh

metrics-page: $(STAMP) ## Write docs/metrics.md from the declarations
	$(BIN)/python -m paceline.process.metrics.page > docs/metrics.md

dashboards: $(STAMP) ## Write the Grafana dashboards from their sources
	$(BIN)/python -m deploy.grafana.dashboards

test: $(STAMP) $(KERNELS_STAMP) ## Run the whole suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/unit tests/kernels tests/docs
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/e2e

demo: $(STAMP) ## Start a platform on free ports, send it prompts and check what it promises
	@$(BIN)/paceline demo

up: $(STAMP) ## Start a platform with the demo model and keep it running until Ctrl-C
	@$(BIN)/paceline up

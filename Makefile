# Targets for daily work; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Number of test files that run in parallel. Most of them wait for other processes.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install peers demo test test-fast soak lint format bench clean

help: ## list all targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## create .venv with pinned dependencies

$(STAMP): pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-demo.txt
	touch $(STAMP)

peers: ## create .venv-peers with the libraries that exports and benchmarks are compared with
	PYTHON=$(PYTHON) benchmarks/harness/make_peers_env.sh

demo: $(STAMP) ## run the whole pipeline on a small real model (minutes on 2 cores)
	$(BIN)/python launch.py
	@echo "open runs/demo/report/index.html"

test: $(STAMP) peers ## run all tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=20

test-fast: $(STAMP) ## run the tests that do not start processes
	$(BIN)/python -m pytest -m "not slow and not distributed and not ray" tests/unit

soak: $(STAMP) ## inject random faults for 20 minutes and check that no data is lost
	OMP_WAIT_POLICY=passive $(BIN)/python -m tests.soak --minutes 20

lint: $(STAMP) ## check with ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## format and fix with ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) peers ## measure one training step, here and in the other libraries
	$(BIN)/python -m benchmarks.step --work 16384,256,1024,32 65536,768,1024,32 --rounds 7 \
		--slope 16384,65536,262144 --slope-work 256,1024,32 \
		--json benchmarks/results/step-cpu.json

clean: ## remove environments, runs and caches
	rm -rf $(VENV) .venv-peers runs .pytest_cache .mypy_cache .ruff_cache

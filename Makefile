# `make repro` and `make test` work on a fresh machine; `make help` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
STAMP := $(VENV)/.installed
SIDE_BY_SIDE := -n 2 --dist loadgroup
PORT ?= 5000
START := /\#/?workflowType=machine_learning

.PHONY: help setup repro ui test test-fast test-infra lint types bench architectures params clean lock

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv from requirements.lock (once)
	@echo "environment ready: $(VENV) ($$($(BIN)/python --version), torch $$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))'))"

$(STAMP): requirements.lock pyproject.toml
	@echo "setting up $(VENV) from requirements.lock (some minutes, about 7 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

repro: setup ## run all stages of the pipeline that have changed
	@dvc repro
	@python -m stages.tools.summary

ui: setup ## MLflow's UI (runs, pictures, the model registry) on PORT, or the address of its server
	@case "$$MLFLOW_TRACKING_URI" in \
	http*) echo "$${MLFLOW_TRACKING_URI%/}$(START)" | sed 's|//[^/]*@|//|' ;; \
	*) echo "http://127.0.0.1:$(PORT)$(START)"; \
	   MLFLOW_DISABLE_TELEMETRY=true exec mlflow ui --port $(PORT) \
	   --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" ;; \
	esac

test: setup ## all tests except those that start servers
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: setup ## tests for each commit: without the stage graph, Ray, torch.compile and other processes
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not graph and not ray and not compile and not processes and not infra"

test-infra: setup ## tests with servers: Ray, S3, MLflow on PostgreSQL (installed if missing: Debian, as root)
	@ls -d /usr/lib/postgresql/*/bin > /dev/null 2>&1 || (apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends postgresql)
	@$(BIN)/python -m pytest -m infra tests/infra

lint: setup ## ruff (lint, format), import-linter (layers of imports), deptry (declared dependencies)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/deptry .

types: setup ## mypy
	@$(BIN)/mypy

bench: setup ## speed and memory against plain baselines, on the GPU if there is one
	@python -m benchmarks.step
	@python -m benchmarks.distillation
	@python -m benchmarks.guidance
	@python -m benchmarks.gridpg
	@dvc repro --quiet shard && python -m benchmarks.loader

architectures: setup ## convert every family of networks and write docs/architectures.md
	@python -m benchmarks.architectures --write docs/architectures.md

params: setup ## compose the default recipe anew: params.yaml and docs/params.md
	@python -m stages.tools.params

lock: ## resolve pyproject.toml anew into requirements.lock
	@rm -rf .lock && $(PYTHON) -m venv .lock
	@.lock/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@.lock/bin/python -m pip install --quiet --editable '.[dev,infra]' setuptools
	@.lock/bin/python -m pip freeze --exclude-editable --all | grep -v '^pip==' > requirements.lock
	@rm -rf .lock

clean: ## remove the outputs of the pipeline (not .venv, not the DVC cache)
	@rm -rf data models reports runs dvc_plots mlflow.db mlartifacts .mypy_cache .ruff_cache *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

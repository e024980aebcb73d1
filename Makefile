# `make repro` runs the paper; `make test` proves the parts. Both set up .venv first and can be repeated at will.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY := PASSIVE

.PHONY: repro test test-fast torture plan evidence setup lock audit
repro: setup ## the whole pipeline, then the table
	@dvc repro
	@cat reports/table.md
	@echo
	@echo "All of it on one page, with where it came from: reports/index.html. The notebooks behind the pictures are in notebooks/."
	@echo "Compare runs:  .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1"
	@echo "Vary a thing:  .venv/bin/dvc exp run -S pretrain.mask_ratio=0.5"

test: setup ## the test suite, in three processes
	@python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-fast: setup ## the tests of single functions: no pipeline, no server, about a minute
	@python -m pytest -q -n 2 --dist load -m "not slow"

torture: setup ## a smoke-scale pipeline killed, cut off and damaged in every way: about half an hour
	@python -m tests.torture $(if $(ONLY),--only $(ONLY)) $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

plan: setup ## what a recipe costs before it runs: make plan SCALE=paper
	@python -m milan.plan $(if $(SCALE),--scale $(SCALE)) $(if $(TFLOPS),--tflops $(TFLOPS))

evidence: setup ## every study of docs/evidence.md, hours at demo scale; continues when repeated
	@python -m milan.report.studies

setup: .venv/.installed ## .venv with the pinned requirements.txt

.venv/.installed: requirements.txt
	@echo "Setting up .venv with the packages pinned in requirements.txt (about 6 GB, a few minutes the first time)."
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { echo "error: Python 3.10 to 3.13 is needed; `$(PYTHON) --version` was found. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --progress-bar on -r requirements.txt
	@touch $@

lock: ## requirements.txt anew from requirements.in (needs uv)
	uv pip compile --universal --python-version 3.10 --no-header --quiet requirements.in -o requirements.txt

audit: ## known vulnerabilities of the pinned packages (asks PyPI)
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install --quiet pip-audit
	@.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.txt

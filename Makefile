# `make repro` runs the pipeline, `make test` the tests. Every target that needs .venv sets it up first.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY := PASSIVE

.PHONY: repro test test-fast torture compare plan evidence setup lock audit
repro: setup ## run the whole pipeline, print the table, and compare it with the committed numbers
	@dvc repro
	@cat reports/table.md
	@echo
	@echo "All results on one page, with their provenance: reports/index.html. The notebooks that draw the figures are in notebooks/."
	@echo "Compare runs:      .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1"
	@echo "Change a setting:  .venv/bin/dvc exp run -S pretrain.mask_ratio=0.5"
	@echo
	@python -m milan.report.reproduction

test: setup ## run all tests, in three processes
	@python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-fast: setup ## run the tests of single functions (no pipeline, no server): about a minute
	@python -m pytest -q -n 2 --dist load -m "not slow"

torture: setup ## run the fault tests (kills, full disks, damaged files) on a smoke pipeline: about half an hour
	@python -m tests.torture $(if $(ONLY),--only $(ONLY)) $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

compare: setup ## print the results of this folder, of experiments and of commits side by side
	@python -m milan.report.compare

plan: setup ## estimate the cost of a recipe: make plan SCALE=paper CARD=H100
	@python -m milan.plan $(if $(SCALE),--scale $(SCALE)) $(if $(CARD),--card $(CARD)) $(if $(TFLOPS),--tflops $(TFLOPS))

evidence: setup ## run every study of docs/evidence.md (hours at demo scale); run it again to continue
	@python -m milan.report.studies

setup: .venv/.installed ## create .venv with the pinned packages of requirements.txt

.venv/.installed: requirements.txt
	@if ! said=$$(LC_ALL=C git rev-parse 2>&1); then echo "note: git knows no repository here ($$said). The pipeline runs without one; experiments (dvc exp) and studies need one: for them take a git clone, not a downloaded archive."; fi
	@echo "Setting up .venv with the packages pinned in requirements.txt (about 6 GB, a few minutes the first time)."
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "error: Python 3.11 to 3.13 is needed; this is `$(PYTHON) --version`. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --progress-bar on -r requirements.txt
	@! LC_ALL=C git rev-parse 2>&1 | grep -q "not a git repository\|not found" || $(BIN)/dvc config --local core.no_scm true
	@touch $@

lock: ## write requirements.txt from requirements.in (needs uv)
	uv pip compile --universal --python-version 3.11 --no-header --quiet requirements.in -o requirements.txt

audit: ## check the pinned packages for known vulnerabilities (queries PyPI)
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install --quiet pip-audit
	@.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.txt

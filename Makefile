.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# Made anew whenever the requirements change.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py mhmoe_vl/moe/activations.c mhmoe_vl/moe/choice.c mhmoe_vl/moe/vector.h
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q mhmoe_vl eval data_prep
	touch $@

install: $(VENV)/.installed ## make .venv with everything in it

quickstart: install ## sample data, pretraining, fine-tuning, evaluation, report.html
	PATH="$(CURDIR)/$(BIN):$$PATH" bash quickstart.sh

study-smoke: install ## a whole comparison of kinds in about a minute; its numbers mean nothing
	PATH="$(CURDIR)/$(BIN):$$PATH" bash study_smoke.sh

study: install ## the main comparison, on public data: make study PUBLIC=folder (docs/study.md); about two hours
	PATH="$(CURDIR)/$(BIN):$$PATH" PUBLIC="$(PUBLIC)" bash study_data.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m mhmoe_vl.study --config configs/study/main.yaml --workers 2 --document docs/RESULTS.md

test: install ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

check: install ## lint, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

bench: install ## time layers of all kinds, the expert layer against its floor, and whole training steps
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.moe
	$(BIN)/python -m benchmarks.train

clean: ## remove the environment, runs and sample data
	rm -rf $(VENV) runs data/quickstart data/study data/study-smoke data/targets

.PHONY: help install quickstart study-smoke study test check bench clean

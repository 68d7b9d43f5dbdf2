# Everything starts from a fresh clone: the targets that need the environment create it first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
JIT := .cache/torch_extensions
SUITES := unit dist fault cluster e2e

export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(JIT)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help venv demo miniature test check lint schemas docs unit clean $(addprefix test-,$(SUITES))
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z%-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

venv: $(STAMP) ## the environment in .venv, pinned by constraints.txt

demo: $(STAMP) ## real video -> shards -> two-rank ZeRO-3 training, stopped and resumed -> a report page
	regen demo

miniature: $(STAMP) ## drawn videos -> embedder -> latents -> text to video, preempted once -> generated videos, scored
	regen miniature $(if $(HARD),--hard)

test: ## every suite, servers included; a suite that fails does not keep the others from running
	@$(MAKE) --no-print-directory --keep-going $(addprefix test-,$(SUITES))
	@echo "all suites passed: $(SUITES)"

check: lint docs unit ## ruff, mypy --strict, import contracts, the site's links, unit tests: before every commit

lint: $(STAMP)
	ruff check .
	ruff format --check .
	mypy
	lint-imports

schemas: $(STAMP) ## configs/schema and docs/config.md, written from the config's code
	for kind in $(notdir $(basename $(wildcard configs/schema/*.json))); do \
		regen config schema $$kind --out configs/schema/$$kind.json || exit 1; done
	regen config keys --out docs/config.md

docs: $(STAMP) ## the pages as a site in build/site; fails on a link or an anchor that leads nowhere
	NO_MKDOCS_2_WARNING=1 mkdocs build

# Tests in every suite start and kill real processes, on machines that others share: one that fails is run once more, and
# the summary names it (RERUN). One that fails twice fails the suite.
AGAIN := --reruns 1 -raR

unit: test-unit

# A quarter of their time is waiting: one worker more than there are cores.
test-unit: $(STAMP)
	@echo "== unit =="
	OMP_NUM_THREADS=1 pytest tests/unit -n $(shell expr $$(env -u OMP_NUM_THREADS nproc) + 1) --dist worksteal -q $(AGAIN)

test-dist: $(STAMP)
	@echo "== dist =="
	pytest tests/dist -q $(AGAIN)

# Much of their time is waiting: three files at once. Their conftest.py puts those that last longest first.
test-fault test-cluster: test-%: $(STAMP)
	@echo "== $* =="
	pytest tests/$* -n 3 --dist loadfile --no-loadscope-reorder -q $(AGAIN)

test-e2e: $(STAMP)
	@echo "== e2e =="
	pytest tests/e2e -n 2 --dist loadfile -q $(AGAIN)

# torch first and pinned: an open range would take a CUDA build of several gigabytes on a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt .ci/system-packages
	.ci/system-packages $(PYTHON)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch setuptools
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[all,dev,docs,bench]'
	touch $@

clean: ## removes caches and builds; keeps runs and the environment
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache $(JIT)

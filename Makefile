# make demo: the main job on 700 real cells.   make test: linter and all tests.
# make docs: the documentation in docs/_build/html (ARGS="-D nb_execution_mode=off": without running the tutorials).
#   Tutorials run again only if they, the sources or the packages have changed; rm -rf .docs_cache runs all.
# make bench: speed and memory of training beside scVI (ARGS="--quick": 3 to 5 minutes).
# make bench-gpu: the same on a GPU, and the main call there (says so where there is none).
# make bench-clusters: clusters beside scVI and PCA (ARGS="FOLDER --seeds 0 1 2", "--quick").
# make bench-splits: clusters found in one population, and in two that differ in a few genes (ARGS="--quick").
# make bench-scale: training on counts that stay in a file, beside in memory (ARGS="--quick", "--cells 100000").
# make bench-genes: false discoveries of differential genes on simulated cells (ARGS="--one-population", "--quick").
# make bench-robustness: odd arguments, kills and Ctrl-C for five minutes (ARGS="--seconds 3600").
# make structure: rooms, imports between them, long functions and files, as the sources have them.
# make profile: where the time of a training step goes (ARGS="--help": on what).
# PYTHON= chooses another interpreter, with an environment of its own (PYTHON=python3.12 -> .venv-3.12).

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= $(if $(filter file,$(origin PYTHON)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
# The tested set of each Python; a Python without one takes the newest releases.
CONSTRAINTS := $(wildcard constraints-$(VERSION).txt)
# Two test processes of one thread each are faster than one of two.
TEST_PROCESSES ?= 2

.PHONY: demo test lint install docs bench bench-gpu bench-clusters bench-splits bench-scale bench-genes bench-robustness profile structure clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group test $(addprefix --constraint ,$(CONSTRAINTS))
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group docs $(addprefix --constraint ,$(CONSTRAINTS))
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: lint
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --durations 10

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# All pages anew, so that every warning is seen, and no page is left of what is gone.
docs: $(VENV)/.installed-docs
	rm -rf docs/_build docs/generated
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --doctree-dir docs/_build/doctrees $(ARGS) docs docs/_build/html
	$(BIN)/python docs/check_pages.py docs/_build/html

bench: install
	$(BIN)/python benchmarks/throughput.py $(ARGS)

bench-gpu: install
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-clusters: install
	$(BIN)/python benchmarks/clustering.py $(ARGS)

bench-splits: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/splits.py $(ARGS)

bench-scale: install
	$(BIN)/python benchmarks/scale.py $(ARGS)

bench-genes: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/differential_genes.py $(ARGS)

bench-robustness: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/robustness.py $(ARGS)

profile: install
	$(BIN)/python benchmarks/profile_step.py $(ARGS)

structure:
	$(PYTHON) tests/structure.py $(ARGS)

clean:
	rm -rf .venv .venv-* demo docs/_build docs/_reference.md docs/generated docs/tutorials .docs_cache .pytest_cache .ruff_cache

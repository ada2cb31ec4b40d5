PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PY     := $(BIN)/python
STAMP  := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --doctest-modules jdfunc tests
NBS    := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint types bench notebooks check clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

$(STAMP): pyproject.toml .ci/constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c .ci/constraints.txt -e ".[test,lint,notebooks,bench]"
	# Without what it asks for: torchvision, which it does not need and which fits no CPU build.
	$(PY) -m pip install --quiet -c .ci/constraints.txt --no-deps curvlinops-for-pytorch backpack-for-pytorch
	touch $@

install: $(STAMP)  ## virtual environment with pinned tools; repeated only if the pins change
demo: $(STAMP)  ## Jacobian descent on handwritten digits: a table, and figures in build/demo
	$(PY) notebooks/demo.py
test: $(STAMP)  ## fast tests and doctests, in parallel
	$(PYTEST) -n 2 -m "not slow and not dist and not gpu"
test-all: $(STAMP)  ## every test; those that need an accelerator skip themselves without one
	$(PYTEST) -n 2
lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
types: $(STAMP)  ## pyright on the package
	$(BIN)/pyright --pythonpath $(PY)
bench: $(STAMP)  ## time and memory of steps, weightings and multi-task steps, against the peers
	$(PY) tests/benchmarks/bench_structured.py
	$(PY) tests/benchmarks/bench_structured.py --memory
	$(PY) tests/benchmarks/bench_weightings.py
	$(PY) tests/benchmarks/bench_compiled.py
	$(PY) tests/benchmarks/bench_hull.py
	$(PY) tests/benchmarks/bench_bargaining.py
	$(PY) tests/benchmarks/bench_surgery.py
	$(PY) tests/benchmarks/bench_mtl.py
	$(PY) tests/benchmarks/bench_mtl.py --memory
	$(PY) tests/benchmarks/bench_mtl.py --rotations
	$(PY) tests/benchmarks/bench_curvature.py
	$(PY) tests/benchmarks/bench_curvature.py --memory
	$(PY) tests/benchmarks/bench_curvature.py --operations
	$(PY) tests/benchmarks/bench_composition.py
notebooks: $(STAMP)  ## run every notebook; the run copies go to build/notebooks
	$(if $(NBS),OMP_NUM_THREADS=1 $(PY) -m nbconvert --to notebook --execute --output-dir build/notebooks $(NBS))
check: lint types test  ## all that has to pass before a merge
clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Only relative paths, and every tool as `python -m`: the path to this folder may contain spaces.

PYTHON ?= python3

python := .venv/bin/python
pip_install := $(python) -m pip install -c constraints.txt
requirements := setup.cfg pyproject.toml constraints.txt

# What `make test` installs holds all that `make demo` needs.
examples_installed := $(or $(wildcard .venv/installed-all),.venv/installed-examples)
all_installed := .venv/installed-all
bench_installed := .venv/installed-bench

SEED ?= $(shell date +%s)

# In this order: the last reads what the others have written.
peers := benchmarks/steps.py benchmarks/chunks.py benchmarks/growth.py benchmarks/precision.py benchmarks/asked.py
every := $(filter-out $(peers),$(wildcard benchmarks/*.py)) $(peers)

.DELETE_ON_ERROR:
.PHONY: help demo test nightly docs bench bench-all bench-smoke lint locked audit oldest newest clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: $(examples_installed)  ## install what the examples need, then train and judge VAEs on real digits
	$(python) examples/digits_vae.py

test: lint  ## install everything; lint, tests (shapes checked, doctests included) and documentation
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(python) -m pytest -n 2 --dist worksteal
	$(MAKE) docs

nightly: $(all_installed)  ## every test, the slow ones too, and 20,000 random models; SEED=... repeats them
	OMP_NUM_THREADS=1 MPLBACKEND=Agg HYPOTHESIS_PROFILE=nightly $(python) -m pytest -n 2 --dist worksteal -m "" \
		--hypothesis-seed=$(SEED)

docs: $(all_installed)  ## run the tutorials and examples, build the documentation into docs/_build/html, check its links
	rm -f docs/gallery/*.md5  # of scripts that ran: what they run may have changed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(python) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(python) -m sphinx -W --keep-going -q -b doctest docs docs/_build/doctest
	$(python) docs/check_links.py docs/_build/html

bench: $(bench_installed)  ## time steps against Pyro, PyTorch by hand and NumPyro (a quarter of an hour)
	@for script in $(peers); do echo "$$script"; $(python) "$$script" || exit 1; done
	@if $(python) -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
		for script in $(peers); do echo "$$script, GPU"; $(python) "$$script" --device cuda || exit 1; done; fi

bench-all: $(bench_installed)  ## run every benchmark (hours)
	@for script in $(every); do echo "$$script"; $(python) "$$script" || exit 1; done

bench-smoke: $(all_installed)  ## try every benchmark for a few seconds; measures and keeps nothing
	@for script in $(every); do echo "$$script"; $(python) "$$script" --smoke || exit 1; done

lint: $(all_installed)  ## ruff, mypy and spelling
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) -m codespell_lib .

locked:  ## install from hashed files alone, into .venv-locked, and see that all of it fits together
	$(PYTHON) -m venv .venv-locked
	.venv-locked/bin/python -m pip install -q -c constraints.txt torch
	.venv-locked/bin/python -m pip install -q --no-deps --require-hashes -r requirements.lock
	.venv-locked/bin/python -m pip install -q --no-deps --no-build-isolation .
	.venv-locked/bin/python -m pip check
	.venv-locked/bin/python -W error -c "import pyro_iwae"

audit: locked  ## ask for known vulnerabilities in what is locked
	.venv-locked/bin/python -m pip install -q pip-audit
	.venv-locked/bin/python -m pip_audit --disable-pip --require-hashes -r requirements.lock

oldest newest:  ## the tests with the oldest, or the newest, torch and Pyro (in .venv-oldest, .venv-newest)
	$(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install -q $(if $(filter oldest,$@),-c oldest.txt) -e ".[test]"
	OMP_NUM_THREADS=1 MPLBACKEND=Agg .venv-$@/bin/python -m pytest -n 2 --dist worksteal tests

clean:  ## remove the environment, caches and what was built; keep results
	rm -rf .venv .venv-* build dist *.egg-info docs/_build docs/gallery docs/sg_execution_times.rst .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed-examples: $(requirements)
	$(PYTHON) -m venv .venv
	$(pip_install) -e ".[examples]"
	touch $@

.venv/installed-all: $(requirements)
	$(PYTHON) -m venv .venv
	$(pip_install) -e ".[examples,test,docs]"
	touch $@

.venv/installed-bench: $(all_installed)
	$(pip_install) -e ".[bench]"
	touch $@

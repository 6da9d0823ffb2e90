# make demo, make test: everything from a fresh clone. On a machine without network, or to use an
# environment that is there already: make test PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
DEVICE ?=
TORCH ?= torch>=2.11
EXTRAS ?= test,cli

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
endif

# Rebuilt when a source changes; the stamp sits with the environment it was built into.
STAMP := build/.installed-$(subst /,_,$(PY))
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)

.PHONY: help demo test cpp-test bench report build clean
help:  ## what there is (the default)
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

build: $(STAMP)  ## set up the environment and build the extension into it

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip 'setuptools>=77' wheel
	$(VENV)/bin/python -m pip install '$(TORCH)' ninja pybind11 numpy

$(STAMP): $(SOURCES) $(if $(strip $(VENV)),$(VENV)/bin/python)
ifeq ($(strip $(VENV)),)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
else
	$(PY) -m pip install --quiet --no-build-isolation -e '.[$(EXTRAS)]'
endif
	@mkdir -p $(@D) && touch $@

demo: build  ## replay a serving trace through the pool
	$(PY) -m pystage demo $(if $(DEVICE),--device $(DEVICE))

test: build  ## the test suite
	$(PY) -m pytest -q

cpp-test:  ## the C++ tests of pool and gather; they need doctest
	$(MAKE) -C csrc/tests

bench:  ## measure all peers in all regimes; results go to bench/results (ARGS='--quick --peers DIR')
	$(PY) -m bench $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

report:  ## put the figures of bench/results into README and docs, and draw them
	$(PY) bench/report.py

clean:  ## remove what was built
	rm -rf build dist *.egg-info pystage/*.so

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

.PHONY: help demo test sglang-env sglang-test cpp-test mutants bench report build clean
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

# An environment with SGLang, made once. The extension stands in the source folder, built for one
# torch at a time: the other environments' stamps go, so that they build again.
SGLANG_VENV ?= .venv-sglang
SGLANG_STAMP = $(SGLANG_VENV)/.complete-$(shell cat tests/sglang-requirements.txt tests/install_sglang.py | cksum | cut -d' ' -f1)

sglang-env:  ## install SGLang for the CPU into .venv-sglang
	@test -e $(SGLANG_STAMP) || { rm -rf $(SGLANG_VENV) && \
	  $(PYTHON) tests/install_sglang.py $(SGLANG_VENV) && touch $(SGLANG_STAMP); }

sglang-test: sglang-env  ## the plugin in the real SGLang, on the CPU
	PYSTAGE_CUDA=0 $(SGLANG_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@rm -f build/.installed-*
	PYSTAGE_TEST_SGLANG_OLD=$(SGLANG_VENV)/releases $(SGLANG_VENV)/bin/python -m pytest -q -W ignore tests/test_sglang.py

cpp-test:  ## the C++ tests of pool and gather; they need doctest
	$(MAKE) -C csrc/tests

mutants: build  ## put single faults into pystage: do the tests notice? (ARGS='--only pool.cpp --list')
	$(PY) -m tests.mutants --sglang $(SGLANG_VENV)/bin/python $(ARGS)

bench:  ## measure all peers in all regimes; results go to bench/results (ARGS='--quick --peers DIR')
	$(PY) -m bench $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

report:  ## put the figures of bench/results into README and docs, and draw them
	$(PY) bench/report.py

clean:  ## remove what was built
	rm -rf build dist *.egg-info pystage/*.so

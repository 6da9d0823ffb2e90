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

.PHONY: help demo test coverage sglang-env sglang-test cpp-test tidy mutants fuzz fuzz-coverage bench report build clean
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
	$(PY) $(COUNTED) -m pytest -q

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
	PYSTAGE_TEST_SGLANG_OLD=$(SGLANG_VENV)/releases $(SGLANG_VENV)/bin/python $(COUNTED) -m pytest -q -W ignore tests/test_sglang.py tests/test_engine.py

# Both suites with the lines of Python that run counted, then the tests that drive the extension
# once more, on a build that counts its own: beside a copy of the package, so that the extension in
# the source folder stays what it is. Needs the extra `dev`.
COVERAGE := $(CURDIR)/build/coverage
BINDINGS := batch bindings figures gil hostile integrations ops pool process races small_tensors stage staged_tokens stateful torch_memory
coverage: export COVERAGE_FILE = $(COVERAGE)/data
coverage: build  ## the tests in both environments, and the lines they miss
	rm -rf $(COVERAGE) && mkdir -p $(COVERAGE)/tree
	$(MAKE) --no-print-directory test COUNTED='-m coverage run'
	cp -r pystage tests bench docs README.md pyproject.toml $(COVERAGE)/tree
	rm -f $(COVERAGE)/tree/pystage/*.so
	PYSTAGE_COVERAGE=1 $(PY) setup.py -q build_ext --build-temp $(COVERAGE)/objects --build-lib $(COVERAGE)/tree
	cd $(COVERAGE)/tree && PYSTAGE_TEST_SCALE=0.05 $(abspath $(PY)) -m pytest -q $(BINDINGS:%=tests/test_%.py)
	@set -e; without=--without-sglang; \
	if $(MAKE) --no-print-directory sglang-env; then without=; \
	  $(MAKE) --no-print-directory sglang-test COUNTED='-m coverage run'; \
	else echo 'SGLang could not be installed here (see above): the plugin is NOT tested in it'; fi; \
	$(PY) tests/measure_coverage.py $(COVERAGE) $$without

cpp-test:  ## the C++ tests of pool and gather; they need doctest
	$(MAKE) -C csrc/tests

TIDY ?= csrc/gather.cpp csrc/host_device.cpp csrc/pool.cpp
tidy:  ## clang-tidy on the C++ that needs no torch (pip install clang-tidy; TIDY='FILES')
	$(or $(wildcard $(VENV)/bin/clang-tidy),clang-tidy) --quiet $(TIDY) -- -std=c++20

mutants: build  ## put single faults into pystage: do the tests notice? (ARGS='--only pool.cpp --list')
	$(PY) -m tests.mutants --sglang $(SGLANG_VENV)/bin/python $(ARGS)

# libFuzzer by way of atheris, the extension under AddressSanitizer (clang), Python's objects each in
# memory of its own. FUZZ_SEED=N runs what a run with that seed ran. A crash leaves its input in
# build/fuzz: python tests/fuzz.py --replay FILE.
FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 0
FUZZ_FLAGS := -fno-omit-frame-pointer -Wno-unknown-warning-option
FUZZ_RUN = PYTHONMALLOC=malloc PYTHONPATH=build/fuzz/lib \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  LD_PRELOAD=$$($(PY) -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so

build/fuzz/.built: $(SOURCES) $(wildcard pystage/*.py) $(STAMP)
	$(PY) -c 'import atheris' || $(PY) -m pip install atheris
	CC=clang CXX=clang++ LDSHARED='clang++ -shared' LDFLAGS=-shared-libasan PYSTAGE_CUDA=0 \
	  CFLAGS='-fsanitize=address,fuzzer-no-link $(FUZZ_FLAGS)' $(PY) setup.py -q \
	  build_py --build-lib build/fuzz/lib \
	  build_ext --build-lib build/fuzz/lib --build-temp build/fuzz/temp
	@touch $@

fuzz: build/fuzz/.built  ## requests, views and ops against hostile input, for FUZZ_SECONDS=60
	$(FUZZ_RUN) $(PY) tests/fuzz.py build/fuzz/corpus -max_total_time=$(FUZZ_SECONDS) \
	  -seed=$(FUZZ_SEED) -max_len=200 -len_control=10 -artifact_prefix=build/fuzz/ -timeout=60 \
	  -rss_limit_mb=4096 -print_final_stats=1

fuzz-coverage:  ## lines and branches of the C++ files that build/fuzz/corpus comes by (gcovr)
	PYSTAGE_COVERAGE=1 PYSTAGE_CUDA=0 $(PY) setup.py -q build_py --build-lib build/fuzz/counted \
	  build_ext --build-lib build/fuzz/counted --build-temp build/fuzz/counts
	find build/fuzz/counts -name '*.gcda' -delete
	PYTHONPATH=build/fuzz/counted $(PY) tests/fuzz.py --replay build/fuzz/corpus
	$(PY) -m gcovr --root . --filter 'csrc/(requests|ids_view|python|staging|gather)' \
	  --exclude-throw-branches build/fuzz/counts

bench: build  ## measure all peers in all regimes; a whole run on a GPU goes to bench/results (ARGS='--quick --peers DIR')
	$(PY) -m bench $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

report:  ## put the figures of bench/results into README and docs, and draw them
	$(PY) bench/report.py

clean:  ## remove what was built
	rm -rf build dist *.egg-info pystage/*.so

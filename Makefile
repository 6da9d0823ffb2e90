# `make demo` and `make test` set up everything in a fresh clone. To use your own environment, or
# without a network: make test PYTHON=python3 VENV=
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

.DEFAULT_GOAL := help

# Rebuilt when a source changes; the stamp sits with the environment it was built into.
STAMP := build/.installed-$(subst /,_,$(PY))
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.map)

# With other EXTRAS or another TORCH on the command line, the environment is completed again.
ASKED := $(foreach name,EXTRAS TORCH,$(if $(filter command,$(firstword $(origin $(name)))),$(name)=$($(name))))
ifneq ($(strip $(ASKED)),)
ASKED_STAMP := build/.asked-$(shell printf '%s' '$(PY) $(ASKED)' | cksum | cut -d' ' -f1)
$(ASKED_STAMP):
	@mkdir -p $(@D) && touch $@
endif

.PHONY: help build demo test lint tidy cpp-test docs coverage sglang-env sglang-test mutants fuzz fuzz-coverage bench pp-surfaces report clean
help:  ## list the targets (the default)
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

build: $(STAMP)  ## set up the environment and build the extension into it

# The stamp comes last, so that a set-up that failed is taken up again.
ENVIRONMENT := $(if $(strip $(VENV)),$(VENV)/.complete)
$(VENV)/.complete: $(ASKED_STAMP)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip 'setuptools>=77' wheel
	$(VENV)/bin/python -m pip install '$(TORCH)' ninja pybind11 numpy
	@touch $@

$(STAMP): $(SOURCES) $(ENVIRONMENT) $(ASKED_STAMP)
ifeq ($(strip $(VENV)),)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
else
	$(PY) -m pip install --quiet --no-build-isolation -e '.[$(EXTRAS)]'
endif
	@mkdir -p $(@D) && touch $@

demo: build  ## replay a serving trace through a pool and check every id (DEVICE=cpu)
	$(PY) -m pystage demo $(if $(DEVICE),--device $(DEVICE))

test: build  ## run the Python tests
	$(PY) $(COUNTED) -m pytest -q

# Needs the extra `dev`: make build EXTRAS=dev,cli
C_FILES := csrc/*.h csrc/*.cpp csrc/*.cu csrc/tests/*.h csrc/tests/*.cpp tests/faults/*.c bench/*.c
lint:  ## ruff, mypy, clang-format, and whether the pages have the figures of bench/results
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(findstring /,$(PY)),$(dir $(PY)))clang-format --dry-run -Werror $(C_FILES)
	$(PY) -m bench.report --check

docs: $(ENVIRONMENT)  ## build the documentation site into build/site, strictly
	@$(PY) -c 'import material, mkdocstrings_handlers.python' || \
	  $(PY) -m pip install --quiet mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo 'build/site/index.html'

# An environment with SGLang, made once. The source folder holds one extension, built for one torch:
# the stamps of the other environments are removed, so that they build again.
SGLANG_VENV ?= .venv-sglang
SGLANG_STAMP = $(SGLANG_VENV)/.complete-$(shell cat tests/sglang-requirements.txt tests/install_sglang.py | cksum | cut -d' ' -f1)

sglang-env:  ## install SGLang for the CPU into .venv-sglang
	@test -e $(SGLANG_STAMP) || { rm -rf $(SGLANG_VENV) && \
	  $(PYTHON) tests/install_sglang.py $(SGLANG_VENV) && touch $(SGLANG_STAMP); }

# The extension in the source folder serves both environments if they have the same torch.
SGLANG_PY = $(abspath $(SGLANG_VENV)/bin/python)
SGLANG_FITS = PYTHONPATH="$(CURDIR)" $(SGLANG_PY) -c \
  'import pystage; found = pystage.build_info(); assert found.torch_built == found.torch' 2> /dev/null
sglang-test: sglang-env  ## test the plugin in the real SGLang, on the CPU
	@$(SGLANG_FITS) || { rm -f build/.installed-* && \
	  PYSTAGE_CUDA=0 $(SGLANG_PY) -m pip install --quiet --no-build-isolation --no-deps -e .; }
	PYTHONPATH="$(CURDIR)" PYSTAGE_TEST_SGLANG_OLD=$(abspath $(SGLANG_VENV)/releases) \
	  $(SGLANG_PY) $(COUNTED) -m pytest -q -W ignore tests/test_sglang.py tests/test_engine_runs.py

# Both suites with the lines of Python that run counted, and the tests that drive the extension once
# more, on a build that counts its own: in a copy of the package, so that the extension in the source
# folder stays what it is. All three run at a time; SGLang's suite waits for the first if it needs
# another build of the extension. Needs the extra `dev`.
COVERAGE := $(CURDIR)/build/coverage
BINDINGS := batch bindings figures gil hostile integrations ops pool process races small_tensors stage staged_tokens stateful torch_memory
coverage: export COVERAGE_FILE = $(COVERAGE)/data
coverage: build  ## run the tests in both environments and list the lines they miss
	rm -rf "$(COVERAGE)" && mkdir -p "$(COVERAGE)"/tree
	cp -r pystage tests bench docs README.md pyproject.toml "$(COVERAGE)"/tree
	rm -f "$(COVERAGE)"/tree/pystage/*.so
	@trap 'kill $$(jobs -p) 2> /dev/null' EXIT; \
	sglang() { $(MAKE) --no-print-directory sglang-test COUNTED='-m coverage run'; }; \
	finish() { wait $$1 && tail -n 1 "$(COVERAGE)"/$$2.log || { cat "$(COVERAGE)"/$$2.log; exit 1; }; }; \
	{ PYSTAGE_COVERAGE=1 $(PY) setup.py -q build_ext --build-temp "$(COVERAGE)"/objects \
	    --build-lib "$(COVERAGE)"/tree && cd "$(COVERAGE)"/tree && PYSTAGE_TEST_SCALE=0.05 \
	  $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY)) -m pytest -q $(BINDINGS:%=tests/test_%.py); } > "$(COVERAGE)"/bindings.log 2>&1 & \
	bindings=$$!; without= beside=; \
	$(MAKE) --no-print-directory sglang-env || { without=--without-sglang; \
	  echo 'SGLang could not be installed here (see above): the plugin is NOT tested in it'; }; \
	if [ -z "$$without" ] && $(SGLANG_FITS); then sglang > "$(COVERAGE)"/sglang.log 2>&1 & beside=$$!; fi; \
	$(MAKE) --no-print-directory test COUNTED='-m coverage run' || exit 1; \
	if [ -n "$$beside" ]; then finish $$beside sglang; elif [ -z "$$without" ]; then sglang || exit 1; fi; \
	finish $$bindings bindings; \
	$(PY) tests/measure_coverage.py "$(COVERAGE)" $$without

cpp-test:  ## run the C++ tests of the core (needs doctest)
	$(MAKE) -C csrc/tests

TIDY ?= csrc/*.cpp
TIDY_FLAGS = -std=c++20 -DPYSTAGE_TORCH_VERSION='""' $$($(PY) -c "import pybind11, sysconfig; \
  from torch.utils.cpp_extension import include_paths; \
  paths = [*include_paths(), pybind11.get_include(), sysconfig.get_paths()['include']]; \
  print(' '.join('-isystem' + path for path in paths))")
tidy: build  ## run clang-tidy, minutes (pip install clang-tidy; TIDY='FILES')
	$(or $(wildcard $(VENV)/bin/clang-tidy),clang-tidy) --quiet $(TIDY) -- $(TIDY_FLAGS)

mutants: build  ## put single faults into the code; do the tests notice? (ARGS='--only pool.cpp --list')
	$(PY) -m tests.mutants --sglang $(SGLANG_VENV)/bin/python $(ARGS)

# libFuzzer through atheris; the extension under AddressSanitizer (clang); each Python object in its own
# memory. FUZZ_SEED=N repeats the run with that seed. A crash leaves its input in
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

fuzz: build/fuzz/.built  ## feed requests, views and ops hostile input for FUZZ_SECONDS=60
	$(FUZZ_RUN) $(PY) tests/fuzz.py build/fuzz/corpus -max_total_time=$(FUZZ_SECONDS) \
	  -seed=$(FUZZ_SEED) -max_len=200 -len_control=10 -artifact_prefix=build/fuzz/ -timeout=60 \
	  -rss_limit_mb=4096 -print_final_stats=1

fuzz-coverage:  ## list the lines and branches of C++ that build/fuzz/corpus reaches (gcovr)
	PYSTAGE_COVERAGE=1 PYSTAGE_CUDA=0 $(PY) setup.py -q build_py --build-lib build/fuzz/counted \
	  build_ext --build-lib build/fuzz/counted --build-temp build/fuzz/counts
	find build/fuzz/counts -name '*.gcda' -delete
	PYTHONPATH=build/fuzz/counted $(PY) tests/fuzz.py --replay build/fuzz/corpus
	$(PY) -m gcovr --root . --filter 'csrc/(requests|ids_view|python|staging|gather)' \
	  --exclude-throw-branches build/fuzz/counts

bench: build  ## measure pystage and all peers (ARGS='--quick --peers DIR'); a whole run on a GPU goes to bench/results
	$(PY) -m bench $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

pp-surfaces: build  ## chunk plans on simulated models, 5 minutes (ARGS='--quick --sglang DIR')
	$(PY) -m bench.pp.surfaces $(ARGS)

report:  ## write the figures of bench/results into README and docs, and draw the plots
	$(PY) -m bench.report

clean:  ## remove what was built
	rm -rf build dist *.egg-info pystage/*.so

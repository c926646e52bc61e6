# make demo | test | docs | test-ray | test-sanitized | test-oldest | test-models | lint | format | clean. The first run creates
# .venv and builds the package; later runs reuse both.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: all demo test docs test-ray test-sanitized test-oldest test-models lint format install clean distclean always

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/build.log
OLDEST := $(VENV)/oldest
# The package with watched kernels, beside the one that is installed.
SANITIZED := build/sanitized
SANITIZED_TESTS := $(patsubst %,tests/ops/test_%.py,contract contract_ig_slope contract_sequences contract_sparse \
	mixed_operator)
OLDEST_TESTS := tests/test_versions.py $(patsubst %,tests/models/%,test_registry.py test_huggingface.py \
	test_torch_encoder.py families capture)
# As many processes as there are cores, with one thread each (tests/conftest.py), take file after file: tests of a file share
# fixtures, and the slowest files come first. Not for a file that PYTEST_ARGS names, nor for the debugger: starting
# processes would cost more than it saves.
WORKERS = $(if $(findstring .py,$(PYTEST_ARGS))$(findstring --pdb,$(PYTEST_ARGS)),,--numprocesses logical \
	--maxprocesses 8 --dist loadfile --no-loadscope-reorder)
# The interpreter .venv is made with: the first python3 that is new enough for the pinned versions.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# Byte-compiling every installed file takes longer than compiling the few that are imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
NATIVE := $(shell find csrc -type f -not -name '*.pyc' 2>/dev/null) ffattr/ops/schemas.inc
CXX_SOURCES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# What setup.py reads: other values are another build.
CHOICES := $(foreach name,FFATTR_CPU FFATTR_CUDA FFATTR_SANITIZE TORCH_CUDA_ARCH_LIST CUDA_HOME,$(name)=$($(name)))

all: install

demo: install
	$(BIN)/python benchmarks/demo.py

test: install
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

# The site, in build/docs; a warning is an error.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "docs: build/docs/index.html"

# Ray takes the cores for itself, and its processes for dead where others keep them busy: one process, after the others.
# Skipped, and said so, where it is not installed or does not start.
test-ray: install
	FFATTR_TEST_RAY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/corpus/test_on_ray.py $(PYTEST_ARGS)

# The operators' tests on kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch: the first mistake ends them.
# The runtime has to be loaded before Python, which frees little at its end; and with it what throws exceptions.
test-sanitized: install $(SANITIZED)/.built
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 CUDA_VISIBLE_DEVICES= \
		PYTHONPATH="$(CURDIR)/$(SANITIZED)" $(BIN)/python -P -m pytest $(WORKERS) --capture=sys \
		--override-ini pythonpath="$(SANITIZED) tests/helpers" $(SANITIZED_TESTS) $(PYTEST_ARGS)

# What knows transformers' modules, with the oldest version supported; not what computes maps of them once more.
test-oldest: install $(OLDEST)/.installed
	PYTHONPATH="$(CURDIR)/$(OLDEST)" $(BIN)/python -m pytest $(WORKERS) $(OLDEST_TESTS) \
		-k "not test_every_backend and not adds_up and not add_up" $(PYTEST_ARGS)

# Slower, and downloads 500 MB on first use: no part of what a change must pass.
test-models: install $(VENV)/.more-models
	$(BIN)/python -m pytest tests/trained $(PYTEST_ARGS)

lint: $(VENV)/.pins
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES))

format: $(VENV)/.pins
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

install: $(VENV)/.built

$(VENV)/.pins: requirements-dev.txt
	@[[ -n "$(PYTHON)" ]] || { echo "no python3 >= 3.11 with venv found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	[[ -x $(BIN)/python ]] || $(PYTHON) -m venv $(VENV)
	sed '/^# models:/,$$d' $< | $(PIP) -r /dev/stdin
	sed -n '/^# models:/,/^# more models:/p' $< | $(PIP) --no-deps -r /dev/stdin
	touch $@

$(VENV)/.more-models: $(VENV)/.pins
	sed -n '/^# more models:/,/^# oldest:/p' requirements-dev.txt | $(PIP) --no-deps -r /dev/stdin
	touch $@

$(OLDEST)/.installed: $(VENV)/.pins
	rm -rf $(OLDEST)
	sed -n '/^# oldest:/,$$p' requirements-dev.txt | $(PIP) --no-deps --target $(OLDEST) -r /dev/stdin
	touch $@

# Written anew only where it changes.
$(VENV)/.choices: always | $(VENV)/.pins
	@cmp --silent <(echo "$(CHOICES)") $@ || echo "$(CHOICES)" > $@

# Editable, without build isolation: the binary must be built against the torch it will be loaded by.
$(VENV)/.package: $(VENV)/.pins pyproject.toml setup.py | $(VENV)/.choices
	@echo "building ffattr (log: $(LOG))"
	@touch $@.started
	@$(BIN)/python -m pip install --verbose --no-build-isolation --no-deps --editable . > $(LOG) 2>&1 || { cat $(LOG); exit 1; }
	@sed -n 's/^ *\(ffattr: .*\)/\1/p' $(LOG) | sort -u
	@cp -p $@.started $(VENV)/.built
	@mv $@.started $@

# Installing has just built everything; afterwards only what changed in csrc is compiled again. A stamp has the time at
# which its build started, so that a file saved meanwhile counts as changed.
$(VENV)/.built: $(VENV)/.package $(VENV)/.choices $(NATIVE)
	@if [[ -n "$$(find $(NATIVE) $(VENV)/.choices -newer $@ -print -quit)" ]]; then \
		echo "rebuilding what changed in csrc (log: $(LOG))"; \
		touch $@.started; \
		$(BIN)/python setup.py build_ext --inplace > $(LOG) 2>&1 || { cat $(LOG); exit 1; }; \
		sed -n 's/^ *\(ffattr: .*\)/\1/p' $(LOG) | sort -u; \
		mv $@.started $@; \
	fi

$(SANITIZED)/.built: $(VENV)/.package $(NATIVE) $(shell find ffattr -name '*.py')
	rm -rf $(SANITIZED)
	@echo "building watched kernels (log: build/sanitized.log)"
	@mkdir -p build
	@FFATTR_SANITIZE=address,undefined FFATTR_CPU=1 FFATTR_CUDA=0 $(BIN)/python setup.py build --build-lib $(SANITIZED) \
		--build-temp build/temp.sanitized > build/sanitized.log 2>&1 || { cat build/sanitized.log; exit 1; }
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo ffattr/*.so ffattr/_build_info.py
	rm -f $(VENV)/.package $(VENV)/.built $(VENV)/.choices
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .cache

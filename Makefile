# make train               install, prepare the built-in text, train the demo model
# make test                install with the test extra, run the tests
# make bench               how fast this machine multiplies and trains, beside PyTorch and plain JAX: 4 minutes
# make test-oldest-jax     the same tests with jax 0.4.34, the oldest that is supported
# make test-matrix         the same tests with every jax that a plugin for the Apple GPU needs, and the newest; about an hour
# make test-custom-calls   the C++ tests, plain and under the SANITIZERS
# make test-aarch64        the same for arm64 Linux, cross-compiled and run under qemu-user
# make check-macos         the library cross-compiled for macOS on Apple silicon, and its file checked
# make wheel               dist/*.whl, in which the custom calls must be
# make docs                the documentation's pages, into build/site; a warning is an error
# make lint                ruff, mypy, and zizmor for the GitHub workflows
# make help                these lines
# Every target is a plain command or two; see README.md for them without make.

PYTHON ?= python3
SANITIZERS ?= address undefined thread
VENV ?= .venv
BIN := $(VENV)/bin
# The extra for this machine's accelerator: mps, metal, cuda, or nothing for plain CPU.
EXTRA = $(shell $(PYTHON) -m gpt2_jax.compute.backend)
CUSTOM_CALL_SOURCES := $(shell find custom_calls -name '*.cc' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: train test bench test-oldest-jax test-matrix test-custom-calls test-aarch64 check-macos wheel docs lint help clean

train: $(VENV)/installed
	$(BIN)/python scripts/prepare_data.py
	$(BIN)/python scripts/train.py --config configs/demo.toml $(TRAIN_FLAGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

bench: $(VENV)/installed-test
	@mkdir -p build
	$(BIN)/python scripts/bench_matmul.py --quick --plot build/bench_matmul.png
	$(BIN)/python scripts/bench_train.py --quick --plot build/bench_train.png

test-oldest-jax:
	$(MAKE) VENV=.venv-oldest-jax TEST_REQUIREMENTS='jax==0.4.34 jaxlib==0.4.34' test

# jax-metal works with the first two, jax-mps with the fourth. PyTorch is compared with on Python 3.11 only.
PYTHON311 ?= python3.11
PYTHON312 ?= python3.12
PYTHON313 ?= python3.13
test-matrix:
	@for python in PYTHON311=$(PYTHON311) PYTHON312=$(PYTHON312) PYTHON313=$(PYTHON313); do \
		$${python#*=} -c '' 2>/dev/null || { echo "error: expected a Python as $${python#*=}, found none;" \
			"make test-matrix $${python%%=*}=PATH   (uv python install and uv python find bring and find one)"; exit 2; }; \
	done
	$(MAKE) test-oldest-jax PYTHON=$(PYTHON311)
	$(MAKE) test PYTHON=$(PYTHON311) VENV=.venv-jax-0.5.0 TEST_REQUIREMENTS='jax==0.5.0 jaxlib==0.5.0'
	$(MAKE) test PYTHON=$(PYTHON311) VENV=.venv-python-3.11
	$(MAKE) test PYTHON=$(PYTHON312) VENV=.venv-jax-0.11 TEST_EXTRA=test-without-torch TEST_REQUIREMENTS='jax==0.11.*'
	$(MAKE) test PYTHON=$(PYTHON313) VENV=.venv-jax-0.12 TEST_EXTRA=test-without-torch TEST_REQUIREMENTS='jax==0.12.*'

# What the custom calls are built and tested with, unpacked as it is: of jaxlib only the headers are used, those that the
# wheel is built with; of OpenBLAS the shared library.
unpack = $(PYTHON) -m pip install --quiet --no-deps --upgrade --target build/$(1) $(2)
configure = cmake -S custom_calls -DGPT2_JAX_REQUIRE_CUSTOM_CALLS=ON \
	-DGPT2_JAX_XLA_FFI_INCLUDE_DIR=$(CURDIR)/build/jaxlib/jaxlib/include

test-custom-calls:
	$(call unpack,jaxlib,jaxlib==0.5.0)
	$(call unpack,openblas,scipy-openblas32)
	export GPT2_JAX_OPENBLAS=$$(echo $(CURDIR)/build/openblas/scipy_openblas32/lib/libscipy_openblas.*); \
	for sanitizer in '' $(SANITIZERS); do \
		folder=build/custom-calls$${sanitizer:+-$$sanitizer}; \
		$(configure) -B $$folder -DGPT2_JAX_SANITIZE=$$sanitizer && \
		cmake --build $$folder -j 2 && \
		ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

test-aarch64:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
		{ echo "error: expected aarch64-linux-gnu-g++ and qemu-aarch64; apt-get install g++-aarch64-linux-gnu qemu-user"; exit 2; }
	$(call unpack,jaxlib,jaxlib==0.5.0)
	$(configure) -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
	cmake --build build/aarch64 -j 2
	ctest --test-dir build/aarch64 --output-on-failure

check-macos:
	$(call unpack,jaxlib,jaxlib==0.5.0)
	$(call unpack,macos,ziglang==0.15.2 lief==1.0.0)
	PATH="$(CURDIR)/build/macos/ziglang:$$PATH" \
		$(configure) -B build/macos/custom-calls -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-macos-zig.cmake
	cmake --build build/macos/custom-calls -j 2
	PYTHONPATH=build/macos $(PYTHON) .ci/check_macho.py build/macos/custom-calls/src/libgpt2_jax_custom_calls.dylib

wheel:
	rm -f dist/*.whl
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist \
		--config-settings=cmake.define.GPT2_JAX_REQUIRE_CUSTOM_CALLS=ON .
	$(PYTHON) .ci/check_wheel.py dist/*.whl

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --quiet --strict --site-dir build/site

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(firstword $(MAKEFILE_LIST))

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --no-progress --quiet .github/workflows

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: expected Python 3.11 or newer, found $$($(PYTHON) --version); make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml $(CUSTOM_CALL_SOURCES)
	@echo "installing into $(VENV) for: $(or $(EXTRA),plain CPU)"
	$(BIN)/python -m pip install -e '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

TEST_EXTRA ?= test
# The tests run on the CPU, with or without an accelerator's extra.
$(VENV)/installed-test: $(BIN)/python pyproject.toml $(CUSTOM_CALL_SOURCES)
	$(BIN)/python -m pip install -e '.[$(TEST_EXTRA)]' $(TEST_REQUIREMENTS)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(BIN)/python -m pip install -e '.[test,dev]'
	@touch $@

# Beside the package itself, whose docstrings are the reference.
$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-* build .pytest_cache .mypy_cache .ruff_cache .hypothesis

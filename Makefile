# Two commands for a newcomer, each doing all of its own set-up in .venv: `make demo` and `make test`.
#
# PYTHON=python3.12   the interpreter to build with
# PIP_ARGS="..."      further options for pip, for example a mirror, or PyTorch's small CPU build:
#                     PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# DEMO_ARGS="..."     further options for `relufy demo`, for example DEMO_ARGS="--text book.txt"

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -c constraints.txt $(PIP_ARGS)
CPP_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
PACKAGE := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/kernels/*)
CHECKED := src tests studies $(wildcard examples)

.DELETE_ON_ERROR:
.PHONY: help demo test lint types test-cpp test-python sanitize neon format clean

help:
	@echo "make demo      relufy the bundled model, measure it, run it, and write relufy-demo/report.html"
	@echo "make test      lint, types, C++ tests, Python tests"
	@echo "make sanitize  C++ tests under the address, undefined-behaviour and thread sanitizers"
	@echo "make neon      C++ tests for 64-bit ARM, emulated: apt install g++-aarch64-linux-gnu qemu-user"
	@echo "make format    format the Python and C++ sources"
	@echo "make clean     remove .venv, build/ and relufy-demo/"

demo: $(VENV)/.demo
	$(BIN)/relufy demo $(DEMO_ARGS)

test: lint types test-cpp test-python

lint: $(VENV)/.dev
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python src

# Builds the C++ tests in folder $(1), with the options $(2) of CMake, and runs them.
define cpp_tests
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(1) -G Ninja -DRELUFY_BUILD_PYTHON=OFF -DRELUFY_BUILD_TESTS=ON $(2)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(1)
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir $(1) --output-on-failure
endef

test-cpp: $(VENV)/.dev
	$(call cpp_tests,build/cpp)

sanitize: $(VENV)/.dev
	$(call cpp_tests,build/sanitize-address,-DRELUFY_SANITIZE=address)
	$(call cpp_tests,build/sanitize-thread,-DRELUFY_SANITIZE=thread)

neon: $(VENV)/.dev
	$(call cpp_tests,build/neon,-DCMAKE_TOOLCHAIN_FILE=.ci/aarch64-linux.cmake)

test-python: $(VENV)/.dev
	$(BIN)/python -m pytest

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf $(VENV) build relufy-demo

$(VENV)/.created: .ci/prerequisites
	@python=$$(PYTHON="$(PYTHON)" .ci/prerequisites) && echo "creating $(VENV) with $$python" && "$$python" -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created $(PACKAGE)
	$(PIP) -e ".[train,report]"
	@touch $@

$(VENV)/.dev: $(VENV)/.created $(PACKAGE)
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.demo

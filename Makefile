# Owns: the commands a person types. Each makes .venv by itself; nothing else needs to be set up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := setup.py pyproject.toml $(wildcard csrc/*)
GCC_LINT := -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Werror

C_FILES := $(wildcard csrc/*.[ch] $(wildcard nitro_vsock/cli/*/*.c) tests/support/*.c tests/support/guest/*.c tests/enclave/guest/*.[ch] bench/peers/*.[ch])

# A worker for each core, but no crowd: tests that measure a delay share the machine.
# Tests start a thousand interpreters: none is to compile the package anew.
SUITE := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadgroup --ignore=tests/enclave
N ?= 20

KERNEL ?= 6.1
VM_FOLDER := build/vsock-$(KERNEL)
VSOCK_TESTS := tests/vsock

.PHONY: help demo test test-often test-vsock test-enclave bench bench-unix bench-quick bench-vsock report lint format clean
.DELETE_ON_ERROR:

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# One stamp an extra, so that `make demo` installs no test tools.
$(VENV)/.%: $(CORE) scripts/venv.sh
	PYTHON=$(PYTHON) scripts/venv.sh $(VENV) $*
	@touch $@

demo: $(VENV)/.cli ## one launch on this machine, real bytes, no enclave needed; ARGS="--size 4GiB"
	$(BIN)/nitro-vsock demo $(ARGS)

test: $(VENV)/.test ## the test suite; ARGS="-k name" passes options to pytest
	$(SUITE) $(ARGS)

test-often: $(VENV)/.test ## the suite N times (20), every second time beside a load on all cores
	$(BIN)/python scripts/test_often.py $(N) $(SUITE) $(ARGS)

test-vsock: $(VENV)/.vm ## the AF_VSOCK tests: here where CID 1 answers, else in a VM; KERNEL=6.1 or 6.12
	VNG=$(BIN)/vng KERNEL=$(KERNEL) scripts/with-loopback $(VM_FOLDER) $(BIN)/python -m pytest \
	  -p no:cacheprovider --junitxml=$(VM_FOLDER)/junit.xml $(VSOCK_TESTS) $(ARGS)

# Without the -W, "nothing to save" would hide why nothing was measured.
PYTEST_BENCH := -m pytest -p no:cacheprovider --override-ini=addopts= --strict-markers --benchmark-columns=median \
  -W default::pytest_benchmark.logger.PytestBenchmarkWarning
RESULTS := build/bench
NOW = $(shell date +%s)

test-enclave: $(VENV)/.test ## the tests in an emulated Nitro enclave; the first run makes its bed, 6 minutes
	scripts/enclave-bed
	$(BIN)/python -m pytest tests/enclave $(ARGS)

bench: $(VENV)/.bench $(VENV)/.vm ## every benchmark beside its peers, AF_VSOCK too; writes docs/performance.md
	rm -rf $(RESULTS)
	failed=0; \
	$(MAKE) bench-unix || failed=1; \
	$(MAKE) bench-vsock KERNEL=6.1 || failed=1; \
	$(MAKE) bench-vsock KERNEL=6.12 || failed=1; \
	$(MAKE) report; \
	exit $$failed

bench-unix: $(VENV)/.bench ## the full benchmarks over Unix sockets; `make report` takes the newest of each
	mkdir -p $(RESULTS)
	$(BIN)/python $(PYTEST_BENCH) bench -m "not quick and not vsock" --benchmark-json=$(RESULTS)/$(NOW).json $(ARGS)

bench-quick: $(VENV)/.bench ## the benchmarks that CI runs, against their floors
	$(BIN)/python $(PYTEST_BENCH) bench -m "not full and not vsock" --quick $(ARGS)

bench-vsock: $(VENV)/.bench $(VENV)/.vm ## the AF_VSOCK ones: here where CID 1 answers, else in a VM; KERNEL=
	mkdir -p $(RESULTS)
	VNG=$(BIN)/vng KERNEL=$(KERNEL) scripts/with-loopback $(RESULTS)/vsock-$(KERNEL) $(BIN)/python \
	  $(PYTEST_BENCH) bench -m vsock --benchmark-json=$(RESULTS)/$(NOW).json $(ARGS)

report: $(VENV)/.bench ## docs/performance.md and its pictures from the last `make bench`
	$(BIN)/python bench/report.py $(RESULTS) docs

lint: $(VENV)/.dev ## types, style, the rooms' imports, C warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	$(foreach file,$(wildcard csrc/*.c bench/peers/*.c),gcc $(GCC_LINT) -fsyntax-only $(file) &&) true

format: $(VENV)/.dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

clean: ## remove everything that was built, .venv too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f nitro_vsock/*.so nitro_vsock/_core.c
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
